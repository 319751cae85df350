"""`mvlm eval`: figures of a trained model on a data set."""

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
    from mvlm.device import choose_device
    from mvlm.errors import ConfigError
    from mvlm.evaluation import evaluate
    from mvlm.evaluation.table import format_table
    from mvlm.files import write_json
    from mvlm.runs.load import load_model
    from mvlm_dataloading import open_dataset

    if rerank < 1:
        raise ConfigError(f"rerank: wanted at least 1, got {rerank}")
    model, tokenizer = load_model(checkpoint, choose_device(device))
    figures = evaluate(model, open_dataset(data, split), open_dataset(data, "train"), tokenizer, rerank)
    figures = {"checkpoint": str(checkpoint), "data": str(data), "split": split, **figures}
    print(format_table(figures))
    if out is not None:
        write_json(out, figures)
