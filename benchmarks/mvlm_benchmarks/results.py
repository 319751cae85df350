"""Writers of result files (CSV, JSON, plots), and the columns that describe the machine."""

import csv
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

MACHINE_COLUMNS = (
    "figures", "device", "driver", "cuda", "torch", "triton", "python", "commit", "dirty", "base_commit", "date",
    "versions",
)  # fmt: skip


def heading(about: dict[str, Any]) -> str:
    """One line about the machine (`machine.describe`). On a CPU, a second line says that no Triton kernel runs."""
    commit = about["commit"] + (" with changes" if about["dirty"] is True else "")
    facts = [
        about["device"], about["driver"] and f"driver {about['driver']}", f"torch {about['torch']}",
        about["triton"] and f"triton {about['triton']}", commit and f"commit {commit}", about["date"],
    ]  # fmt: skip
    lines = [", ".join(fact for fact in facts if fact)]
    if about["figures"].startswith("CPU"):
        lines.append(
            "These are CPU timings of the torch references. No Triton kernel runs; do not read them as kernel timings."
        )
    return "\n".join(lines)


def file_stem(*words: str) -> str:
    """A file name without suffix, such as `kernels-nvidia-h100-80gb-hbm3-bfloat16`."""
    return re.sub(r"[^a-z0-9]+", "-", " ".join(words).lower()).strip("-")


def device_name(about: dict[str, Any]) -> str:
    """Name of the device, without the number of threads."""
    return about["device"].split(",")[0]


def write_csv(rows: Sequence[dict[str, Any]], about: dict[str, Any], path: Path, columns: Sequence[str]) -> None:
    """Write one line per row. Every line repeats the machine's columns, so that files can be concatenated."""
    machine = {key: about[key] for key in MACHINE_COLUMNS}
    machine["versions"] = "; ".join(f"{name} {version}" for name, version in about["versions"].items() if version)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys([*columns, *MACHINE_COLUMNS])))
        writer.writeheader()
        writer.writerows({**row, **machine} for row in rows)


def write_json(content: dict[str, Any], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n")


def save_figure(figure: Any, path: Path, **options: Any) -> None:
    """Save a matplotlib figure. Equal figures give equal SVG files."""
    from matplotlib import rc_context

    path.parent.mkdir(parents=True, exist_ok=True)
    # Text is stored as text, without a date or random ids. Files are small, and a diff shows only changed values.
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "mvlm"}):
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None, **options)
