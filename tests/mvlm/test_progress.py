"""Progress of training, on a terminal and on a full disk."""

import io
import itertools
import os
import pty
import sys
from typing import Any

from mvlm import progress as module
from mvlm.progress import TrainingProgress

ROW: dict[str, Any] = {
    "step": 3,
    "mlm": 5.25,
    "mim": 0.5,
    "itc": 2.0,
    "itm": 0.625,
    "pairs_per_s": 41.6,
    "skipped": 0,
}


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


def test_training_progress_shows_a_bar_on_a_terminal(monkeypatch):
    master, slave = pty.openpty()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setattr(sys, "stdout", os.fdopen(slave, "w"))
    with TrainingProgress(2, 10) as progress:
        for step in (3, 10):
            progress.show(ROW | {"step": step})
    sys.stdout.close()
    shown = io.BytesIO()
    while True:
        try:
            shown.write(os.read(master, 65536))
        except OSError:  # Linux, at the end of a terminal's output
            break
    os.close(master)
    text = shown.getvalue().decode()
    assert "10/10" in text
    assert "step 3/10" not in text  # no plain lines with a bar
