"""Progress of training: the time left, and a full disk."""

import itertools
import sys
from typing import Any

from mvlm import progress as module
from mvlm.progress import TrainingProgress

ROW: dict[str, Any] = {"mlm": 5.25, "mim": 0.5, "itc": 2.0, "spread": -1.5, "pairs_per_s": 41.6, "skipped": 0}
LOSSES = ("mlm", "mim", "itc", "itm", "spread")


def test_progress_tells_the_time_left_after_20_steps(monkeypatch, capsys):
    """The first step takes 9 s, each other 0.5 s, so that lines 20 s apart are 40 steps apart."""
    clock = [1000.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: clock[0])
    with TrainingProgress(100, 650) as progress:
        for step in range(101, 651):
            clock[0] += 9.0 if step == 101 else 0.5
            progress.show(ROW | {"step": step}, LOSSES)
    lines = capsys.readouterr().out.splitlines()
    found = {int(line.removeprefix("step ").split("/")[0]): line.partition("mlm")[0].split("  ")[1] for line in lines}
    assert lines[0].endswith("mlm 5.250  mim 0.500  itc 2.000  spread -1.500  42 pairs/s")
    assert [*found][:4] == [101, 120, 160, 200]
    assert [*found.values()][:4] == ["", "4 min 25 s left", "4 min 5 s left", "3 min 45 s left"]
    assert (found[640], found[650]) == ("5 s left", "")


def test_training_progress_warns_once_if_it_cannot_print(monkeypatch, caplog):
    times = itertools.count(1000, 30)
    monkeypatch.setattr(module.time, "monotonic", lambda: next(times))
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        with TrainingProgress(0, 100) as progress:
            for step in (1, 2, 3):
                progress.show(ROW | {"step": step}, LOSSES)
    (record,) = caplog.records
    assert "[Errno 28]" in record.getMessage()
