"""Writers of result files (CSV, plots), and the columns that describe the machine."""

import csv
import io
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

MACHINE_COLUMNS = (
    "figures", "device", "driver", "cuda", "torch", "triton", "python", "commit", "dirty", "date",
    "versions",
)  # fmt: skip


def heading(about: dict[str, Any]) -> str:
    """One line about the machine (`machine.describe`). On a CPU, a line before it says that no Triton kernel runs."""
    commit = about["commit"] + (" with changes" if about["dirty"] is True else "")
    facts = [
        about["device"], about["driver"] and f"driver {about['driver']}", f"torch {about['torch']}",
        about["triton"] and f"triton {about['triton']}", commit and f"commit {commit}", about["date"],
    ]  # fmt: skip
    line = ", ".join(fact for fact in facts if fact)
    if about["figures"].startswith("CPU"):
        notice = (
            "These are CPU timings of the torch references. No Triton kernel runs: do not read them as its timings."
        )
        return f"{notice}\n{line}"
    return line


def file_stem(*words: str) -> str:
    """A file name without suffix, such as `kernels-nvidia-h100-80gb-hbm3-bfloat16`."""
    return re.sub(r"[^a-z0-9]+", "-", " ".join(words).lower()).strip("-")


def device_name(about: dict[str, Any]) -> str:
    """Name of the device, without the number of threads."""
    return about["device"].split(",")[0]


class RowFile:
    """A CSV file to which rows are appended as they are measured.

    Each `append` ends with the rows on disk, so a process that is killed loses only the case that it was measuring. A
    kill during an `append` may leave the beginning of a row. What follows the last line end is therefore not a row.
    Every line repeats the machine's columns, so that files can be concatenated.
    """

    def __init__(self, path: Path, about: dict[str, Any], columns: Sequence[str]) -> None:
        """Start the file with a header. An existing file is replaced."""
        self.path = path
        self._machine = {key: about[key] for key in MACHINE_COLUMNS}
        versions = about["versions"].items()
        self._machine["versions"] = "; ".join(f"{name} {version}" for name, version in versions if version)
        self._columns = list(dict.fromkeys([*columns, *MACHINE_COLUMNS]))
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", newline="") as file:
            csv.DictWriter(file, self._columns).writeheader()

    def append(self, rows: Sequence[dict[str, Any]]) -> None:
        """Append rows. Columns that a row does not have stay empty; those that the file does not have are an error."""
        lines = io.StringIO(newline="")
        csv.DictWriter(lines, self._columns).writerows({**row, **self._machine} for row in rows)
        with self.path.open("ab", buffering=0) as file:
            file.write(lines.getvalue().encode())
            os.fsync(file.fileno())


def write_csv(rows: Sequence[dict[str, Any]], about: dict[str, Any], path: Path, columns: Sequence[str]) -> None:
    """Write a CSV file at once: one line per row."""
    RowFile(path, about, columns).append(rows)


def save_figure(figure: Any, path: Path, **options: Any) -> None:
    """Save a matplotlib figure. Equal figures give equal SVG files."""
    from matplotlib import rc_context

    path.parent.mkdir(parents=True, exist_ok=True)
    # Text is stored as text, without a date or random ids. Files are small, and a diff shows only changed values.
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "mvlm"}):
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None, **options)
