"""Folders and safetensors; `mvlm_dataloading.files` has checksums, JSON, and writes forced to the disk.

safetensors is imported when a file is read or written, so that a model can be built and timed with torch alone.
"""

import os
import secrets
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor, nn

from mvlm.errors import RunError
from mvlm_dataloading import files


def check_folder(path: Path, wanted: str) -> None:
    """Raise RunError unless `path` is a folder. `wanted` is the noun phrase for it in the error."""
    if not path.is_dir():
        found = "a file" if path.exists() else "no such folder"
        raise RunError(f"{path}: wanted {wanted}, found {found}; check the path")


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder to write to, which becomes `out` when the block ends without an error, and else is removed.

    RunError if `out` is a file, or a folder that is not empty.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise RunError(f"{out}: wanted a new or empty folder, found other files; choose another one")
    final = Path(os.path.realpath(out))
    # A random name: a process that was killed may have left a folder, and in a container a later one has its number.
    with files.new_folder(final, final.with_name(f".{final.name}.{secrets.token_hex(4)}.partial")) as aside:
        yield aside


def read_safetensors(file: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file by name, on the CPU. RunError if it cannot be read as one."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        file.open("rb").close()  # safetensors says of a file that may not be read that there is none
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise RunError(
            f"{file}: wanted a safetensors file, could not read it: {error}; restore the file or its permissions"
        ) from None


def write_safetensors(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors by name to a safetensors file; contiguous copies are made if necessary."""
    from safetensors.torch import save_file

    file.touch()
    mode = stat.S_IMODE(file.stat().st_mode)  # as the umask says, or as an earlier file had it
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file)
    if stat.S_IMODE(file.stat().st_mode) != mode:  # safetensors 0.8 makes files that their owner alone may read
        file.chmod(mode)


def copy_into(wanted: dict[str, Tensor], found: dict[str, Tensor], where: Path) -> None:
    """Copy the tensors `found` into `wanted` in place. If names or shapes do not fit, RunError, and nothing is copied.

    `where` is the source's path, for the error.
    """
    check_fit({n: tuple(t.shape) for n, t in wanted.items()}, {n: tuple(t.shape) for n, t in found.items()}, where)
    for name, tensor in wanted.items():
        tensor.copy_(found[name])


def check_fit(wanted: dict[str, tuple[int, ...]], found: dict[str, tuple[int, ...]], where: Path) -> None:
    """Raise RunError if names or shapes of `found` are not those of `wanted`. It lists the first three differences."""
    wrong = [f"{name} missing" for name in wanted if name not in found]
    wrong += [f"{name} unexpected" for name in found if name not in wanted]
    wrong += [
        f"{name} wanted {shape}, got {found[name]}"
        for name, shape in wanted.items()
        if name in found and found[name] != shape
    ]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise RunError(
            f"{where}: wanted the tensors of this model's architecture, found others: {'; '.join(wrong[:3])}{more}; "
            f"use a checkpoint or a model configuration that fits"
        )


def load_weights(model: nn.Module, file: Path) -> None:
    """Load a safetensors file into a model. RunError lists what does not fit; the model is then unchanged."""
    copy_into(model.state_dict(), read_safetensors(file), file)
