"""Checkpoints: a folder of safetensors and JSON, written aside and renamed, each file held by a sha256.

    step_00000600/ model/  ema/  optimizer/  generators/   safetensors, a file a rank, by torch.distributed.checkpoint
                   model.json  state.json  tokenizer.json  manifest.json

No pickle is written or read, and nothing that the manifest does not name is opened.
"""

import json
import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load as load_distributed
from torch.distributed.checkpoint.state_dict_saver import save as save_distributed

from mvlm.errors import RunError
from mvlm.files import check_fit, check_folder, read_safetensors, sha256

log = logging.getLogger(__name__)

FORMAT_VERSION = 2
TEXTS = ("model.json", "state.json", "tokenizer.json")

# A single process needs no process group, and DCP says so each time.
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")


def checkpoints(root: Path) -> list[Path]:
    """The finished checkpoints under `root`, oldest first. A folder of another name is none, and nobody's to remove."""
    found = (path for path in root.glob("step_*") if re.fullmatch(r"step_\d{8,}", path.name) and path.is_dir())
    return sorted(found, key=step_of)


def step_of(path: Path) -> int:
    """The step of a checkpoint, from its folder's name."""
    return int(path.name.removeprefix("step_"))


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
    check_folder(path, "a run, a checkpoint or an exported folder")
    found = newest_good_checkpoint(path / "checkpoints")
    if found is not None:
        return found
    damaged = len(checkpoints(path / "checkpoints"))
    if damaged:
        raise RunError(f"{path}: wanted a good checkpoint, found {damaged} damaged, as listed above; use another run")
    raise RunError(
        f"{path}: wanted a run, a checkpoint or an exported folder, found no finished checkpoint (checkpoints/step_*), "
        f"no manifest.json, and no model.safetensors with a config.json; check the path"
    )


def verify_checkpoint(path: Path) -> None:
    """RunError naming the first file that is missing, differs from the manifest, or is not in it."""
    manifest = path / "manifest.json"
    try:
        values = json.loads(manifest.read_text())
        version, digests = values["format_version"], dict(values["sha256"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise RunError(f"{manifest}: wanted a readable manifest, got {error!r}; use another checkpoint") from None
    if version != FORMAT_VERSION:
        raise RunError(f"{manifest}: wanted format version {FORMAT_VERSION}, got {version}; use the mvlm that wrote it")
    parts = {name.split("/")[0] for name in digests}
    for name in (*TEXTS, "model", "optimizer", "generators"):
        if name not in parts:
            raise RunError(f"{path / name}: missing from the checkpoint; use another one")
    for name, digest in digests.items():
        file = path / name
        if not file.is_file():
            raise RunError(f"{file}: missing from the checkpoint; use another one")
        try:
            found = sha256(file)
        except OSError as error:  # a bad sector, for one
            raise RunError(f"{file}: cannot be read ({error.strerror}); use another checkpoint") from None
        if found != digest:
            raise RunError(f"{file}: damaged, its sha256 is not the manifest's; use another checkpoint")
    for file in path.rglob("*"):
        # The reader takes every *.safetensors of a folder: a foreign one would be read with the others.
        if file.is_file() and file != manifest and str(file.relative_to(path)) not in digests:
            raise RunError(
                f"{file}: not in the manifest, so not of this checkpoint; remove it or use another checkpoint"
            )


def write_tensors(folder: Path, tensors: dict[str, Tensor], group: "dist.ProcessGroup | None") -> None:
    """Write a folder of safetensors, every rank its own part. Collective over `group`; None for a process alone."""
    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    with _as_raised():
        save_distributed(tensors, storage_writer=writer, process_group=group, no_dist=group is None)


def read_tensors(folder: Path, wanted: dict[str, Tensor]) -> None:
    """Fill `wanted` in place from a folder of safetensors, whatever number of ranks wrote it. Not collective.

    RunError lists names and shapes that do not fit, and nothing is filled then.
    """
    reader = HuggingFaceStorageReader(str(folder))
    try:
        found = reader.read_metadata().state_dict_metadata
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise RunError(f"{folder}: not readable as safetensors: {error}") from None
    shapes = {name: tuple(m.size) for name, m in found.items() if isinstance(m, TensorStorageMetadata)}
    check_fit({name: tuple(t.shape) for name, t in wanted.items()}, shapes, folder)
    with _as_raised():
        load_distributed(wanted, storage_reader=reader, no_dist=True)


@contextmanager
def _as_raised() -> Iterator[None]:
    """What failed, on whatever rank, is raised as it was there: DCP wraps it in an exception that is no Exception."""
    try:
        yield
    except CheckpointException as error:
        raise next(iter(error.failures.values()))[0] from None


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """AdamW's state by parameter name: name/exp_avg, name/exp_avg_sq, name/step."""
    return {
        f"{name}/{key}": value
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state[parameter].items()
    }


def load_optimizer(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """AdamW's state from the folder of a verified checkpoint. Parameters that had none there get none."""
    found = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    states = {
        name: {
            "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }
        for name, parameter in model.named_parameters()
        if f"{name}/step" in found
    }
    read_tensors(folder, {f"{name}/{key}": t for name, state in states.items() for key, t in state.items()})
    for name, parameter in model.named_parameters():
        if name in states:
            optimizer.state[parameter] = states[name]


def read_state(folder: Path) -> dict[str, Any]:
    """state.json of a verified checkpoint."""
    return json.loads((folder / "state.json").read_text())


def generator_states(device: torch.device) -> dict[str, Tensor]:
    """The states of torch's generators on this rank: uint8 (bytes,)."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def set_generators(folder: Path, rank: int, device: torch.device) -> None:
    """Set this rank's generators as a verified checkpoint has them; a rank that it does not know keeps its own."""
    file = folder / "generators" / f"rank_{rank:05d}.safetensors"
    if not file.is_file():
        return
    states = read_safetensors(file)
    torch.set_rng_state(states["cpu"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)
