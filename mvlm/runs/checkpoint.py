"""Format of a checkpoint: a folder of safetensors and JSON, with a manifest of the files' SHA-256 hashes.

    step_00000600/
        model/  ema/  optimizer/    safetensors, one file per rank, written by torch.distributed.checkpoint
        generators/                 rank_XXXXX.safetensors, states of a rank's random generators
        model.json                  configuration of the model
        state.json                  step, and the states that are not tensors (below)
        tokenizer.json
        manifest.json               SHA-256 of all other files

Fields of state.json: `step`; `loader`, the loader's position and undecodable images; `bad`, the counts of skipped
updates; `best`, step and figure of the best evaluation, or null. Of a run with adapters, `adapters`: their `alpha`, and
as `start` the path and hash of the model whose frozen weights the checkpoint leaves out, or null if it has them. Of a
run with --keep-start, `kept`, the hash of its initial model. Of a fine-tuned run, `task`, the task's name, options and
state, and `task_file`, the hash of the file of a user's own task.
`mvlm.training.trainer.Trainer.save` collects them.

No pickle is written or read. A file that the manifest does not name is never opened.
"""

import itertools
import logging
import os
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict_loader import load as load_distributed
from torch.distributed.checkpoint.state_dict_saver import save as save_distributed

from mvlm.errors import RunError
from mvlm.files import check_fit, check_types, read_safetensors, read_shapes
from mvlm.schemas import Manifest, RunState
from mvlm.untrusted import read_json, run_errors
from mvlm_dataloading.files import sha256
from mvlm_dataloading.untrusted import LIMITS, resolve_inside

log = logging.getLogger(__name__)

FORMAT_VERSION = 2

MODEL, EMA, OPTIMIZER, GENERATORS = "model", "ema", "optimizer", "generators"
"""Folders of tensors. The averaged weights, `EMA`, are there only if the run keeps them."""
MODEL_CONFIG, STATE, TOKENIZER, MANIFEST = "model.json", "state.json", "tokenizer.json", "manifest.json"
MICROBATCHES, START, CONFIG = "microbatches", "start", "config.json"
"""Names that only the folder of a failed step has: its microbatches, the model it started from, the run's settings."""
REQUIRED = (MODEL_CONFIG, STATE, TOKENIZER, MODEL, OPTIMIZER, GENERATORS)

# A single process needs no process group. DCP warns about its absence at every call.
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")


def checkpoints(root: Path) -> list[Path]:
    """Finished checkpoints under `root`, oldest first. Folders of other names are ignored, so nothing removes them."""
    found = (path for path in root.glob("step_*") if re.fullmatch(r"step_\d{8,}", path.name) and path.is_dir())
    return sorted(found, key=step_of)


def step_of(path: Path) -> int:
    """Number of training steps behind a checkpoint, from its folder's name."""
    return int(path.name.removeprefix("step_"))


def checkpoint_name(step: int) -> str:
    """Folder name of the checkpoint of a step."""
    return f"step_{step:08d}"


def rank_file(rank: int) -> str:
    """File name of a rank's own tensors, such as its generator states under `GENERATORS`."""
    return f"rank_{rank:05d}.safetensors"


def newest_good_checkpoint(root: Path) -> Path | None:
    """Newest checkpoint whose files match its manifest, or None. A damaged one is skipped with a warning."""
    for path in reversed(checkpoints(root)):
        try:
            verify_checkpoint(path)
        except RunError as error:
            log.warning("%s; looking for an older checkpoint", error)
        else:
            return path
    return None


def verify_checkpoint(path: Path, required: Sequence[str] = REQUIRED) -> None:
    """Raise RunError for the first file that is missing, differs from the manifest, or is not in it.

    PermissionError for a file that may not be read.

    Args:
        required: files and folders that have to be there.
    """
    digests = _read_manifest(path / MANIFEST)
    entries = {name.split("/")[0] for name in digests}
    for name in required:
        if name not in entries:
            raise RunError(f"{path / name}: missing from the checkpoint; use another one")
    _refuse_others(path, {*digests, MANIFEST})
    for name, digest in digests.items():
        file = path / name
        if not file.is_file():
            raise RunError(f"{file}: missing from the checkpoint; use another one")
        try:
            with run_errors():
                real = resolve_inside(file, path)
            _check_length(file, real.stat().st_size)
            with run_errors():
                found = sha256(real)
        except PermissionError:
            raise
        except OSError as error:  # for example, a bad sector
            raise RunError(f"{file}: cannot be read ({error.strerror}); use another checkpoint") from None
        if found != digest:
            raise RunError(f"{file}: damaged, its sha256 is not the manifest's; use another checkpoint")


