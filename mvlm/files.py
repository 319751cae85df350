"""Folders and safetensors of models and runs; `mvlm.untrusted` reads JSON, `mvlm_dataloading.files` writes it.

safetensors is imported when a file is read or written, so that a model can be built and timed with torch alone.
"""

import errno
import json
import math
import os
import secrets
import stat
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from torch import Tensor, nn

from mvlm.errors import RunError
from mvlm.untrusted import run_errors
from mvlm_dataloading import files, untrusted

LOCK = ".lock"
"""Name of the file in a folder on which a process holds a lock while it writes there."""
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
"""Dtypes that tensors of a file of weights may have. They are converted to the model's own when they are read."""


def check_folder(path: Path, wanted: str) -> None:
    """Raise RunError unless `path` is a folder. `wanted` is the noun phrase for it in the error."""
    if not path.is_dir():
        found = "a file" if path.exists() else "no such folder"
        raise RunError(f"{path}: wanted {wanted}, found {found}; check the path")


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """Context with a new folder, which is renamed to `out` if the block ends without an error, and else removed.

    RunError if `out` is a file, or a folder that is not empty.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise RunError(f"{out}: wanted a new or empty folder, found other files; choose another one")
    final = Path(os.path.realpath(out))
    # A random name: a process that was killed may have left a folder, and in a container a later one has its number.
    with files.new_folder(final, final.with_name(f".{final.name}.{secrets.token_hex(4)}.partial")) as aside:
        yield aside


def lock_folder(folder: Path) -> AbstractContextManager[object]:
    """Make a folder and lock it. Returns a context that holds the lock, until the process ends, even by kill -9.

    RunError if another process has it, or if nobody can.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # A file of its own, because NFS locks only files that are open for writing, never folders.
    try:
        return FileLock(folder / LOCK, timeout=0).acquire()
    except Timeout:
        raise RunError(f"{folder}: wanted a folder that no other process writes to; wait for it or stop it") from None
    except OSError as error:
        raise RunError(f"{folder / LOCK}: cannot be locked ({error.strerror}); choose another folder") from None


def read_safetensors(file: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file by name, on the CPU. RunError if it cannot be read as one."""
    from safetensors.torch import load_file

    with _readable(file):
        return load_file(file)


def read_shapes(file: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors of a safetensors file by name, from its header. RunError if it cannot be read as one."""
    from safetensors import safe_open

    with _readable(file), safe_open(file, "pt") as opened:  # which compares the header with the file's length
        return {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118


@contextmanager
def _readable(file: Path) -> Iterator[None]:
    """Context in which a safetensors file is read: OSErrors and errors of its format become RunErrors that name it."""
    from safetensors import SafetensorError

    try:
        with run_errors():
            # safetensors says of a file that may not be read that there is none, and waits for a pipe.
            untrusted.open_regular(file).close()
        yield
    except (OSError, SafetensorError) as error:
        raise RunError(
            f"{file}: wanted a safetensors file, could not read it: {error}; restore the file or its permissions"
        ) from None


def write_safetensors(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors by name to a safetensors file; contiguous copies are made if necessary."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    file.touch()
    mode = stat.S_IMODE(file.stat().st_mode)  # as the umask says, or as an earlier file had it
    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file)
    except SafetensorError as error:
        raise OSError(errno.ENOSPC if "os error 28" in str(error) else errno.EIO, str(error), str(file)) from None
    if stat.S_IMODE(file.stat().st_mode) != mode:  # safetensors 0.8 makes files that their owner alone may read
        file.chmod(mode)


def sort_metadata(file: Path) -> None:
    """Sort the metadata of a safetensors file by name, in place, so that files of equal content are equal.

    safetensors writes them in an order that is drawn anew for each file.
    """
    with file.open("r+b") as opened:
        size = int.from_bytes(opened.read(8), "little")
        written = opened.read(size)
        header = json.loads(written)
        header |= {name: dict(sorted(header[name].items())) for name in {"__metadata__"} & header.keys()}
        content = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode().ljust(size)
        if len(content) == size and content != written:  # it is shorter or as long, as the tensors lie behind it
            opened.seek(8)
            opened.write(content)


def copy_into(wanted: dict[str, Tensor], stored: dict[str, Tensor], where: Path) -> None:
    """Copy the tensors `stored` into `wanted` in place. If names, shapes or types do not fit, RunError, without a copy.

    RunError after the copy for values that are not finite. `where` is the source's path, for errors.
    """
    check_fit({n: tuple(t.shape) for n, t in wanted.items()}, {n: tuple(t.shape) for n, t in stored.items()}, where)
    check_types(wanted, {name: {tensor.dtype} for name, tensor in stored.items()}, where)
    for name, tensor in wanted.items():
        tensor.copy_(stored[name])
    check_finite(wanted, where)


def check_fit(wanted: dict[str, tuple[int, ...]], stored: dict[str, tuple[int, ...]], where: Path) -> None:
    """Raise RunError if names or shapes of `stored` are not those of `wanted`. It lists the first three differences."""
    wrong = [f"{name} missing" for name in wanted if name not in stored]
    wrong += [f"{name} unexpected" for name in stored if name not in wanted]
    wrong += [
        f"{name} wanted {shape}, got {stored[name]}"
        for name, shape in wanted.items()
        if name in stored and stored[name] != shape
    ]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise RunError(
            f"{where}: wanted the tensors of this model's architecture, found others: {'; '.join(wrong[:3])}{more}; "
            f"use a checkpoint or a model configuration that fits"
        )


def check_types(wanted: Mapping[str, Tensor], stored: Mapping[str, set[torch.dtype]], where: Path) -> None:
    """Raise RunError if a stored tensor has another dtype than the wanted one; floating ones may be any of `FLOATS`.

    The same bytes are other numbers in another type, and torch would convert integers to floats without a word.

    Args:
        stored: dtypes of all parts of each tensor, by name.
    """
    for name, tensor in wanted.items():
        if other := stored[name] - {*(FLOATS if tensor.dtype in FLOATS else (tensor.dtype,))}:
            kind = "floats of 16 to 64 bits" if tensor.dtype in FLOATS else str(tensor.dtype)
            raise RunError(
                f"{where}: wanted {name} as {kind}, found {', '.join(map(str, other))}; restore the file, or use "
                f"another model"
            )


def check_finite(tensors: Mapping[str, Tensor], where: Path) -> None:
    """Raise RunError for a tensor with a value that is NaN or infinite.

    Reads each tensor once: 0.2 s for the 335 M parameters of `base` in fp32, on one core.
    """
    for name, tensor in tensors.items():
        to_local = getattr(tensor, "to_local", None)  # of a DTensor, of which each rank looks at its own part
        local: Tensor = tensor if to_local is None else to_local()
        if local.is_floating_point() and not is_finite(local):
            raise RunError(
                f"{where}: wanted finite values, found NaN or infinity in {name}; restore the file, or use another "
                f"model"
            )


def is_finite(tensor: Tensor) -> bool:
    """True if no value is NaN or infinite. A sum is one pass without a copy; only one that overflows needs another."""
    return math.isfinite(tensor.sum().item()) or bool(tensor.isfinite().all())


def load_weights(model: nn.Module, file: Path) -> None:
    """Load a safetensors file into a model. RunError lists what does not fit; the model is then unchanged."""
    copy_into(model.state_dict(), read_safetensors(file), file)
