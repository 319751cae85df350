"""Contents of folders, runs and checkpoints, for tests that compare them."""

import errno
import hashlib
import os
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from mvlm.runs.folder import RunFolder, read_metrics
from mvlm.training.rank_figures import FIELDS

LOSSES = ("loss", "mlm", "mim", "itc", "itm", "grad_norm")


def folder_hash(folder: Path) -> dict[str, tuple[str, int]]:
    """SHA-256 and time of the last change of every file under a folder, by relative path."""
    return {
        str(path.relative_to(folder)): (hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_mtime_ns)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def forbid(monkeypatch: Any, name: str) -> None:
    """Make Python's opening of files of this name fail, as for a user who may not read them: root may."""
    opens = os.open

    def refuse(path: Any, *args: Any, **kwargs: Any) -> Any:
        if os.path.basename(path) == name:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return opens(path, *args, **kwargs)

    monkeypatch.setattr(os, "open", refuse)


def checkpoint_contents(folder: Path) -> dict[str, Any]:
    """Texts and tensors of a checkpoint. Bytes of equal files may differ: safetensors orders its headers freely."""
    found: dict[str, Any] = {path.name: path.read_text() for path in folder.glob("*.json") if path.stem != "manifest"}
    for path in sorted(folder.glob("*/*.safetensors")):
        for name, tensor in load_file(path).items():
            found[f"{path.parent.name}/{name}"] = (tensor.shape, tensor.numpy().tobytes())
    return found


def rows_of(run: Path) -> list[dict[str, Any]]:
    """Rows of a run's metrics."""
    return read_metrics(RunFolder(run).metrics)


def losses_of(run: Path) -> list[dict[str, float]]:
    """Step, losses and gradient norm of every row of a run's metrics."""
    return [{name: row[name] for name in ("step", *LOSSES)} for row in rows_of(run)]


def reproducible_rows(run: Path) -> list[dict[str, Any]]:
    """Rows of a run's metrics without rates, times and memory, which no two runs share."""
    passing = ("pairs_per_s", "data_wait_s", "seconds", "memory_mb", "mfu", *FIELDS)
    return [{name: value for name, value in row.items() if name not in passing} for row in rows_of(run)]
