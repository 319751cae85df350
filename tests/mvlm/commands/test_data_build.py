"""Mistakes with `mvlm data ...`: one line, exit code 2."""

import errno
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mvlm import cli
from mvlm.commands import data_tools


def run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: object
) -> tuple[int, str, str]:
    """Exit code, and what was printed to each stream. Everything works in this process."""
    monkeypatch.setattr(sys, "argv", ["mvlm", "data", *map(str, arguments)])
    monkeypatch.setattr(data_tools, "processes", lambda given, pieces=None: 0)
    try:
        cli.main()
        code = 0
    except SystemExit as end:
        code = int(end.code or 0)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("commands")
    (folder / "pictures").mkdir()
    for i in range(6):
        small = np.random.default_rng(i).integers(0, 256, (6, 8, 3), np.uint8)
        Image.fromarray(small).resize((64, 48), Image.Resampling.BICUBIC).save(folder / "pictures" / f"{i}.png")
        (folder / "pictures" / f"{i}.txt").write_text(f"picture {i}")
    (folder / "pictures" / "6.png").write_bytes(b"no picture")
    return folder


@pytest.fixture
def view(data: Path, tmp_path: Path, monkeypatch, capsys) -> Path:
    """A view beside a data set of its own."""
    settings = ["--shard-bytes", 20000]
    assert run(monkeypatch, capsys, "folder", data / "pictures", tmp_path / "set", *settings)[0] == 0
    assert run(monkeypatch, capsys, "view", tmp_path / "view", "--sources", tmp_path / "set")[0] == 0
    return tmp_path / "view"


def test_shards_are_written_checked_and_viewed(view, monkeypatch, capsys):
    code, out, _ = run(monkeypatch, capsys, "check", view)
    assert code == 0
    assert "images              6" in out
    assert "width over height   1.33 / 1.33 / 1.33" in out
    assert (view / "contact-sheet.png").is_file()
    code, out, _ = run(monkeypatch, capsys, "check", view.parent / "set", "--sheet", view.parent / "sheet.png")
    assert "rejected: 1 no caption" in out
    assert (view.parent / "sheet.png").is_file()
    code, out, _ = run(monkeypatch, capsys, "index", view.parent / "set")
    assert (code, out.split(":")[1]) == (0, " 6 train; left out")


def test_a_view_of_a_missing_shard(view, monkeypatch, capsys):
    (view.parent / "set" / "train-000000.tar").unlink()
    code, out, err = run(monkeypatch, capsys, "check", view)
    assert code == 2
    assert len(err.strip().splitlines()) == 1
    assert "train-000000.tar: wanted a shard that dataset.json names, found no such file" in err
    assert "problems" in out


def test_the_index_of_another_tar(view, monkeypatch, capsys):
    source = view.parent / "set"
    assert len(list(source.glob("*.tar"))) > 1
    shutil.copy(source / "train-000001.idx", source / "train-000000.idx")
    code, _, err = run(monkeypatch, capsys, "check", source)
    assert code == 2
    assert len(err.strip().splitlines()) == 1
    assert "train-000000.idx: wanted" in err
    assert run(monkeypatch, capsys, "index", source)[0] == 0
    assert run(monkeypatch, capsys, "check", source)[0] == 0


def test_a_view_on_a_full_disk(view, tmp_path, monkeypatch, capsys):
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    (tmp_path / ".other.partial").mkdir()  # of a build that was killed, which may be gone on with
    before = sorted(tmp_path.iterdir())
    monkeypatch.setattr("mvlm_dataloading.tools.view.write_durably", full)
    code, _, err = run(monkeypatch, capsys, "view", tmp_path / "other", "--sources", tmp_path / "set")
    assert code == 2
    assert err == (
        "mvlm: wanted room to write, found none ([Errno 28] No space left on device); free some space and try again\n"
    )
    assert sorted(tmp_path.iterdir()) == before


def test_an_index_on_a_full_disk(view, monkeypatch, capsys):
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    before = {path.name: path.read_bytes() for path in (view.parent / "set").iterdir()}
    monkeypatch.setattr("mvlm_dataloading.dataset.durable_files.sync_file", full)
    code, _, err = run(monkeypatch, capsys, "index", view.parent / "set")
    assert code == 2
    assert err.startswith("mvlm: wanted room to write, found none")
    assert {path.name: path.read_bytes() for path in (view.parent / "set").iterdir()} == before


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["folder", "no", "out"], "no: wanted a folder, found none"),
        (["folder", "{data}/pictures", "out", "--quality", "0"], "quality: wanted 1 to 100, got 0"),
        (["folder", "{data}/pictures", "out", "--max-pixels", "1000000000"], "max-pixels: wanted 1 to 89478485"),
        (["folder", "{data}/pictures", "{data}"], "wanted a new or an empty folder, found one in use"),
        (["folder", "{data}/pictures", "out", "--tokenizer", "no.json"], "no.json: wanted a file, found none"),
        (["folder", "{data}/pictures", "out", "--against", "no"], "no/dataset.json: wanted a file, found none"),
        (["check", "no"], "no: wanted a data folder, found none"),
        (["index", "{data}/pictures"], "wanted a folder of tars, found none"),
        (["view", "out", "--sources", "no"], "no: wanted a data folder, found none"),
        (["huggingface", "no", "out"], "no: wanted parquet files or a folder of save_to_disk, found none"),
        (["coco", "{data}", "out"], "annotations: wanted a folder, found none"),
    ],
)
def test_mistakes_are_one_line(data, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    code, _, err = run(monkeypatch, capsys, *(word.format(data=data) for word in arguments))
    assert code == 2
    assert err.startswith("mvlm: ")
    assert message in err
    assert len(err.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_the_number_of_processes(monkeypatch):
    assert data_tools.processes(3) == 3
    assert data_tools.processes(3, 2) == 2
    assert data_tools.processes(None, 1) == 1
    with pytest.raises(ValueError, match="workers: wanted at least 1, got 0"):
        data_tools.processes(0)


def test_what_is_written_names_its_settings(view):
    recipe = json.loads((view.parent / "set" / "dataset.json").read_text())["recipe"]
    assert (recipe["shard_bytes"], recipe["max_pixels"], recipe["revision"]) == (20000, 50_000_000, 2)
