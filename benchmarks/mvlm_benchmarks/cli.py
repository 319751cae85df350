"""The commands `mvlm bench ...`. `mvlm` finds this module by its name (`mvlm/commands/bench.py`)."""

import difflib
import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path

from mvlm.commands.arguments import check_no_input, check_replaced, deferred, parse, read_json
from mvlm.errors import ConfigError

# Commands import what they need when they run, so that --help and errors are immediate.


def kernels(
    *,
    ops: tuple[str, ...] = (),
    peers: tuple[str, ...] = (),
    out: Path | None = None,
    device: str = "auto",
    dtype: str = "auto",
    quick: bool = False,
    seconds: float | None = None,
    json: Path | None = None,
) -> None:
    """Time the kernels against other implementations of the same ops.

    Args:
        ops: Ops to time. Default: all.
        peers: Implementations to compare with. Default: all. Those not installed are listed as missing.
        out: Folder for a CSV and a plot. Default: nothing is written.
        device: auto, cpu or cuda. On a CPU, the torch references are timed instead of the kernels, and the results say
            so.
        dtype: auto, bf16, fp16 or fp32. auto is bf16 on a GPU and fp32 on a CPU.
        quick: Time only the core shapes, in one short round.
        seconds: Start no new case that would end later; on a CPU, break off what does not fit. Cases are timed in the
            order of their importance.
        json: JSON file for the figures.
    """
    _require("matplotlib")
    _check_outputs(folder=out, json=json)
    from mvlm_benchmarks.kernels import run as bench

    for path in bench.run(ops, peers, out, device, dtype, quick, json, seconds):
        print(path)


def step(
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
    seconds: float | None = None,
) -> None:
    """Time a pretraining step against the same model built from timm, transformers and torch.

    Args:
        preset: tiny, small or base. Runs with `cross_norm="post"`, because the baselines are post-norm.
        batch: Pairs per step.
        rounds: Rounds. Each contender makes one step per round.
        contenders: Contenders to time. Default: all.
        device: auto, cpu or cuda.
        precision: auto, bf16 or fp32. auto is bf16 autocast if the processor has fast bf16.
        threads: CPU threads. 0: torch's default.
        optimizer: Include AdamW in the step. Needs memory for the moments of every contender.
        json: JSON file for the figures.
        csv: CSV file for the figures. Every timed step is written to NAME.rounds.csv beside it, as soon as it is timed.
        plot: SVG, PNG or PDF file for a chart of speed and memory.
        seconds: Start no new round that would end later.
    """
    _require("matplotlib", "timm", "transformers")
    _check_outputs(json=json, csv=csv, plot=plot)
    if csv is not None:
        _check_outputs(csv=csv.with_name(f"{csv.stem}.rounds.csv"))
    from mvlm_benchmarks.step import run as bench

    bench.run(
        preset, batch, rounds, contenders, device=device, precision=precision, threads=threads, optimizer=optimizer,
        json=json, csv=csv, plot=plot, seconds=seconds,
    )  # fmt: skip


def data(
    *,
    data: Path | None = None,
    images: int = 3000,
    contenders: tuple[str, ...] = (),
    recipes: tuple[str, ...] = (),
    rounds: int = 7,
    batches: int = 8,
    batch: int = 64,
    size: int = 224,
    threads: int = 2,
    soak: int = 0,
    start: int = 0,
    step: Path | None = None,
    out: Path = Path("build/bench"),
    json: Path | None = None,
) -> None:
    """Time the data loader against other loaders on the same shards, without a model.

    Args:
        data: Folder of shards, or URL of an index of linked tars, with what `python -m mvlm_benchmarks.data.peers` puts
            beside it. Default: data/photos, of scikit-image's and scikit-learn's photographs, which is built.
        images: Images of the photographs, if they are built.
        contenders: ours, ours+kept, pil, decode_jpeg, webdataset+pil, webdataset+simplejpeg, litdata,
            mosaicml-streaming. Default: all.
        recipes: crop, crop+randaug. Default: both.
        rounds: Rounds. Each contender has one turn per round.
        batches: Batches per turn.
        batch: Images per batch.
        size: Side of the resized images in pixels.
        threads: Threads, or workers, of each contender.
        soak: Samples to load while memory is recorded. 0: no soak.
        start: Samples in a made-up index, to time the first batch of a large data set. 0: not timed.
        step: JSON file of `mvlm bench step`, to compare the loader's speed with the step's.
        out: Folder for the CSV.
        json: JSON file for the figures.
    """
    _require("torchvision")
    _check_outputs(folder=out, json=json)
    from mvlm_benchmarks.data import run as bench

    turns = (rounds, batches, batch, size, threads)
    for path in bench.run(data, images, out, contenders, recipes, *turns, soak, start, step, json):
        print(path)


