"""Progress of training and of other work, on a terminal and elsewhere."""

import io
import os
import pty
import sys
from typing import Any

import pytest

from mvlm import progress as module
from mvlm.progress import TrainingProgress, WorkProgress, describe_row, format_duration

ROW: dict[str, Any] = {
    "step": 3,
    "mlm": 5.25,
    "mim": 0.5,
    "itc": 2.0,
    "itm": 0.625,
    "pairs_per_s": 41.6,
    "skipped": 0,
}
EVALUATION = {"tr_r1": 12.34, "ir_r1": 9.87, "gain_text_nats": 0.456, "gain_pixels_pct": 1.26}


def test_describe_row_has_undecodable_images_and_evaluations():
    text = describe_row(ROW | {"skipped": 2} | EVALUATION)
    assert text.endswith("42 pairs/s  2 undecodable images  validation R@1 12.3 / 9.9  gain 0.46 nats, 1.3 %")


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test sets."""
    times = [1000.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: times[0])
    return times


def test_training_progress_prints_lines_without_a_terminal(capsys, clock):
    with TrainingProgress(0, 100) as progress:
        for step, now, row in (
            (1, 1000.0, ROW),  # the first
            (2, 1019.0, ROW),  # too soon
            (3, 1020.5, ROW),  # twenty seconds later
            (4, 1021.0, ROW | EVALUATION),  # an evaluation
            (5, 1040.0, ROW),  # too soon after it
            (100, 1040.5, ROW),  # too soon as well, but the last
        ):
            clock[0] = now
            progress.show(row | {"step": step})
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines] == ["step 1/100", "step 3/100", "step 4/100", "step 100/100"]
    assert lines[0] == f"step 1/100  {describe_row(ROW)}"
    assert not any("\r" in line or "\x1b" in line for line in lines)


def test_training_progress_warns_once_if_it_cannot_print(monkeypatch, clock, caplog):
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        with TrainingProgress(0, 100) as progress:
            for step in (1, 2, 3):
                clock[0] += 30
                progress.show(ROW | {"step": step})
    (record,) = caplog.records
    assert "could not write to standard output: [Errno 28]" in record.getMessage()


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
    assert "mlm 5.250" in text
    assert "━" in text
    assert "step 3/10" not in text  # no plain lines with a bar


def test_work_progress_shows_rate_and_time_left(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    times = iter([0.0, 0.0, 10.0, 30.0, 70.0, 140.0])
    monkeypatch.setattr(module.time, "monotonic", lambda: next(times))
    with WorkProgress("samples") as progress:
        progress.show(4, 20, 0)  # four parts were done before
        for done, count in ((5, 500), (8, 2000), (12, 4200), (20, 8400)):
            progress.show(done, 20, count)
    assert capsys.readouterr().out.splitlines() == [
        "4/20  0 samples",
        "8/20  2,000 samples  67 samples/s  1 min 30 s left",
        "12/20  4,200 samples  60 samples/s  1 min 10 s left",
        "20/20  8,400 samples  60 samples/s",
    ]


@pytest.mark.parametrize("seconds, lines", [(19.0, []), (21.0, ["2/2  7 pairs  0 pairs/s"])])
def test_short_work_shows_nothing(monkeypatch, capsys, seconds: float, lines: list[str]) -> None:
    times = iter([0.0, 0.0, seconds])
    monkeypatch.setattr(module.time, "monotonic", lambda: next(times))
    with WorkProgress("pairs", short=True) as progress:
        progress.show(0, 2, 0)
        progress.show(2, 2, 7)
    assert capsys.readouterr().out.splitlines() == lines


def test_durations_have_two_units() -> None:
    assert [format_duration(s) for s in (7.4, 61, 3725)] == ["7 s", "1 min 1 s", "1 h 2 min"]
