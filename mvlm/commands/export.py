"""`mvlm export`: a trained model as a portable folder."""

from pathlib import Path

# Commands import what they need when they run, so that --help and errors are immediate.


def export(run: Path, out: Path, /) -> None:
    """Write a trained model as one portable folder: model.safetensors, config.json, tokenizer.json.

    Args:
        run: Run folder, or one of its checkpoints. If the run kept averaged weights (--ema-decay), they are exported.
        out: New or empty folder.
    """
    from mvlm.runs.load import export as write

    write(run, out)
    print(out)
