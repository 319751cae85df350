"""`mvlm score`: figures of a file of predictions against a file of references."""

from pathlib import Path

# Commands import what they need when they run, so that --help and errors are immediate.


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
