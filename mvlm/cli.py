"""The command line: `mvlm COMMAND ... --help` is the documentation of each command."""

import difflib
import errno
import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from mvlm import data_commands

# A command imports what it needs when it runs, so that --help and mistakes answer at once.


def data_emoji(out: Path, /, size: int = 144) -> None:
    """Build the emoji data set: about 3,900 pictures with their English names, from Python packages alone.

    Args:
        out: Folder to write the shards to.
        size: Side of the square pictures in pixels.
    """
    from mvlm_dataloading import build_emoji, open_dataset

    build_emoji(out, size)
    counts = ", ".join(f"{len(open_dataset(out, split))} {split}" for split in ("train", "validation", "test"))
    print(f"{out}: {counts}")


def eval_retrieval(
    *,
    checkpoint: Path,
    data: Path,
    split: str = "test",
    out: Path | None = None,
    rerank: int = 32,
    device: str = "auto",
) -> None:
    """Zero-shot retrieval, by ITC and re-ranked by ITM, and cross-modal gain.

    Args:
        checkpoint: A run folder or one of its checkpoints.
        data: Folder of shards; its train split gives the trivial predictors and tells which concepts are unseen.
        split: The split to evaluate on.
        out: JSON file for the figures, besides the table on the console.
        rerank: Candidates of each query that ITM re-ranks.
        device: auto, cpu or cuda.
    """
    from mvlm.checkpoint import load_model
    from mvlm.device import choose_device
    from mvlm.errors import ConfigError
    from mvlm.evaluation import evaluate
    from mvlm.evaluation.table import format_table, write_json
    from mvlm_dataloading import open_dataset

    if rerank < 1:
        raise ConfigError(f"rerank: wanted at least 1, got {rerank}")
    model, tokenizer = load_model(checkpoint, choose_device(device))
    figures = evaluate(model, open_dataset(data, split), open_dataset(data, "train"), tokenizer, rerank)
    figures = {"checkpoint": str(checkpoint), "split": split, **figures}
    print(format_table(figures))
    if out is not None:
        write_json(out, figures)


def reconstruct(
    *, checkpoint: Path, image: Path, caption: str, out: Path, wrong_caption: str | None = None, seed: int = 0
) -> None:
    """Mask a picture and rebuild it from what is left and from a caption.

    Args:
        checkpoint: A run folder or one of its checkpoints.
        image: The picture, of any size.
        caption: What it shows.
        out: PNG to write: the picture, masked, rebuilt with the caption and, if given, with the wrong one.
        wrong_caption: A caption of something else, to see what the words contribute.
        seed: Chooses the mask.
    """
    import torch
    from PIL import Image

    from mvlm import inference
    from mvlm.checkpoint import load_model
    from mvlm_dataloading import draw_patch_masks

    model, tokenizer = load_model(checkpoint)
    config = model.config
    picture = inference.load_picture(image, config.image_size)[None]
    ids = draw_patch_masks(
        seed, 0, [0], image_size=config.image_size, patch_size=config.patch_size, mask_block=config.mask_block,
        ratio=config.image_mask_ratio,
    )  # fmt: skip
    ids = torch.from_numpy(ids)
    panels = [picture, inference.hide_patches(picture, ids, config.patch_size)]
    panels += [
        inference.reconstruct(model, tokenizer, picture, [words], ids)
        for words in (caption, wrong_caption)
        if words is not None
    ]
    out.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(torch.cat([p[0] for p in panels], dim=2).permute(1, 2, 0).numpy()).save(out)
    print(f"{out}: picture, masked, rebuilt{' and rebuilt with the wrong caption' if wrong_caption else ''}")


def fill(*, checkpoint: Path, image: Path, caption: str, top: int = 5) -> None:
    """Fill in the words of a caption that are written as [MASK], looking at a picture.

    Args:
        checkpoint: A run folder or one of its checkpoints.
        image: The picture, of any size.
        caption: The caption with [MASK] for every token to guess, for example "flag of [MASK]".
        top: Guesses to print for each.
    """
    from mvlm import inference
    from mvlm.checkpoint import load_model
    from mvlm.errors import ConfigError

    model, tokenizer = load_model(checkpoint)
    if not 1 <= top <= tokenizer.vocab_size:
        raise ConfigError(f"top: wanted 1 to {tokenizer.vocab_size}, got {top}")
    tokens = inference.tokens_with_gaps(caption, tokenizer, model.config.text_length)
    ids = (tokens == tokenizer.mask_id).nonzero()[:, 0]
    if not len(ids):
        raise ConfigError(f'caption: wanted at least one [MASK], got {caption!r}; write it as in "flag of [MASK]"')
    picture = inference.load_picture(image, model.config.image_size)[None]
    guesses, chances = inference.fill(model, tokenizer, picture, tokens, [len(tokens)], ids, top)
    for number, (row, chance) in enumerate(zip(guesses.tolist(), chances.tolist(), strict=True), 1):
        words = "  ".join(f"{tokenizer.decode([g])} {100 * c:.0f}%" for g, c in zip(row, chance, strict=True))
        print(f"[MASK] {number}: {words}")


