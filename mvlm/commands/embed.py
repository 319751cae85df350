"""`mvlm embed` and `mvlm export`: embeddings of a collection as files, and a trained model as a portable folder."""

from pathlib import Path
from typing import Literal

from mvlm.terminal import say

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
    """Embed the images and captions of a data set or a folder, as Parquet files.

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
    from mvlm.distributed.coordination import joined_ranks, run_on_all_ranks
    from mvlm.runs.load import load_without_head
    from mvlm.search.collection import open_collection
    from mvlm.search.embed import embed as write

    with joined_ranks(device) as world:
        model = run_on_all_ranks(world, lambda: load_without_head(checkpoint, world.device, precision))
        collection = run_on_all_ranks(world, lambda: open_collection(data, list(splits)))
        found = write(model, collection, out, world, str(checkpoint.resolve()))
        if world.first:
            counts = f"{found['images']:,} images and {found['texts']:,} texts, {found['rejected']} images left out"
            say(f"{out}: {counts}")


def export(
    run: Path,
    out: Path,
    /,
    *,
    format: Literal["safetensors", "pt2", "onnx", "hub"] = "safetensors",
    push_to: str | None = None,
    private: bool = False,
    dry_run: bool = False,
    data: Path | None = None,
    mix: float | None = None,
) -> None:
    """Write a trained model as one portable folder.

    It is for mvlm, for another runtime, or for the Hugging Face hub.
    If the run kept averaged weights (--ema-decay), they are exported.

    Args:
        run: Run folder, or one of its checkpoints.
        out: New or empty folder.
        format: safetensors: model.safetensors, config.json, tokenizer.json. pt2: torch.export programs of both encoders
            and of the matching head, with tokenizer.json and preprocess.json. onnx: the same as ONNX. hub: as
            safetensors, with a model card.
        push_to: Id OWNER/NAME on the hub to upload to, after the folder is written; with --format hub.
        private: Make the repository private if it is new.
        dry_run: Write the folder for --push-to and upload nothing.
        data: Folder of the training data, for the card, if it is no longer where the run's config.json says.
        mix: Share of the run in a mean of its weights and those of the model that it started from (WiSE-FT), such as
            0.5. Default: the run alone.
    """
    from mvlm.errors import ConfigError

    if format != "hub":
        given = {"--push-to": push_to, "--private": private, "--dry-run": dry_run, "--data": data}
        wrong = [flag for flag, value in given.items() if value]
        if wrong:
            raise ConfigError(f"{wrong[0]}: wanted --format hub beside it, got --format {format}; change one of them")
    elif mix is not None:
        raise ConfigError("mix: wanted another --format than hub, whose card describes the run; leave one of them out")
    from mvlm.runs.load import load_without_head, mix_with_start

    model = load_without_head(run, "cpu")
    if mix is not None:
        mix_with_start(model.network, run, mix)
    if format == "safetensors":
        model.save(out)
    else:
        for name, difference in model.export(out, format, hub_id=push_to, data=data).items():
            say(f"{name}: largest difference from the network {difference:.1e}")
    if push_to is not None and not dry_run:
        from mvlm.portable.hub import upload

        say(upload(out, push_to, private))
    say(out)
