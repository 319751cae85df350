"""`mvlm data check`, `merge`, `index` and `view`, on intact and broken data sets and on a full disk."""

import errno
import shutil

import pytest

from support.data import file_contents


def fail_with_a_full_disk(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.slow
def test_a_built_data_set_and_its_view_pass_the_check(view, data_set, run_data):
    outcome = run_data("check", view)
    assert outcome.code == 0
    assert (view / "contact-sheet.png").is_file()
    outcome = run_data("check", data_set, "--sheet", view.parent / "sheet.png")
    assert (view.parent / "sheet.png").is_file()
    assert run_data("index", data_set).code == 0


def test_a_contact_sheet_that_cannot_be_written_hides_no_finding(data_set, monkeypatch, run_data):
    """A folder that nobody can write to does not change the outcome of the check."""

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr("PIL.Image.Image.save", refuse)
    assert run_data("check", data_set).code == 0
    index = data_set / "train.index"
    index.write_bytes(index.read_bytes()[:-1])
    outcome = run_data("check", data_set)
    assert outcome.code == 2
    assert any(line.startswith("problem: ") and "train.index" in line for line in outcome.out)


def test_index_repairs_the_index_of_another_tar(data_set, run_data):
    assert len(list(data_set.glob("*.tar"))) > 1
    shutil.copy(data_set / "train-000001.idx", data_set / "train-000000.idx")
    outcome = run_data("check", data_set)
    assert outcome.code == 2
    assert len(outcome.err) == 1
    assert "train-000000.idx: wanted" in outcome.err[0]
    assert run_data("index", data_set).code == 0
    assert run_data("check", data_set).code == 0


def test_a_view_on_a_full_disk_leaves_nothing(view, data_set, tmp_path, monkeypatch, run_data):
    (tmp_path / ".other.partial").mkdir()  # of a killed build, which may be resumed
    before = sorted(tmp_path.iterdir())
    monkeypatch.setattr("mvlm_dataloading.tools.view.write_description", fail_with_a_full_disk)
    outcome = run_data("view", tmp_path / "other", "--sources", data_set)
    assert outcome.code == 2
    assert len(outcome.err) == 1
    assert sorted(tmp_path.iterdir()) == before


def test_an_index_on_a_full_disk_changes_nothing(data_set, monkeypatch, run_data):
    before = file_contents(data_set)
    monkeypatch.setattr("mvlm_dataloading.files.sync", fail_with_a_full_disk)
    outcome = run_data("index", data_set)
    assert outcome.code == 2
    assert outcome.err[0].startswith("mvlm: wanted room to write, found none")
    assert file_contents(data_set) == before


def test_data_merge_joins_the_parts_of_a_build(data_set, image_folder, tmp_path, run_data):
    for i in (1, 2):
        words = ("folder", image_folder, tmp_path / f"part{i}", "--shard-bytes", 20000, "--part", f"{i}/2")
        outcome = run_data(*words)
        assert (outcome.code, outcome.out[-1]) == (0, f"{tmp_path / f'part{i}'}: part {i}/2 is complete")
    outcome = run_data("merge", tmp_path / "part2", tmp_path / "part1", tmp_path / "out")
    assert (outcome.code, outcome.out) == (
        0,
        [f"{tmp_path / 'out'}: 6 train; 1 left out, listed in {tmp_path / 'out'}/rejected.jsonl"],
    )
    assert file_contents(tmp_path / "out") == file_contents(data_set)