_TENSORS_AT_ONCE = 1 << 30
"""Largest size in bytes of a safetensors file that is hashed, within seconds, before its header is looked at."""
_KINDS = {MODEL_CONFIG: "settings", TOKENIZER: "tokenizer"}


def _check_length(file: Path, size: int) -> None:
    """Raise RunError for a file of a checkpoint that is too large to be hashed, such as a sparse file of terabytes.

    size: its length in bytes.
    """
    if file.suffix == ".safetensors":
        if size > _TENSORS_AT_ONCE:
            read_shapes(file)  # which compares the header with the file's length
    elif size > (most := LIMITS[_KINDS.get(file.name, "state")]):
        raise RunError(f"{file}: wanted at most {most} bytes, found {size}; use another checkpoint")


def _refuse_others(path: Path, known: set[str]) -> None:
    """Raise RunError for anything in a checkpoint but the files of its manifest and their folders.

    DCP's reader takes every *.safetensors of a folder, so a foreign file would be read with the others.
    """
    folders = {"", *(parent.as_posix() for name in known for parent in PurePosixPath(name).parents)} - {"."}
    for place, within, names in os.walk(path):
        for name in (*within, *names):
            file = Path(place, name)
            inside = file.relative_to(path).as_posix()
            # A link to a folder is entered by none of these walks, but by DCP's reader.
            is_folder = name in within and not file.is_symlink()
            if not (is_folder and inside in folders) and inside not in known:
                raise RunError(
                    f"{file}: not in the manifest, so not part of this checkpoint; remove it or use another checkpoint"
                )


def _read_manifest(manifest: Path) -> dict[str, str]:
    """Hash of each file that a manifest names. RunError if it is damaged or of another version."""
    try:
        values = read_json(manifest, "manifest", "a readable manifest", Manifest)
    except PermissionError:
        # NOTE: it is not damaged. As a damaged one it would be set aside, and the run would go on from an older one.
        raise
    except OSError as error:
        raise RunError(f"{manifest}: cannot be read ({error.strerror}); use another checkpoint") from None
    version, digests = values["format_version"], values["sha256"]
    if version != FORMAT_VERSION:
        raise RunError(f"{manifest}: wanted format version {FORMAT_VERSION}, got {version}; use the mvlm that wrote it")
    for name in digests:
        if name.startswith("/") or ".." in name.split("/"):
            raise RunError(f"{manifest}: wanted files of this folder, found {name!r}; use another checkpoint")
    return digests


def set_aside(path: Path) -> None:
    """Rename a checkpoint that cannot be resumed, so that it no longer counts as one and its files are kept."""
    try:
        verify_checkpoint(path)
    except (RunError, OSError):
        suffix, what = "damaged", "damaged checkpoint"
    else:  # its rows of metrics were missing
        suffix, what = "ahead", "checkpoint ahead of the rows of metrics"
    names = (path.with_suffix(f".{suffix}{number}") for number in itertools.count(1))
    aside = path.rename(next(name for name in names if not name.exists()))
    log.warning("the %s is now %s; remove it when you no longer need it", what, aside)


def write_tensors(folder: Path, tensors: dict[str, Tensor], group: "dist.ProcessGroup | None") -> None:
    """Write a folder of safetensors. Each rank writes its own file; collective over `group`, None for one process."""
    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    with _original_error():
        save_distributed(tensors, storage_writer=writer, process_group=group, no_dist=group is None)


def read_tensors(folder: Path, wanted: dict[str, Tensor], prefix: str = "") -> None:
    """Fill `wanted` in place from a folder of safetensors that any number of ranks wrote. Not collective.

    Only tensors whose name begins with `prefix` are read; `wanted` has their names without it. RunError lists names,
    shapes and types that do not fit; then nothing is filled.
    """
    reader = HuggingFaceStorageReader(str(folder))
    metadata = _read_metadata(reader, folder)
    wanted = {f"{prefix}{name}": tensor for name, tensor in wanted.items()}
    shapes = {name: shape for name, shape in _shapes(metadata, folder).items() if name.startswith(prefix)}
    check_fit({name: tuple(t.shape) for name, t in wanted.items()}, shapes, folder)
    types: dict[str, set[torch.dtype]] = {}
    for index, part in metadata.storage_data.items():
        types.setdefault(index.fqn, set()).add(part.dtype)
    check_types(wanted, types, folder)
    with _original_error():
        load_distributed(wanted, storage_reader=reader, no_dist=True)


