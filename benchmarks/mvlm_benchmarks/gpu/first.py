"""Stage `first`: what is worth most first, for a GPU that is there for ten minutes.

Each part is a process of its own: one that hangs, crashes or loses the GPU takes nothing from the others. After each
part all files so far are in first.tar, which is replaced in one piece.
"""

import json
import os
import sys
import tarfile
from pathlib import Path

from mvlm_benchmarks.gpu.processes import run_program
from mvlm_benchmarks.gpu.stage import Stage
from mvlm_benchmarks.gpu.stages import GRACE, PARTS

LEAST = 15.0
"""Seconds below which no part is started."""


def run(stage: Stage) -> None:
    """Run the parts of stage `first`. Writes parts/NAME with the files of each, and first.tar."""
    try:
        for name, spec in PARTS.items():
            if stage.budget.left < (0 if stage.rehearse else LEAST):
                stage.leave_out(name)
                break
            folder = stage.out / "parts" / name
            folder.mkdir(parents=True, exist_ok=True)
            seconds = max(1.0, min(spec.seconds, stage.budget.left - GRACE))
            command = [sys.executable, "-m", "mvlm_benchmarks.gpu", name, "--quick", "--out", str(folder)]
            command += ["--seconds", f"{seconds:g}", *(["--rehearse"] if stage.rehearse else [])]
            with (folder / "output.txt").open("w") as output:
                code = run_program(command, seconds + GRACE, output)
            ended = _ended(folder / f"{name}.json", code)
            stage.end_part(name, "ok" if ended == "complete" else ended)
            stage.summary(f"running, or killed, after {name}")
            archive(stage.out)
            stage.say(f"{name}: {ended[:200]}, after {stage.budget.used:.0f} s")
    finally:
        archive(stage.out)


def _ended(summary: Path, code: int | None) -> str:
    """Status of a part that has ended: the one in its summary, or its exit code if it wrote none."""
    try:
        return json.loads(summary.read_text())["ended"]
    except (OSError, ValueError, KeyError):
        return f"error: exit code {code}, before a summary"


def archive(out: Path) -> None:
    """Write first.tar with everything else in the folder. A kill leaves the archive as it was before, or whole."""
    new = out / "first.tar.new"
    with tarfile.open(new, "w") as tar:
        for path in sorted(out.rglob("*")):
            if path.is_file() and not path.name.startswith("first.tar"):
                tar.add(path, path.relative_to(out))
    with new.open("rb") as file:
        os.fsync(file.fileno())
    new.replace(out / "first.tar")
