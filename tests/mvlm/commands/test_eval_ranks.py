"""`mvlm eval` on several ranks: all evaluate the same model and data, and a mistake is one line."""

from pathlib import Path

import pytest

from mvlm.runs.checkpoint import checkpoints
from mvlm.tasks.finetune import finetune
from support.questions import finetune_config, write_questions

CPU = ("--device", "cpu")
KILLED = """
import os
from mvlm.tasks.vqa import VisualQuestionAnswering

class Killed(VisualQuestionAnswering):
    def predict(self, batch, plan):
        if os.environ["RANK"] == "1":
            os.kill(os.getpid(), 9)
        return super().predict(batch, plan)
"""
"""A task whose second rank is killed at its first batch."""


@pytest.fixture(scope="module")
def three_batches(tmp_path_factory) -> Path:
    """Three batches of questions. Read only."""
    return write_questions(tmp_path_factory.mktemp("questions") / "data", {"train": 16, "test": 130})


@pytest.fixture(scope="module")
def tuned(trained, three_batches, tmp_path_factory) -> Path:
    """A fine-tuned run with a checkpoint after each of its two steps. Read only."""
    config = finetune_config(
        trained, three_batches, tmp_path_factory.mktemp("tuned") / "run", checkpoint_every_steps=1, keep_checkpoints=2
    )
    finetune(config)
    return config.out


def each(folder: Path, name: str, *targets: Path) -> str:
    """A path of each rank's own, which leads to its target: "{rank}" in words of `on_ranks` is its number."""
    folder.mkdir(exist_ok=True)
    for rank, target in enumerate(targets):
        (folder / f"{name}{rank}").symlink_to(target)
    return f"{folder}/{name}{{rank}}"


def refusal(outcome: tuple[list[int], str]) -> str:
    """The one line on which both ranks ended, with code 2."""
    codes, errors = outcome
    lines = [line for line in errors.splitlines() if line.startswith("mvlm: ") or "Error" in line]
    assert codes == [2, 2], errors
    assert len(lines) == 1, errors
    return lines[0]


@pytest.mark.slow
@pytest.mark.parametrize("task, what", [("vqa", "model"), ("retrieval", "model"), ("retrieval", "data")])
def test_ranks_with_other_models_or_data_are_refused(tuned, three_batches, tmp_path, on_ranks, what, task):
    """A run that still trains has another newest checkpoint for a rank that looks later."""
    first, second = checkpoints(tuned / "checkpoints")
    other = write_questions(tmp_path / "other", {"train": 16, "test": 129})
    run = each(tmp_path / "own", "run", first, second) if what == "model" else str(second)
    data = each(tmp_path / "own", "data", three_batches, other) if what == "data" else str(three_batches)
    out = tmp_path / "out.json"
    line = refusal(on_ranks(2, "eval", task, "--checkpoint", run, "--data", data, "--out", out, *CPU))
    assert line.startswith(f"mvlm: rank 1 was started with other settings or data than rank 0 ({what}: rank 0 has ")
    assert line.endswith("on machines of one kind; name one of the checkpoints of a run that still trains")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "own"]


@pytest.mark.slow
def test_ranks_with_other_options_are_refused(tuned, trained, three_batches, tmp_path, on_ranks):
    rerank = ("--rerank", "{rank}", "--out", tmp_path / "out.json")
    found = refusal(on_ranks(2, "eval", "retrieval", "--checkpoint", trained, "--data", three_batches, *CPU, *rerank))
    assert "(rerank: rank 0 has 0, rank 1 has 1); start all ranks with the same command" in found
    assert not (tmp_path / "out.json").exists()


@pytest.mark.parametrize("task, rank", [("vqa", 0), ("retrieval", 1)])
def test_a_mistake_on_one_rank_is_one_line(tuned, three_batches, tmp_path, on_ranks, rank, task):
    """The data are missing on the machine of one rank."""
    places = [three_batches, tmp_path / "nothing"]
    data = each(tmp_path / "own", "data", *(places if rank == 1 else places[::-1]))
    words = ["eval", task, "--checkpoint", tuned, *CPU, "--out", tmp_path / "out.json"]
    start = "mvlm: rank 1: " if rank == 1 else "mvlm: "
    line = refusal(on_ranks(2, *words, "--data", data))
    assert line.startswith(f"{start}{tmp_path}/own/data{rank}: wanted a data folder, found none")
    assert not (tmp_path / "out.json").exists()


@pytest.mark.slow
def test_a_killed_rank_ends_the_other_and_a_restart_has_the_figures_of_one(
    tuned, three_batches, tmp_path, on_ranks, run_mvlm
):
    (tmp_path / "killed.py").write_text(KILLED)
    words = ("--checkpoint", tuned, "--data", three_batches, *CPU, "--out")
    codes, errors = on_ranks(2, "eval", tmp_path / "killed.py", *words, tmp_path / "two.json")
    assert codes == [1, -9], errors
    assert "mvlm: rank 0 lost another rank and ends too (" in errors
    assert "Traceback" not in errors
    assert not (tmp_path / "two.json").exists()
    assert on_ranks(2, "eval", "vqa", *words, tmp_path / "two.json")[0] == [0, 0]
    assert run_mvlm("eval", "vqa", *words, tmp_path / "one.json").code == 0
    assert (tmp_path / "two.json").read_bytes() == (tmp_path / "one.json").read_bytes()
