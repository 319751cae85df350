"""`mvlm embed` and `mvlm export`: what a trained model gives to others, embeddings and itself."""

from pathlib import Path

# Commands import what they need when they run, so that --help and errors are immediate.


def embed(
    data: Path,
    out: Path,
    /,
    *,
    checkpoint: Path,
    splits: tuple[str, ...] = (),
    device: str = "auto",
    precision: str = "auto",
) -> None:
    """Embed all images and captions of a data set or of a folder of images, as Parquet files.

    The same command again continues after a kill. `torchrun ... -m mvlm embed` shares the work among ranks; the files
    are the same.

    Args:
        data: Folder of shards, or any folder of images (captions of a.jpg are the lines of a.txt beside it).
        out: New or empty folder for images.parquet, texts.parquet and embedding.json.
        checkpoint: Run folder, one of its checkpoints, or exported folder.
        splits: Splits of a data set to embed. Default: all.
        device: auto, cpu or cuda.
        precision: auto, bf16 or fp32.
    """
    from mvlm.distributed.coordination import run_on_all_ranks
    from mvlm.distributed.world import join_ranks
    from mvlm.runs.load import load_model
    from mvlm.search.collection import open_collection
    from mvlm.search.embed import embed as write

    world = join_ranks(device)
    model = run_on_all_ranks(world, lambda: load_model(checkpoint, world.device, precision))
    collection = run_on_all_ranks(world, lambda: open_collection(data, list(splits)))
    found = write(model, collection, out, world, str(checkpoint))
    if world.first:
        print(f"{out}: {found['images']:,} images and {found['texts']:,} texts, {found['rejected']} images left out")
    world.close()


def export(run: Path, out: Path, /) -> None:
    """Write a trained model as one portable folder: model.safetensors, config.json, tokenizer.json.

    Args:
        run: Run folder, or one of its checkpoints. If the run kept averaged weights (--ema-decay), they are exported.
        out: New or empty folder.
    """
    from mvlm.runs.load import export as write

    write(run, out)
    print(out)
