"""The commands that use a trained model or look at a run, a plan or this machine."""

import math
import sys
from pathlib import Path

# A command imports what it needs when it runs, so that --help and mistakes answer at once.


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
        checkpoint: A run folder, one of its checkpoints, or an exported folder.
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
    figures = {"checkpoint": str(checkpoint), "data": str(data), "split": split, **figures}
    print(format_table(figures))
    if out is not None:
        write_json(out, figures)


def reconstruct(
    *, checkpoint: Path, image: Path, caption: str, out: Path, wrong_caption: str | None = None, seed: int = 0
) -> None:
    """Mask a picture and rebuild it from what is left and from a caption.

    Args:
        checkpoint: A run folder, one of its checkpoints, or an exported folder.
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
    from mvlm.errors import ConfigError
    from mvlm_dataloading import draw_patch_masks

    if out.suffix.lower() != ".png" or out.is_dir():
        raise ConfigError(f"out: wanted a .png file to write, got {out}")
    if out.exists() and out.samefile(image):
        raise ConfigError(f"out: wanted another file than the picture itself, got {out} for both")
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
        checkpoint: A run folder, one of its checkpoints, or an exported folder.
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
        data: Folder of shards; the one it was evaluated on when not given. A comparison needs none.
        out: The file to write; report.html, or compare.html, in the (first) run folder when not given.
    """
    if others:
        from mvlm.compare import write_comparison

        print(write_comparison([run, *others], out or run / "compare.html"))
        return
    from mvlm.report import write_report

    print(write_report(run, data, out))


def export(run: Path, out: Path, /) -> None:
    """Write a trained model as one portable folder: model.safetensors, config.json, tokenizer.json.

    Args:
        run: A run folder or one of its checkpoints. Its averaged weights are taken where it kept them.
        out: A new or empty folder.
    """
    from mvlm.checkpoint import export as write

    write(run, out)
    print(out)


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
    if not 0 < epochs < math.inf or not 0 <= loader_rate < math.inf:
        raise ConfigError(f"plan: wanted --epochs above 0 and --loader-rate at least 0, got {epochs} and {loader_rate}")
    print(report(setting, parse_count(data), epochs, loader_rate))