def report(run: Path, others: tuple[Path, ...] = (), /, data: Path | None = None, out: Path | None = None) -> None:
    """Write a run's report: curves, reconstructions, filled-in words, retrievals, tables, in one HTML file.

    Several runs are compared side by side instead, from their metrics and evaluations.

    Args:
        run: The run folder.
        others: Run folders to compare it with, up to five.
        data: Folder of shards; the one the run was trained on when not given. A comparison needs none.
        out: The file to write; report.html, or compare.html, in the (first) run folder when not given.
    """
    if others:
        from mvlm.compare import write_comparison

        print(write_comparison([run, *others], out or run / "compare.html"))
        return
    from mvlm.report import write_report

    print(write_report(run, data, out))


def bench_kernels(
    *,
    ops: tuple[str, ...] = (),
    peers: tuple[str, ...] = (),
    out: Path = Path("benchmarks/results"),
    device: str = "auto",
    dtype: str = "auto",
    quick: bool = False,
    base: str | None = None,
    json: Path | None = None,
) -> None:
    """Time the fused ops against every peer that is installed: a table, a CSV and a plot.

    Args:
        ops: The ops to time; all of them when not given.
        peers: What to time them against; every peer when not given. One that is not installed is named as missing.
        out: Folder to write the CSV and the plot to.
        device: auto, cpu or cuda. On a CPU the ops are their torch references, and the results say so.
        dtype: auto, bf16, fp16 or fp32; auto is bf16 on a GPU and fp32 on a CPU.
        quick: The main shapes only, each for a shorter time.
        base: A git revision whose kernels are one more contender, for example HEAD~1.
        json: JSON file for the figures, besides the CSV.
    """
    import importlib.util

    from mvlm.errors import ConfigError

    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("bench: wanted matplotlib, which is not installed; pip install 'mvlm[bench]'")
    from mvlm_benchmarks import kernels

    for path in kernels.run(ops, peers, out, device, dtype, quick, base, json):
        print(path)


def doctor(
    *,
    preset: str = "tiny",
    data: Path | None = None,
    out: Path = Path("runs"),
    batch_size: int | None = None,
    device: str = "auto",
) -> None:
    """Say what this machine can do, what it cannot and why; with shards also how fast it would train.

    The exit code is 0, or 1 when a line is red.

    Args:
        preset: The preset whose memory and speed are tried.
        data: Folder of shards.
        out: Where runs would be written.
        batch_size: Pairs a step; the preset's own when not given.
        device: auto, cpu or cuda.
    """
    from mvlm.doctor import examine

    states = []
    for finding in examine(preset, data, out, batch_size, device):
        states.append(finding.state)
        print(f"{finding.state:<6} {finding.name:<18} {finding.text}", flush=True)
    if "red" in states:
        sys.exit(1)


def export(run: Path, out: Path, /) -> None:
    """Write a trained model as one portable folder: model.safetensors, config.json, tokenizer.json.

    Args:
        run: A run folder or one of its checkpoints. Its averaged weights are taken where it kept them.
        out: A new or empty folder.
    """
    from mvlm.checkpoint import export as write

    write(run, out)
    print(out)


def bench_step(
    *,
    preset: str = "tiny",
    batch: int = 64,
    rounds: int = 10,
    contenders: tuple[str, ...] = (),
    device: str = "auto",
    precision: str = "auto",
    threads: int = 0,
    optimizer: bool = True,
    json: Path | None = None,
    csv: Path | None = None,
    plot: Path | None = None,
    profile: Path | None = None,
) -> None:
    """Time a pretraining step against what a user would put together from timm, transformers and torch.

    Args:
        preset: Sizes of the model: tiny, small or base, with post-norm cross-modality blocks, which the others have.
        batch: Pairs a step.
        rounds: Steps of each contender, which take turns.
        contenders: Who takes part; everyone when not given.
        device: auto, cpu or cuda.
        precision: auto, bf16 or fp32; auto is bf16 autocast where the processor computes in bf16.
        threads: CPU threads; 0 for torch's own choice.
        optimizer: Whether a step includes AdamW, which needs memory for every contender.
        json: JSON file for the figures.
        csv: CSV file for the same.
        plot: SVG, PNG or PDF file for a chart of speed and memory.
        profile: Folder for a profile of one step each: a table on the console, a chart, traces for ui.perfetto.dev.
    """
    import importlib.util

    from mvlm.errors import ConfigError

    for package in ("matplotlib", "timm", "transformers"):
        if importlib.util.find_spec(package) is None:
            raise ConfigError(f"bench: wanted {package}, which is not installed; pip install 'mvlm[bench]'")
    from mvlm_benchmarks import step

    step.run(
        preset, batch, rounds, contenders, device=device, precision=precision, threads=threads, optimizer=optimizer,
        json=json, csv=csv, plot=plot, profile=profile,
    )  # fmt: skip


