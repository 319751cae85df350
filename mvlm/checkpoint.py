"""Checkpoints: a folder of safetensors and JSON, written aside and renamed, each file held by a sha256.

    step_00000600/ model.safetensors  optimizer.safetensors  model.json  state.json  tokenizer.json  manifest.json

No pickle is written or read.
"""

import hashlib
import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mvlm.config import model_config
from mvlm.errors import ConfigError, RunError
from mvlm.model import MaskVLM
from mvlm_dataloading import DataError, Tokenizer, load_tokenizer

log = logging.getLogger(__name__)


def save_checkpoint(
    root: Path, step: int, model: MaskVLM, optimizer: torch.optim.Optimizer, state: dict[str, Any], tokenizer: Tokenizer
) -> Path:
    """Write root/step_XXXXXXXX whole or not at all, and return its path. `state` must be ready for JSON."""
    final = root / f"step_{step:08d}"
    aside = final.with_suffix(".tmp")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    save_file({name: t.contiguous() for name, t in model.state_dict().items()}, aside / "model.safetensors")
    save_file(_optimizer_tensors(model, optimizer), aside / "optimizer.safetensors")
    _write_json(aside / "model.json", model.config.to_dict())
    _write_json(aside / "state.json", {"step": step, **state})
    tokenizer.save(aside / "tokenizer.json")
    digests = {path.name: _sha256(path) for path in sorted(aside.iterdir())}
    _write_json(aside / "manifest.json", {"format_version": 1, "sha256": digests})
    for path in [*aside.iterdir(), aside]:
        _sync(path)
    shutil.rmtree(final, ignore_errors=True)  # only ever a folder that a resumed run has already refused
    aside.rename(final)
    _sync(root)
    return final


def remove_old_checkpoints(root: Path, keep: int) -> None:
    """Keep the newest `keep` checkpoints. A folder that cannot be removed is only warned about."""
    for path in checkpoints(root)[:-keep]:
        try:
            shutil.rmtree(path)
        except OSError as error:
            log.warning("could not remove the old checkpoint %s: %s", path, error)


def checkpoints(root: Path) -> list[Path]:
    """The finished checkpoints under `root`, oldest first."""
    return sorted(path for path in root.glob("step_*") if path.is_dir() and path.suffix != ".tmp")


def newest_good_checkpoint(root: Path) -> Path | None:
    """The newest checkpoint whose files are what its manifest says; damaged ones are named in a warning."""
    for path in reversed(checkpoints(root)):
        try:
            verify_checkpoint(path)
        except RunError as error:
            log.warning("%s; looking for an older checkpoint", error)
        else:
            return path
    return None


def find_checkpoint(path: Path) -> Path:
    """The checkpoint that `path` names: itself, or the newest good one of a run folder. RunError without one."""
    if (path / "manifest.json").is_file():
        verify_checkpoint(path)
        return path
    found = newest_good_checkpoint(path / "checkpoints")
    if found is None:
        raise RunError(f"{path}: wanted a run or a checkpoint folder, found no good checkpoint there; check the path")
    return found


def verify_checkpoint(path: Path) -> None:
    """RunError naming the first file that is missing or differs from the manifest."""
    try:
        digests = dict(json.loads((path / "manifest.json").read_text())["sha256"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(
            f"{path / 'manifest.json'}: wanted a readable manifest, got {error!r}; use another checkpoint"
        ) from None
    for name in ("model.safetensors", "optimizer.safetensors", "model.json", "state.json", "tokenizer.json"):
        file = path / name
        if name not in digests or not file.is_file():
            raise RunError(f"{file}: missing from the checkpoint; use another one")
        if _sha256(file) != digests[name]:
            raise RunError(f"{file}: damaged, its sha256 is not the manifest's; use another checkpoint")


def load_model(path: Path | str, device: torch.device | str = "cpu") -> tuple[MaskVLM, Tokenizer]:
    """The model (in eval mode, on `device`) and the tokenizer of a run or checkpoint folder, or RunError."""
    folder = find_checkpoint(Path(path))
    try:
        config = model_config(json.loads((folder / "model.json").read_text()), str(folder / "model.json"))
        tokenizer = load_tokenizer(folder / "tokenizer.json")
    except (ConfigError, DataError, ValueError, TypeError) as error:
        raise RunError(f"{folder}: {error}") from None
    model = MaskVLM(config)
    load_weights(model, folder)
    return model.to(device).eval(), tokenizer


def load_weights(model: nn.Module, folder: Path) -> None:
    """Load model.safetensors; RunError lists what does not fit, and the model is left as it was."""
    file = folder / "model.safetensors"
    try:
        tensors = load_file(file)
    except (OSError, SafetensorError) as error:
        raise RunError(f"{file}: not readable as safetensors: {error}") from None
    own = model.state_dict()
    wrong = [f"{name} missing" for name in own if name not in tensors]
    wrong += [f"{name} unexpected" for name in tensors if name not in own]
    wrong += [
        f"{name} wanted {tuple(own[name].shape)}, got {tuple(tensors[name].shape)}"
        for name in own
        if name in tensors and own[name].shape != tensors[name].shape
    ]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise RunError(f"{file}: a checkpoint of another architecture: {'; '.join(wrong[:3])}{more}")
    model.load_state_dict(tensors)


def load_training_state(folder: Path, model: MaskVLM, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Load weights and optimizer moments from a verified checkpoint; returns the rest of its state."""
    load_weights(model, folder)
    tensors = load_file(folder / "optimizer.safetensors")
    state: dict[int, dict[str, Tensor]] = {}
    index = {id(p): i for i, p in enumerate(p for group in optimizer.param_groups for p in group["params"])}
    for name, parameter in model.named_parameters():
        keys = [key for key in tensors if key.rpartition("/")[0] == name]
        state[index[id(parameter)]] = {key.rpartition("/")[2]: tensors[key] for key in keys}
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    return json.loads((folder / "state.json").read_text())


def _optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """AdamW's state by parameter name: name/exp_avg, name/exp_avg_sq, name/step."""
    return {
        f"{name}/{key}": value.contiguous()
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state[parameter].items()
    }


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1, allow_nan=False) + "\n")


def _sync(path: Path) -> None:
    """Force a file's or folder's contents to the disk, so that the rename never outruns them."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