def read_folder_shapes(folder: Path, prefix: str = "") -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors of a folder of safetensors by name, from the headers alone.

    Only of names that begin with `prefix`, and without it. RunError if the files cannot be read, or lack a part.
    """
    shapes = _shapes(_read_metadata(HuggingFaceStorageReader(str(folder)), folder), folder)
    return {name.removeprefix(prefix): shape for name, shape in shapes.items() if name.startswith(prefix)}


def _read_metadata(reader: HuggingFaceStorageReader, folder: Path) -> Any:
    try:
        return reader.read_metadata()
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, RuntimeError, RecursionError) as error:
        raise RunError(
            f"{folder}: wanted a folder of safetensors, could not read it: {error}; use another checkpoint"
        ) from None


def _shapes(metadata: Any, folder: Path) -> dict[str, tuple[int, ...]]:
    """Shape of each tensor of a folder of safetensors, by name. RunError if the files do not hold all rows of one.

    Each file states itself where its rows belong. Unchecked, it could make the reader allocate rows that no file has.

    metadata: of the folder, as torch.distributed.checkpoint (DCP) reads it.
    """
    shapes = {}
    for name, tensor in metadata.state_dict_metadata.items():
        shapes[name] = tuple(tensor.size)
        if not _is_whole(shapes[name], {(tuple(part.offsets), tuple(part.sizes)) for part in tensor.chunks}):
            raise RunError(f"{folder}: wanted all parts of {name}, found others; use another checkpoint")
    return shapes


def _is_whole(shape: tuple[int, ...], parts: set[tuple[tuple[int, ...], tuple[int, ...]]]) -> bool:
    """True if the parts of a tensor, as (offsets, sizes), are blocks of rows that together are the whole tensor.

    FSDP shares tensors among ranks in this way.
    """
    if not shape:
        return parts == {((), ())}
    row = 0
    for offsets, sizes in sorted(part for part in parts if 0 not in part[1]):  # a rank may have no row
        if offsets != (row, *(0 for _ in shape[1:])) or sizes[1:] != shape[1:]:
            return False
        row += sizes[0]
    return row == shape[0]


@contextmanager
def _original_error() -> Iterator[None]:
    """Context that raises a rank's own error in place of torch.distributed.checkpoint's CheckpointException around it.

    That one is a BaseException, which `except Exception` misses.
    """
    try:
        yield
    except CheckpointException as error:
        raise next(iter(error.failures.values()))[0] from None


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """State of the optimizer by parameter name: name/exp_avg, name/exp_avg_sq and name/step; of Muon name/momentum."""
    return {
        f"{name}/{key}": value
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state[parameter].items()
    }


def load_optimizer(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Load the optimizer's state from the `OPTIMIZER` folder of a verified checkpoint.

    Parameters without saved state get none. Those that only losses of weight 0 use have none.
    """
    found = read_folder_shapes(folder)
    states: dict[str, dict[str, Tensor]] = {}
    for name, parameter in model.named_parameters():
        if f"{name}/momentum" in found:
            states[name] = {"momentum": torch.zeros_like(parameter)}
        elif f"{name}/step" in found:
            step = torch.zeros((), dtype=torch.float32, device=parameter.device)
            states[name] = {
                "step": step,
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }
    read_tensors(folder, {f"{name}/{key}": t for name, state in states.items() for key, t in state.items()})
    for name, parameter in model.named_parameters():
        if name in states:
            optimizer.state[parameter] = states[name]


def read_state(folder: Path) -> dict[str, Any]:
    """Read state.json of a verified checkpoint. RunError if it is no JSON object."""
    return read_json(folder / STATE, "state", "the state of a run", RunState)


def generator_states(device: torch.device) -> dict[str, Tensor]:
    """States of torch's random generators on this rank, by device type: uint8 (bytes,)."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def set_generators(folder: Path, rank: int, device: torch.device) -> None:
    """Restore this rank's generators from a verified checkpoint. A rank without saved states keeps its own."""
    file = folder / GENERATORS / rank_file(rank)
    if not file.is_file():
        return
    states = read_safetensors(file)
    torch.set_rng_state(states["cpu"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)
