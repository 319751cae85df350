"""The history of a run: what is appended, after a kill too, and the hash of the rows."""

import hashlib
import json

import torch

from mvlm.runs import history
from mvlm.runs.folder import MetricsFile, RunFolder
from mvlm.runs.history import History, changed_ways, prefix_hash, read_history

CPU = torch.device("cpu")


def test_each_part_is_described_where_it_begins(tmp_path):
    run = RunFolder(tmp_path)
    History(run).start(0, CPU, 1, "bf16", {"train": "abc"}, 1, {"accumulate": 1, "plan": "fast"})
    History(run).start(40, CPU, 2, "fp32", {"train": "abc"}, 10, {"accumulate": 2, "plan": "fast"})
    first, second = read_history(run.history)
    assert (first["event"], first["step"], second["step"]) == ("start", 0, 40)
    assert (first["precision"], second["precision"], second["machine"]["ranks"]) == ("bf16", "fp32", 2)
    assert first["data"] == {"train": "abc"}
    assert first["machine"]["threads"] == torch.get_num_threads()
    assert torch.__version__.startswith(first["versions"]["torch"])  # the package's version may lack the CUDA
    assert (first["log_every"], second["log_every"]) == (1, 10)
    names = {"event", "step", "time", "commit", "precision", "data", "log_every", "way", "machine", "versions"}
    assert set(first) == names
    changed = ["ranks 2 in place of 1", "precision fp32 in place of bf16", "accumulate 2 in place of 1"]
    assert changed_ways([first, second], {}) == [[], changed]
    older = {name: value for name, value in first.items() if name != "way"}
    assert changed_ways([older, second], {"accumulate": 2, "plan": "plain"})[1][2:] == ["plan fast in place of plain"]


def test_a_save_has_the_hashes_of_its_manifest_and_of_the_rows_so_far(tmp_path):
    run = RunFolder(tmp_path)
    (tmp_path / "manifest.json").write_text("{}")
    writer = History(run)
    assert writer.metrics_bytes() == 0
    run.metrics.write_bytes(b"one\n")
    length = writer.metrics_bytes()
    run.metrics.write_bytes(b"one\ntwo\n")  # training goes on while the checkpoint is written
    writer.save(3, tmp_path / "manifest.json", length)
    assert read_history(run.history) == [
        {
            "event": "save",
            "step": 3,
            "manifest": hashlib.sha256(b"{}").hexdigest(),
            "metrics_bytes": 4,
            "metrics": hashlib.sha256(b"one\n").hexdigest(),
        }
    ]
    assert prefix_hash(run.metrics, 100) == hashlib.sha256(b"one\ntwo\n").hexdigest()
    assert prefix_hash(tmp_path / "none", 4) == hashlib.sha256(b"").hexdigest()


def test_rows_are_on_the_disk_before_the_checkpoint_that_they_belong_to(tmp_path, monkeypatch):
    """After a power cut a checkpoint without its rows could not be resumed."""
    run, forced = RunFolder(tmp_path), []
    (tmp_path / "manifest.json").write_text("{}")
    monkeypatch.setattr(history, "sync", lambda path: forced.append((path, run.history.exists())))
    metrics = MetricsFile(run.metrics, 0)
    metrics.write({"step": 1})
    History(run).save(1, tmp_path / "manifest.json", History(run).metrics_bytes())
    metrics.close()
    assert forced == [(run.metrics, False)]


def test_the_beginning_of_a_line_that_a_kill_left_spoils_no_other_line(tmp_path):
    run = RunFolder(tmp_path)
    (tmp_path / "manifest.json").write_text("{}")
    History(run).save(1, tmp_path / "manifest.json", 0)
    with run.history.open("a") as file:
        file.write('{"event": "save", "st')
    History(run).save(2, tmp_path / "manifest.json", 0)
    History(run).save(3, tmp_path / "manifest.json", 0)
    assert [event["step"] for event in read_history(run.history)] == [1, 2, 3]
    assert len(run.history.read_text().splitlines()) == 4


def test_the_clock_of_a_run_goes_on_after_the_rows_that_are_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"

    def seconds(step: int) -> float:
        file = MetricsFile(path, step)
        file.close()
        return file.seconds

    assert seconds(0) == 0
    path.write_text("".join(json.dumps({"step": s, "seconds": 1.5 * s}) + "\n" for s in (1, 2, 3)))
    assert seconds(1) == 4.5
    path.write_text('{"step": 1}\n{"step": 2, "seconds": "x"}\n')  # of an older version, and damaged
    assert seconds(2) == 0