def bench_data(
    *,
    data: Path = Path("data/photos"),
    pictures: int = 3000,
    contenders: tuple[str, ...] = (),
    recipes: tuple[str, ...] = (),
    rounds: int = 7,
    batches: int = 8,
    batch: int = 64,
    size: int = 224,
    soak: int = 0,
    start: int = 0,
    step: Path | None = None,
    out: Path = Path("benchmarks/results"),
    json: Path | None = None,
) -> None:
    """Time the loader against others on the same shards, with no model: a table, stages, a CSV.

    Args:
        data: Folder of shards. If there is none, photographs are built there from scikit-image and scikit-learn.
        pictures: How many of them.
        contenders: ours, pil, decode_jpeg, webdataset+pil, webdataset+simplejpeg; all when not given.
        recipes: crop, crop+randaug; both when not given.
        rounds: Rounds in which every contender has a turn.
        batches: Batches of a turn.
        batch: Pictures of a batch.
        size: Side of the squares.
        soak: Samples to load while memory is watched; 0 does not.
        start: Samples of an index whose first batch is waited for; 0 does not.
        step: What `mvlm bench step --json` wrote: is the loader fast enough for that step?
        out: Folder to write the CSV to.
        json: JSON file for the figures, besides the CSV.
    """
    import importlib.util

    from mvlm.errors import ConfigError

    if importlib.util.find_spec("torchvision") is None:
        raise ConfigError("bench: wanted torchvision, which is not installed; pip install 'mvlm[bench]'")
    from mvlm_benchmarks import data as bench

    turns = (rounds, batches, batch, size)
    for path in bench.run(data, pictures, out, contenders, recipes, *turns, soak, start, step, json):
        print(path)


def pretrain(arguments: Sequence[str]) -> None:
    """Pretrain a MaskVLM: `mvlm pretrain PRESET --data SHARDS --out RUN`, PRESET one of tiny, small, base.

    `mvlm pretrain --config FILE --out RUN` repeats the run whose config.json FILE is; other settings override it.
    """
    import tyro

    from mvlm.config import PRESETS, pretrain_defaults, read_config, run_config
    from mvlm.errors import ConfigError

    first = arguments[0] if arguments else ""
    if first in ("-h", "--help"):
        print(f"{pretrain.__doc__}\nThe settings of a preset: mvlm pretrain PRESET --help")
        return
    if first == "--config" and len(arguments) > 1:
        defaults, source, rest = run_config(read_config(Path(arguments[1])), arguments[1]), arguments[1], arguments[2:]
    elif first.startswith("-") or not first:
        raise ConfigError(
            f"wanted a preset after `mvlm pretrain`: {', '.join(PRESETS)}, or --config FILE; got {first or 'nothing'!r}"
        )
    else:
        defaults, source, rest = pretrain_defaults(first, data=tyro.MISSING, out=tyro.MISSING), first, arguments[1:]
    config = tyro.cli(
        type(defaults),
        prog=f"mvlm pretrain {source}",
        description=f"Pretrain as {source} says; the values shown are its own.",
        default=defaults,
        args=list(rest),
    )
    from mvlm.train import pretrain as run

    run(config)


