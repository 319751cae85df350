"""`mvlm export`: a trained model as a portable folder."""

from pathlib import Path

# A command imports what it needs when it runs, so that --help and mistakes answer at once.


def export(run: Path, out: Path, /) -> None:
    """Write a trained model as one portable folder: model.safetensors, config.json, tokenizer.json.

    Args:
        run: A run folder or one of its checkpoints. Its averaged weights are taken where it kept them.
        out: A new or empty folder.
    """
    from mvlm.runs.load import export as write

    write(run, out)
    print(out)
