"""Contents of folders and checkpoints, for tests that compare them."""

import hashlib
from pathlib import Path
from typing import Any

from safetensors.torch import load_file


def folder_hash(folder: Path) -> dict[str, tuple[str, int]]:
    """Every file under a folder: its contents' hash and when it was written."""
    return {
        str(path.relative_to(folder)): (hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_mtime_ns)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def checkpoint_contents(folder: Path) -> dict[str, Any]:
    """A checkpoint's texts, and bytes of its tensors; safetensors writes its own notes in any order."""
    found: dict[str, Any] = {path.name: path.read_text() for path in folder.glob("*.json") if path.stem != "manifest"}
    for path in sorted(folder.glob("*/*.safetensors")):
        for name, tensor in load_file(path).items():
            found[f"{path.parent.name}/{name}"] = (tensor.shape, tensor.numpy().tobytes())
    return found