def plan(
    *,
    gpus: tuple[str, ...],
    data: str,
    preset: str = "base",
    gpu: str = "H100",
    batch_size: int = 0,
    epochs: float = 1.0,
    accumulate: int = 1,
    checkpoint_activations: bool = False,
    local_negatives: bool = False,
    parallel: str = "ddp",
    mfu: float = 0.4,
    loader_rate: float = 0.0,
) -> None:
    """Memory, time and traffic of a run on many GPUs, counted from the code and from stated rates: no GPU is needed.

    Args:
        gpus: GPUs a node x nodes, for example 8 x 16.
        data: Pairs of the data set, for example 400M.
        preset: Sizes of the model: tiny, small or base.
        gpu: A100, H100, H200 or B200.
        batch_size: Pairs of the global batch; 0 for 128 a GPU.
        epochs: How often the data are seen.
        accumulate: Microbatches a step on each GPU.
        checkpoint_activations: Compute what is inside a block again in backward.
        local_negatives: Draw ITM's negatives within a microbatch.
        parallel: ddp or fsdp.
        mfu: Share of the peak rate that the step's matrix products reach; measure it with `mvlm bench step`.
        loader_rate: Pairs a second that the loader of a node was measured to give; 0 for not measured.
    """
    from mvlm.config import MaskVLMConfig
    from mvlm.errors import ConfigError
    from mvlm.plan import MACHINES, Setting, parse_count, parse_gpus, report

    if gpu not in MACHINES or parallel not in ("ddp", "fsdp") or not 0 < mfu <= 1 or accumulate < 1 or batch_size < 0:
        raise ConfigError(
            f"plan: wanted --gpu one of {', '.join(MACHINES)}, --parallel ddp or fsdp, --mfu in (0, 1], --accumulate "
            f"at least 1, --batch-size at least 0; got {gpu}, {parallel}, {mfu}, {accumulate}, {batch_size}"
        )
    per_node, nodes = parse_gpus(gpus)
    setting = Setting(
        model=MaskVLMConfig.preset(preset),
        gpu=gpu,
        per_node=per_node,
        nodes=nodes,
        batch_size=batch_size or 128 * per_node * nodes,
        accumulate=accumulate,
        checkpointed=checkpoint_activations,
        local_negatives=local_negatives,
        split=parallel == "fsdp",
        mfu=mfu,
    )
    print(report(setting, parse_count(data), epochs, loader_rate))


COMMANDS: dict[str, Callable[..., None]] = {
    "data emoji": data_emoji,
    "data coco": data_commands.coco,
    "data flickr30k": data_commands.flickr30k,
    "data visual-genome": data_commands.visual_genome,
    "data cc3m": data_commands.cc3m,
    "data sbu": data_commands.sbu,
    "data folder": data_commands.folder,
    "data webdataset": data_commands.webdataset,
    "data huggingface": data_commands.huggingface,
    "data check": data_commands.check,
    "data index": data_commands.index,
    "data view": data_commands.view,
    "pretrain": pretrain,
    "plan": plan,
    "eval retrieval": eval_retrieval,
    "reconstruct": reconstruct,
    "fill": fill,
    "report": report,
    "export": export,
    "doctor": doctor,
    "bench kernels": bench_kernels,
    "bench step": bench_step,
    "bench data": bench_data,
}


def usage() -> str:
    """The list of commands."""
    lines = [f"  mvlm {name:<18} {(command.__doc__ or '').splitlines()[0]}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "mvlm: fast pretraining of masked vision-and-language models",
            "",
            *lines,
            "",
            "mvlm COMMAND --help tells more.",
        ]
    )


def run_command(arguments: Sequence[str]) -> None:
    """Find the command that the arguments begin with and run it. ConfigError when there is none."""
    import tyro

    from mvlm.errors import ConfigError

    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage())
        return
    for words in (2, 1):
        name = " ".join(arguments[:words])
        if name in COMMANDS:
            rest = arguments[words:]
            if name == "pretrain":
                pretrain(rest)
            else:
                # A group of settings is no prefix: --min-side, not --settings.min-side.
                tyro.cli(COMMANDS[name], prog=f"mvlm {name}", args=list(rest), config=(tyro.conf.OmitArgPrefixes,))
            return
    within = [name for name in COMMANDS if name.startswith(arguments[0] + " ")]
    typed = " ".join(arguments[: 2 if within else 1])
    near = difflib.get_close_matches(typed, COMMANDS, 1)
    hint = f"did you mean `mvlm {near[0]}`?" if near else f"wanted one of: {', '.join(within or COMMANDS)}"
    raise ConfigError(f"unknown command {typed!r}; {hint}")


def main() -> None:
    """Entry point: user errors on one line with exit code 2, a stopped run with 1."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    from mvlm.errors import ConfigError, LostRankError, NonFiniteLossError, RunError
    from mvlm_dataloading.errors import DataError

    try:
        run_command(sys.argv[1:])
    except (ConfigError, RunError, DataError) as error:
        print(f"mvlm: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        print(f"mvlm: wanted room to write, found none ({error}); free some space and try again", file=sys.stderr)
        sys.exit(2)
    except (NonFiniteLossError, LostRankError) as error:
        print(f"mvlm: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("mvlm: interrupted", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
