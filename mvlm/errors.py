"""Errors of mvlm. The command line prints them on one line.

ConfigError and RunError: the user can correct them; exit code 2. LostRankError and NonFiniteLossError: the run ends
early; exit code 1.
"""

import errno
import operator
from typing import Any

from mvlm_dataloading.errors import MissingPackageError

EXTRAS = {
    **dict.fromkeys(("PIL", "fsspec", "nvidia", "pyarrow", "tokenizers"), "data"),
    **dict.fromkeys(
        ("filelock", "huggingface_hub", "jinja2", "msgspec", "rich", "safetensors", "scipy", "tensorboard", "tyro"),
        "train",
    ),
    **dict.fromkeys(("onnx", "onnxruntime", "onnxscript"), "export"),
    "gradio": "app",
    "lancedb": "search",
    "obstore": "remote",
    "ray": "ray",
}
"""Module of an optional package -> the extra of mvlm that installs it."""


class ConfigError(ValueError):
    """A setting with a value that is not allowed or cannot be used here."""


class RunError(ValueError):
    """A run folder, checkpoint or file that is missing, damaged, or not of the kind that was expected."""


class LostRankError(RuntimeError):
    """Another process of the run has died, so this one ends too. The checkpoints are intact."""


class NonFiniteLossError(RuntimeError):
    """Too many updates in a row were skipped: a loss or gradient was NaN or infinite."""


def whole_number(name: str, value: Any, least: int | None = 1, most: int | None = None) -> int:
    """The value as an int. ConfigError if it is no whole number in the range; a bool is none."""
    try:
        found = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        found = None
    if found is None:
        raise ConfigError(f"{name}: wanted a whole number, got {shown(value)}")
    if (least is not None and found < least) or (most is not None and found > most):
        wanted = f"at least {least}" if most is None else f"{least} to {most}"
        raise ConfigError(f"{name}: wanted {wanted}, got {found}")
    return found


def shown(value: Any) -> str:
    """Describe a value for an error: its repr if it is a plain value of at most 40 characters, else its type."""
    if value is None or isinstance(value, bool | int | float | str | bytes):
        written = repr(value)
        if len(written) <= 40:
            return written
    return f"a {type(value).__name__}"


_TOO_LITTLE_MEMORY = (
    "can't allocate memory", "cannot allocate memory", "failed to map segment", "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
)  # fmt: skip
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NO_ROOM_WORDS = ("No space left on device", "os error 28", "Disk quota exceeded", "File too large", "os error 27")


def is_out_of_memory(error: BaseException) -> bool:
    """True for an error of torch, Python or the system that says that memory of the machine or its GPU is used up."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    # torch has a class for a GPU's memory alone. It is known by its name, as torch is slow to import.
    says = any(words in str(error) for words in _TOO_LITTLE_MEMORY)
    torch_says = type(error).__name__ == "OutOfMemoryError" or says
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError | ImportError) and torch_says)


def is_out_of_room(error: BaseException) -> bool:
    """True for an error of the system or a library by which a disk is full, or a quota or a file's limit is reached."""
    if isinstance(error, OSError) and error.errno in _NO_ROOM:
        return True
    # Libraries written in Rust and C++ raise errors of their own, with the system's words.
    return isinstance(error, Exception) and any(words in str(error) for words in _NO_ROOM_WORDS)


def advise_install(error: ImportError) -> str | None:
    """One line with the command that installs the optional package of a failed import; None if it is none of mvlm's."""
    if isinstance(error, MissingPackageError):
        return str(error)
    package, _, module = (error.name or "").partition(".")
    if not isinstance(error, ModuleNotFoundError) or package not in EXTRAS:
        return None
    extra = f"'mvlm[{EXTRAS[package]}]'"
    if module and package != "nvidia":  # a namespace of many packages, of which one is missing
        return f"wanted {error.name}, which the installed {package} does not have; pip install --upgrade {extra}"
    return f"wanted the package {package}, which is not installed; pip install {extra}"
