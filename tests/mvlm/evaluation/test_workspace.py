"""Arrays on disk, work shared by ranks, and what an interruption leaves behind."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock

from mvlm.errors import RunError
from mvlm.evaluation.workspace import EvaluationStopped, StoredArray, Workspace, open_workspace
from mvlm_dataloading import DataError


class Rank:
    """One of several ranks, which take turns in this process."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size, self.first = rank, size, rank == 0

    def gather_objects(self, value: Any) -> list[Any]:
        return [value] * self.size


def square(workspace: Workspace, rows: int, size: int, done: list[int]) -> torch.Tensor:
    """Squares of the row numbers, in parts of `size` rows; `done` gets every row that is computed."""
    found = workspace.array("squares", (rows, 2), torch.float64)

    def work(start: int, stop: int) -> Iterator[None]:
        for begin in range(start, stop, size):
            part = range(begin, min(begin + size, stop))
            done.extend(part)
            found.write(begin, torch.tensor([[i, i * i] for i in part], dtype=torch.float64))
            yield

    workspace.share("squares", rows, size, work)
    return found.tensor


SQUARES = torch.tensor([[i, i * i] for i in range(23)], dtype=torch.float64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
@pytest.mark.parametrize("shape", [(7, 3, 2), (5,), (0, 4), (3, 0)])
def test_rows_of_an_array_are_written_and_read(tmp_path, dtype, shape):
    rows = torch.arange(torch.Size(shape).numel()).reshape(shape).to(dtype)
    for path in (None, tmp_path / "array"):
        array = StoredArray(path, shape, dtype)
        array.write(0, rows[:2])
        array.write(3, rows[3:])
        array.sync()
        assert torch.equal(array.tensor[:2], rows[:2])
        assert torch.equal(array.tensor[3:], rows[3:])
        assert not array.tensor[2:3].any()  # not written
        array.close()
        assert torch.equal(array.tensor[3:], rows[3:])


def test_a_full_disk_is_an_error_of_the_system(tmp_path, file_limit):
    with file_limit(1000), pytest.raises(OSError, match="File too large"):
        StoredArray(tmp_path / "array", (1000,), torch.float32).write(0, torch.ones(1000))


@pytest.mark.parametrize("size", [1, 3, 100])
@pytest.mark.parametrize("ranks", [1, 2, 5])
def test_ranks_do_every_row_once_and_find_the_same(tmp_path, ranks, size):
    done: list[int] = []
    for rank in range(ranks):
        found = square(Workspace(tmp_path, Rank(rank, ranks)), 23, size, done)  # pyright: ignore[reportArgumentType]
    assert sorted(done) == list(range(23))
    assert torch.equal(found, SQUARES)


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_in_memory_get_the_rows_of_all(ranks):
    """Each rank's part is computed first, and the exchange then adds them up."""
    alone: list[torch.Tensor] = []

    class Exchanging(Rank):
        def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
            alone.append(tensor.clone())
            return tensor

    for rank in range(ranks):
        square(Workspace(None, Exchanging(rank, ranks)), 23, 4, [])  # pyright: ignore[reportArgumentType]
    assert len(alone) == ranks
    assert torch.equal(torch.stack(alone).sum(0), SQUARES)
    assert not any(torch.equal(rows, SQUARES) for rows in alone)


def stop_after(parts: int) -> Callable[[], bool]:
    """`go_on` that is False after so many parts; it is asked once more, before the first."""
    asked = iter([True] * parts)  # and the first is asked before the stage
    return lambda: next(asked, False)


@pytest.mark.parametrize("ranks", [1, 3])
def test_finished_parts_are_not_done_again_by_any_number_of_ranks(tmp_path, ranks):
    before: list[int] = []
    with pytest.raises(EvaluationStopped):
        square(Workspace(tmp_path, resumable=True, go_on=stop_after(3)), 23, 4, before)
    assert before == list(range(12))
    after: list[int] = []
    for rank in range(ranks):
        world: Any = Rank(rank, ranks)
        found = square(Workspace(tmp_path, world, resumable=True), 23, 4, after)
    assert sorted(before + after) == list(range(23))
    assert torch.equal(found, SQUARES)


def test_all_ranks_stop_if_one_of_them_is_asked_to(tmp_path):
    class Told(Rank):
        def gather_objects(self, value: Any) -> list[Any]:
            return [value, False] if isinstance(value, bool) else [value] * 2

    world: Any = Told(0, 2)
    with pytest.raises(EvaluationStopped):
        square(Workspace(tmp_path, world), 23, 4, [])


def interrupt(folder: Path, done: list[int]) -> None:
    """Do all of the work, and be interrupted before its end."""
    with open_workspace(folder, {"model": "a"}) as workspace:
        square(workspace, 23, 4, done)
        raise KeyboardInterrupt


def test_an_interrupted_evaluation_is_continued_and_its_folder_removed(tmp_path):
    folder, done = tmp_path / "test.json.parts", []
    with pytest.raises(KeyboardInterrupt):
        interrupt(folder, done)
    with open_workspace(folder, {"model": "a"}) as workspace:
        assert torch.equal(square(workspace, 23, 4, done), SQUARES)
    assert done == list(range(23))
    assert not folder.exists()


@pytest.mark.parametrize(
    "plan", ['{"format_version": 1, "model": "b"}', '{"format_version": 0, "model": "a"}', '{"fo', ""]
)
def test_work_of_another_specification_is_removed(tmp_path, plan):
    folder, done = tmp_path / "test.json.parts", []
    with pytest.raises(KeyboardInterrupt):
        interrupt(folder, done)
    (folder / "plan.json").write_text(plan)
    with open_workspace(folder, {"model": "a"}) as workspace:
        square(workspace, 23, 4, done)
    assert done == 2 * list(range(23))


def test_broken_data_leave_no_folder(tmp_path):
    with pytest.raises(DataError), open_workspace(tmp_path / "parts", {}):
        raise DataError("broken")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_of_something_else_is_refused(tmp_path):
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "text").write_text("keep me")
    with pytest.raises(RunError, match="mine: wanted no such path or an unfinished evaluation, found something else"):
        open_workspace(mine, {}).__enter__()
    with pytest.raises(RunError, match="text: wanted no such path or an unfinished evaluation, found something else"):
        open_workspace(Path(mine / "text"), {}).__enter__()
    assert (mine / "text").read_text() == "keep me"
    (tmp_path / "used").mkdir()
    with FileLock(tmp_path / "used" / ".lock"), pytest.raises(RunError, match="that no other process writes to"):
        open_workspace(tmp_path / "used", {}).__enter__()
