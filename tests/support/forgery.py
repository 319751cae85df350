"""Small finished runs, and a forger who changes one and then makes its hashes fit again."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from mvlm.config.pretrain import PretrainConfig
from support.faults.campaign import MODEL
from support.models import pretrain_config


def short_run(data: Path, out: Path, **changes: Any) -> PretrainConfig:
    """A run of six steps that keeps its checkpoints of steps 2, 4 and 6."""
    settings: dict[str, Any] = {"max_steps": 6, "batch_size": 4, "checkpoint_every_steps": 2, "keep_checkpoints": 9}
    return pretrain_config(data, out, **(settings | {"model": MODEL, "precision": "fp32"} | changes))


def checkpoint(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step_{step:08d}"


def change_tensors(folder: Path, change: Callable[[str, torch.Tensor], torch.Tensor]) -> None:
    """Replace every tensor of a folder of safetensors by `change(name, tensor)`."""
    for file in folder.glob("*.safetensors"):
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            metadata = json.loads(opened.read(length)).get("__metadata__")
        save_file({name: change(name, tensor) for name, tensor in load_file(file).items()}, file, metadata)


def change_rows(run: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change rows of metrics in place. A row for which `change` returns False is left out."""
    file = run / "metrics.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    rows = [row for row in rows if change(row) is not False]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def change_events(run: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change events of the history in place."""
    file = run / "history.jsonl"
    events = [json.loads(line) for line in file.read_text().splitlines()]
    for event in events:
        change(event)
    file.write_text("".join(json.dumps(event) + "\n" for event in events))


def sign(folder: Path) -> None:
    """Write the hashes in the manifest of a checkpoint anew."""
    file = folder / "manifest.json"
    manifest = json.loads(file.read_text())
    hashes = {name: _sha256((folder / name).read_bytes()) for name in manifest["sha256"]}
    file.write_text(json.dumps(manifest | {"sha256": hashes}))


def reseal(run: Path, history: bool = True) -> None:
    """Write manifests and, if asked for, history anew, so that every hash fits the files as they are now."""
    for folder in (run / "checkpoints").iterdir():
        sign(folder)
    if not history:
        return
    lines = (run / "metrics.jsonl").read_bytes().splitlines(keepends=True)

    def renew(event: dict[str, Any]) -> None:
        if event["event"] == "save" and checkpoint(run, event["step"]).is_dir():
            rows = b"".join(line for line in lines if json.loads(line)["step"] <= event["step"])
            manifest = (checkpoint(run, event["step"]) / "manifest.json").read_bytes()
            event |= {"manifest": _sha256(manifest), "metrics_bytes": len(rows), "metrics": _sha256(rows)}

    change_events(run, renew)


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
