"""Verdicts of a report: what counts as the right answer of a question."""

from pathlib import Path

from mvlm.report.verdicts import confusion, majority
from mvlm.tasks.vqa import VisualQuestionAnswering
from mvlm_dataloading import ShardWriter, open_dataset
from support.scenes import png, scene


def test_answers_on_which_all_agree_are_labels_as_they_were_written(tmp_path: Path) -> None:
    """The metric compares "two" with "two" if all wrote it, and with "2" if they differ."""
    given = [["two"] * 10, ["two"] * 10, ["two"] * 9 + ["three"]]
    with ShardWriter(
        tmp_path / "data", name="questions", source="tests", licence="CC0", attribution="", recipe={}
    ) as writer:
        for i, answers in enumerate(given):
            rows = [{"answer": answer, "answer_id": k} for k, answer in enumerate(answers)]
            known = {"question_id": i, "answers": rows}
            assert writer.add(f"test{i}", png(scene(i)[0]), ["how many?"], known, split="test") is None
    dataset = open_dataset(tmp_path / "data", "test")
    records = [{"sample": 0, "answer": "two"}, {"sample": 1, "answer": "two"}, {"sample": 2, "answer": "2"}]
    verdicts = VisualQuestionAnswering.judge(records, dataset)
    assert [(v.label, v.score) for v in verdicts] == [("two", 100), ("two", 100), ("2", 100)]
    table = confusion(verdicts)
    assert table is not None
    assert (table.labels, table.counts) == (["two", "2"], [[2, 0], [0, 1]])
    # "two" is normalised to "2" where annotators differ.
    assert majority(VisualQuestionAnswering, records, dataset) == 100
