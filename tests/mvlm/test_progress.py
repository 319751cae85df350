"""Progress of training, on a terminal and on a full disk."""

import itertools
import sys
from typing import Any

from mvlm import progress as module
from mvlm.progress import TrainingProgress

ROW: dict[str, Any] = {"mlm": 5.25, "mim": 0.5, "itc": 2.0, "itm": 0.625, "pairs_per_s": 41.6, "skipped": 0}


def test_training_progress_warns_once_if_it_cannot_print(monkeypatch, caplog):
    times = itertools.count(1000, 30)
    monkeypatch.setattr(module.time, "monotonic", lambda: next(times))
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        with TrainingProgress(0, 100) as progress:
            for step in (1, 2, 3):
                progress.show(ROW | {"step": step})
    (record,) = caplog.records
    assert "[Errno 28]" in record.getMessage()