def run(
    *,
    preset: str = "tiny",
    data: Path = Path("data/emoji"),
    rounds: int = 10,
    steps: int = 8,
    eval_every_steps: int = 200,
    threads: int = 0,
    json: Path | None = None,
    csv: Path | None = None,
) -> None:
    """Time the training loop against the bare step, in one process.

    Args:
        preset: tiny, small or base. The recipe of `mvlm pretrain PRESET`.
        data: Folder of shards with the splits train and validation, such as the demo's.
        rounds: Rounds. Each contender has one turn per round.
        steps: Steps per turn.
        eval_every_steps: Steps between evaluations, for their share of the run's time. The default is the demo's.
        threads: CPU threads. 0: torch's default.
        json: JSON file for the figures.
        csv: CSV file for the figures.
    """
    _check_outputs(json=json, csv=csv)
    from mvlm_benchmarks.run import run as bench

    bench.run(preset, data, rounds, steps, eval_every_steps=eval_every_steps, threads=threads, json=json, csv=csv)


def _check_outputs(
    *, folder: Path | None = None, json: Path | None = None, csv: Path | None = None, plot: Path | None = None
) -> None:
    """ConfigError, before anything is timed, if a result could not be written or would replace another file."""

    def is_result(content: bytes) -> bool:
        found = read_json(content)
        return isinstance(found, dict) and {"machine", "rows"} <= set(found)

    def is_table(content: bytes) -> bool:
        return {b"figures", b"device"} <= set(content.split(b"\n", 1)[0].strip().split(b","))

    if folder is not None and folder.exists() and not folder.is_dir():
        raise ConfigError(f"wanted a folder for the results, got the file {folder}; name another one")
    check_replaced(json, "earlier figures of a bench", is_result, "json")
    check_replaced(csv, "an earlier table of a bench", is_table, "csv")
    check_no_input(csv, json, flag="csv")
    check_no_input(plot, json, csv, flag="plot")
    for file in (json, csv, plot):
        if file is not None and not next(path for path in file.absolute().parents if path.exists()).is_dir():
            raise ConfigError(f"wanted a file in a folder for the results, got {file}; name another one")
    if plot is not None and (plot.is_dir() or plot.suffix.lower() not in (".svg", ".png", ".pdf")):
        raise ConfigError(f"plot: wanted a file that ends in .svg, .png or .pdf, got {plot}")


def _require(*packages: str) -> None:
    """ConfigError if a package of the extra `bench` is not installed."""
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise ConfigError(f"bench: wanted {package}, which is not installed; pip install 'mvlm[bench]'")


COMMANDS: dict[str, Callable[..., None]] = {"kernels": kernels, "step": step, "data": data, "run": run}


def main(words: Sequence[str]) -> None:
    """Run the benchmark that the words name, with their arguments. ConfigError if there is none of that name."""
    name = words[0] if words else ""
    if name in ("-h", "--help"):
        width = max(map(len, COMMANDS))
        print("Benchmarks")
        for name, command in COMMANDS.items():
            print(f"  mvlm bench {name:<{width}}  {(command.__doc__ or '').splitlines()[0]}")
        print("\nmvlm bench NAME --help describes one.")
        return
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, 1)
        wanted = ", ".join(f"bench {name}" for name in COMMANDS)
        hint = f"did you mean `mvlm bench {near[0]}`?" if near else f"wanted one of: {wanted}"
        raise ConfigError(f"unknown command {f'bench {name}'.rstrip()!r}; {hint}")
    parse(deferred(COMMANDS[name]), words[1:], prog=f"mvlm bench {name}")()
