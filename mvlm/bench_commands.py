"""The commands `mvlm bench ...`."""

from pathlib import Path

# A command imports what it needs when it runs, so that --help and mistakes answer at once.


def kernels(
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
    from mvlm_benchmarks.kernels import run as bench

    for path in bench.run(ops, peers, out, device, dtype, quick, base, json):
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
    from mvlm_benchmarks.step import run as bench

    bench.run(
        preset, batch, rounds, contenders, device=device, precision=precision, threads=threads, optimizer=optimizer,
        json=json, csv=csv, plot=plot, profile=profile,
    )  # fmt: skip


def data(
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
    from mvlm_benchmarks.data import run as bench

    turns = (rounds, batches, batch, size)
    for path in bench.run(data, pictures, out, contenders, recipes, *turns, soak, start, step, json):
        print(path)
