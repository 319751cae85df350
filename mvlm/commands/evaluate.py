"""`mvlm eval`: evaluation of a trained model on a data set."""

from pathlib import Path

# Commands import what they need when they run, so that --help and errors are immediate.


def eval_retrieval(
    *,
    checkpoint: Path,
    data: Path,
    split: str = "test",
    out: Path | None = None,
    rerank: int = 32,
    device: str = "auto",
) -> None:
    """Evaluate a model without training: zero-shot retrieval, by ITC and re-ranked by ITM, and cross-modal gain.

    Args:
        checkpoint: Run folder, one of its checkpoints, or exported folder.
        data: Folder of shards. A train split, if present, is used for the median-image baseline and to find images of
            unseen concepts.
        split: Split to evaluate on.
        out: JSON file for the figures. Default: print them only.
        rerank: Candidates of each query for ITM to re-rank.
        device: auto, cpu or cuda.
    """
    from mvlm.device import choose_device
    from mvlm.errors import ConfigError
    from mvlm.evaluation.evaluate import evaluate
    from mvlm.evaluation.table import format_table
    from mvlm.files import write_json
    from mvlm.runs.load import load_model
    from mvlm_dataloading import open_dataset

    if rerank < 1:
        raise ConfigError(f"rerank: wanted at least 1, got {rerank}")
    model, tokenizer = load_model(checkpoint, choose_device(device))
    dataset = open_dataset(data, split)
    train = open_dataset(data, "train") if "train" in dataset.splits else None
    figures = evaluate(model, dataset, train, tokenizer, rerank)
    figures = {"checkpoint": str(checkpoint), "data": str(data), "split": split, **figures}
    print(format_table(figures))
    if out is not None:
        write_json(out, figures)
