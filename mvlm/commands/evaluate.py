"""`mvlm eval retrieval` and `mvlm score`: evaluation of a trained model, and of a file of predictions."""

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

    The same command again continues after a kill. `torchrun ... -m mvlm eval retrieval` shares the work among ranks;
    the figures are the same.

    Args:
        checkpoint: Run folder, one of its checkpoints, or exported folder.
        data: Folder of shards. A train split, if present, is used for the median-image baseline and to find images of
            unseen concepts.
        split: Split to evaluate on.
        out: JSON file for the figures. Until they are there, the folder OUT.parts beside it holds the work, on a disk
            that all ranks see. Default: print them only; one rank, which begins anew after a kill.
        rerank: Candidates of each query for ITM to re-rank.
        device: auto, cpu or cuda.
    """
    from mvlm.distributed.coordination import run_on_all_ranks
    from mvlm.distributed.world import join_ranks
    from mvlm.errors import ConfigError
    from mvlm.evaluation.evaluate import evaluate
    from mvlm.evaluation.table import format_table
    from mvlm.evaluation.workspace import open_workspace
    from mvlm.files import write_json
    from mvlm.runs.load import load_model
    from mvlm_dataloading import open_dataset

    if rerank < 1:
        raise ConfigError(f"rerank: wanted at least 1, got {rerank}")
    world = join_ranks(device)
    if out is None and world.size > 1:
        raise ConfigError("out: wanted a file, beside which the ranks share their work, found none; add --out FILE")
    model = run_on_all_ranks(world, lambda: load_model(checkpoint, world.device))
    dataset = run_on_all_ranks(world, lambda: open_dataset(data, split))
    train = open_dataset(data, "train") if "train" in dataset.splits else None
    plan = {
        "model": model.sha256,
        "data": [dataset.fingerprint, None if train is None else train.fingerprint],
        "rerank": rerank,
        "device": world.device.type,
    }
    folder = None if out is None else out.with_name(f"{out.name}.parts")
    with open_workspace(folder, plan, world) as workspace:
        figures = evaluate(model.network, dataset, train, model.tokenizer, rerank, workspace=workspace)
        figures = {"checkpoint": str(checkpoint), "data": str(data), "split": split, **figures}
        if world.first and out is not None:
            write_json(out, figures)
    if world.first:
        print(format_table(figures))
    world.close()


def score(
    task: str, predictions: Path, references: Path, /, other: Path | None = None, out: Path | None = None
) -> None:
    """Score predictions of any model by a task's official metric. It needs no model and no torch.

    Args:
        task: vqa, pairs, entailment, recognition, caption or grounding.
        predictions: File of predictions: vqa and caption, the JSON list that the servers take; pairs, CSV rows
            `identifier,prediction`; entailment, JSON lines {pairID, label}; recognition, {id, label}; grounding,
            {id, x, y} in pixels.
        references: File of the data set: VQA annotations; NLVR2's, SNLI-VE's JSON lines; recognition, JSON lines
            {id, label}; COCO caption annotations; grounding, JSON lines {id, box [x, y, width, height], size}.
        other: Another model's predictions: adds the paired difference, its interval and McNemar's p-value.
        out: JSON file for the figures. Default: print them only.
    """
    import json

    from mvlm.tasks.score import score

    text = json.dumps(score(task, predictions, references, other), indent=1)
    print(text)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(text + "\n")
