"""The command line as tests use it: outcomes of commands, and flags of the micro model."""

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

MICRO_FLAGS = [
    *("--model.image-size", "32", "--model.patch-size", "8", "--model.mask-block", "16", "--model.width", "16"),
    *("--model.heads", "2", "--model.image-layers", "2", "--model.text-layers", "2", "--model.cross-layers", "2"),
    *("--model.decoder-layers", "2", "--model.vocab-size", "300", "--model.text-length", "12"),
    *("--max-steps", "2", "--batch-size", "8", "--warmup-steps", "1", "--device", "cpu"),
]
"""Two steps of the micro model, for `mvlm pretrain tiny`."""


@dataclass(frozen=True)
class Outcome:
    """Exit code of a command, the lines on its output, and the log lines and those on its error stream."""

    code: int
    out: list[str]
    err: list[str]


def assert_refused(outcome: Outcome, *texts: str) -> None:
    """Check for exit code 2 and one error line, which contains the texts."""
    assert outcome.code == 2
    assert outcome.out == []
    assert len(outcome.err) == 1, outcome.err
    assert outcome.err[0].startswith("mvlm: ")
    for text in texts:
        assert text in outcome.err[0]


def run_python(*words: str | Path) -> subprocess.CompletedProcess[str]:
    """Run `python WORDS` in a new process."""
    return subprocess.run([sys.executable, *map(str, words)], capture_output=True, text=True, timeout=300, check=False)
