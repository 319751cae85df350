"""Checks and conversions of arguments that several ops share, and the dtype in which they compute."""

import functools
from collections.abc import Sequence
from typing import Any

import numpy
import torch
from torch import Tensor
from torch.masked import is_masked_tensor
from torch.nn.parameter import is_lazy

from mvlm_kernels.dispatch import Refusal, power_of_two, refusal
from mvlm_kernels.registration import PLAIN

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INDICES = (torch.int32, torch.int64)
_DENSE = torch.strided
LARGEST = 2.0**127
"""Largest number that an op takes. Kernels compute in float32, and their scale is multiplied by log2(e)."""
ChannelValues = Sequence[float] | Tensor | None
MAX_TILE = 32768
"""Values of a tile of pixels. With 16 warps this is 64 values per thread, about the most that fits without spilling."""


def compute_dtype(*dtypes: torch.dtype) -> torch.dtype:
    """The dtype in which values of these dtypes are computed and summed: float64 if one of them is, else float32."""
    return torch.float64 if torch.float64 in dtypes else torch.float32


def check_tensor(
    name: str, x: Any, dtypes: tuple[torch.dtype, ...] = FLOATS, device: torch.device | None = None
) -> None:
    """Raise ValueError unless x is a dense tensor of one of the dtypes, and on `device` if one is given.

    An empty tuple of dtypes stands for all.
    """
    if type(x) not in PLAIN:
        _check_class(name, x)
    if x.layout is not _DENSE or x.is_nested:
        raise ValueError(f"{name} must be dense, got {'a nested tensor' if x.is_nested else x.layout}{_way_out(x)}")
    if dtypes and x.dtype not in dtypes:
        *others, last = (str(dtype).removeprefix("torch.") for dtype in dtypes)
        wanted = f"{', '.join(others)} or {last}" if others else last
        raise ValueError(f"{name} must be {wanted}, got {x.dtype}")
    if device is not None and x.device != device:
        raise ValueError(f"{name} must be on the device of the other inputs, {device}, got {x.device}")


def _check_class(name: str, x: Any) -> None:
    if not isinstance(x, Tensor):
        raise ValueError(f"{name} must be a tensor, got {type(x).__name__}")
    if torch.compiler.is_compiling():
        return
    if is_lazy(x):
        raise ValueError(f"{name} must have values, got {type(x).__name__}; call its module once")
    if is_masked_tensor(x):
        raise ValueError(f"{name} must be a tensor without a mask, got {type(x).__name__}; pass its get_data()")


def _way_out(x: Tensor) -> str:
    if not x.is_nested:
        return "; pass its to_dense()"
    return "; pass its to_padded_tensor(0), or to cross_attention its values() and offsets() as cu_seqlens"


def check_number(name: str, value: Any, least: float = -LARGEST) -> float:
    """The number as a float. Raise ValueError unless it is an int or a float, of Python or NumPy, in [least, LARGEST].

    A compiler's symbolic number is not compared, which would make another graph of each value.
    """
    if type(value) is not float:
        value = _of_python(value)
        if isinstance(value, bool) or not isinstance(value, int | float | torch.SymInt | torch.SymFloat):
            raise ValueError(f"{name} must be a float, got {_shown(value)}")
    if torch.compiler.is_compiling() or isinstance(value, torch.SymFloat | torch.SymInt):
        return value  # pyright: ignore[reportReturnType] (it stands for a float)
    if not least <= value <= LARGEST:  # nor for NaN
        raise ValueError(f"{name} must be a float in {least:.3g}..{LARGEST:.3g}, got {_shown(value)}")
    return float(value)


def check_int(name: str, value: Any, least: int) -> int:
    """The number as an int. Raise ValueError unless it is an int, of Python or NumPy, from `least` to 2^63 - 1."""
    if type(value) is int and least <= value < 2**63:
        return value
    value = _of_python(value)
    if isinstance(value, torch.SymInt):
        return value  # pyright: ignore[reportReturnType] (it stands for an int)
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value < 2**63:
        raise ValueError(f"{name} must be an int in {least}..2^63 - 1, got {_shown(value)}")
    return value


def check_flag(name: str, value: Any) -> bool:
    """The value as a bool. Raise ValueError unless it is True or False, of Python or NumPy."""
    if value is True or value is False:
        return value
    value = _of_python(value)
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be True or False, got {_shown(value)}")
    return value


def check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    """Raise ValueError unless the value is one of the texts."""
    if not isinstance(value, str) or value not in choices:
        *others, last = (f'"{choice}"' for choice in choices)
        raise ValueError(f"{name} must be {', '.join(others)} or {last}, got {_shown(value)}")


def check_dtype(name: str, dtype: Any) -> None:
    """Raise ValueError unless the dtype is floating."""
    if not isinstance(dtype, torch.dtype) or dtype not in FLOATS:
        raise ValueError(f"{name} must be float16, bfloat16, float32 or float64, got {_shown(dtype)}")


def _of_python(value: Any) -> Any:
    """A NumPy scalar as Python's own, which has the same value, and anything else as it is."""
    return value.item() if isinstance(value, numpy.generic) else value


def _shown(value: Any) -> str:
    """A value on one line: itself if it is short, else its type."""
    if isinstance(value, int) and abs(value) >= 2**63:
        return f"an int of {value.bit_length()} bits"
    if value is None or isinstance(value, str | bytes | bool | int | float | complex | torch.dtype):
        return repr(value)[:60]
    return type(value).__name__


def check_images(images: Tensor, patch_size: Any) -> tuple[int, int]:
    """The patch size as an int, and the number of patches N of images (B, C, H, W).

    Raises ValueError for another rank, a dtype that is neither uint8 nor floating, and a patch size that does not
    divide H and W.
    """
    check_tensor("images", images, (torch.uint8, *FLOATS))
    if images.ndim != 4:
        raise ValueError(f"images must have shape (B, C, H, W), got {tuple(images.shape)}")
    patch_size = check_int("patch_size", patch_size, 1)
    _, channels, height, width = images.shape
    if height % patch_size or width % patch_size:
        raise ValueError(f"patch_size must divide the image's height and width {(height, width)}, got {patch_size}")
    if channels < 1:
        raise ValueError(f"images must have at least one channel, got {tuple(images.shape)}")
    return patch_size, (height // patch_size) * (width // patch_size)


def check_patch_ids(patch_ids: Tensor | None, images: Tensor, num_patches: int) -> int:
    """Number of chosen patches K; N for None. Raises ValueError for another shape, dtype or device."""
    if patch_ids is None:
        return num_patches
    check_ids("patch_ids", patch_ids, images.shape[0], "images", images.device)
    return patch_ids.shape[1]


def check_ids(name: str, ids: Tensor, batch: int, other: str, device: torch.device) -> None:
    """Raise ValueError unless ids is int32 or int64 (batch, K) on ``device``.

    other: name of the argument whose first dimension is batch, for the message.
    """
    check_tensor(name, ids, (*INDICES, torch.bool), device)
    if ids.dtype == torch.bool:
        way_out = "of a mask with as many patches in every row, pass mask.nonzero()[:, 1].view(B, K)"
        raise ValueError(f"{name} must be int32 or int64, got {ids.dtype}; {way_out}")
    if ids.ndim != 2 or ids.shape[0] != batch:
        raise ValueError(f"{name} must have shape (B, K) with the B of {other}, ({batch}, K), got {tuple(ids.shape)}")


def check_id_values(name: str, ids: Tensor | None, limit: int) -> None:
    """Raise ValueError unless every id is in [0, limit). Reads the ids, which on a GPU waits for the device.

    The ops call it, not the public functions, because under torch.compile only the ops have real tensors.
    """
    if ids is None or not ids.numel():
        return
    low, high = (int(x) for x in ids.aminmax())
    if low < 0 or high >= limit:
        raise ValueError(f"{name} must be in [0, {limit}), got values in [{low}, {high}]")


def channel_tensors(
    mean: ChannelValues, std: ChannelValues, images: Tensor, dtype: torch.dtype
) -> tuple[Tensor | None, Tensor | None]:
    """mean and std as contiguous tensors (C,) on the images' device, or None.

    A sequence is converted to the compute dtype and cached per device. Raises ValueError for a wrong number of values,
    a wrong dtype, a sequence of other than finite numbers, and a std that is not positive. The values of a GPU tensor
    are not checked.
    """
    wide, device = compute_dtype(images.dtype, dtype), images.device
    kept = not torch.compiler.is_compiling() and type(images) in PLAIN
    channels = images.shape[1]
    return (
        None if mean is None else _channel_tensor("mean", mean, channels, wide, device, kept),
        None if std is None else _channel_tensor("std", std, channels, wide, device, kept),
    )


def _channel_tensor(
    name: str, values: Sequence[float] | Tensor, channels: int, wide: torch.dtype, device: torch.device, kept: bool
) -> Tensor:
    if not isinstance(values, Tensor):
        if not kept or torch._C._are_functorch_transforms_active():
            # A tensor made in a compiled graph must not be cached: it could be in the memory of a CUDA graph, or a fake
            # tensor without values. These fills are part of the graph and copy nothing from the host. A tensor made in
            # a transform of torch.func belongs to that transform.
            numbers = _numbers(name, values, channels)
            return torch.stack([torch.full((), v, dtype=wide, device=device) for v in numbers])
        if type(values) not in (list, tuple):
            values = _numbers(name, values, channels)
        try:
            return _constant(name, channels, wide, device, *values)
        except TypeError:  # for a value without a hash
            _numbers(name, values, channels)
            raise
    check_tensor(name, values, FLOATS, device)
    if values.shape != (channels,):
        raise ValueError(f"{name} must have one value for each of {channels} channels, got {tuple(values.shape)}")
    if kept and device.type == "cpu":  # on a GPU reading the values would wait for the device
        _check_positive(name, values.tolist())
    return values.contiguous()


def _numbers(name: str, values: Any, channels: int) -> tuple[float, ...]:
    if isinstance(values, numpy.ndarray):
        values = values.tolist()
    if isinstance(values, str | bytes) or not isinstance(values, Sequence):
        raise ValueError(f"{name} must be a sequence of {channels} numbers or a tensor, got {_shown(values)}")
    if len(values) != channels:
        raise ValueError(f"{name} must have one value for each of {channels} channels, got {len(values)}")
    numbers = tuple([check_number(name, value) for value in values])
    _check_positive(name, numbers)
    return numbers


def _check_positive(name: str, values: Sequence[float]) -> None:
    if name == "std" and min(values) <= 0:
        raise ValueError(f"std must be positive, got {tuple(values)}")


@functools.lru_cache(maxsize=256, typed=True)  # True is no number, and equals 1.0
def _constant(name: str, channels: int, dtype: torch.dtype, device: torch.device, *values: float) -> Tensor:
    values = _numbers(name, values, channels)
    with torch.inference_mode(False):  # an inference tensor could not be saved for a later backward pass
        return torch.tensor(values, dtype=dtype, device=device)


@functools.cache
def tile_reasons(channels: int, patch_size: int) -> tuple[Refusal, ...]:
    """Reasons why Triton cannot run on patches of this size, which do not fit a tile of MAX_TILE values; else empty."""
    pixels = power_of_two(channels) * power_of_two(int(patch_size) ** 2)
    if pixels <= MAX_TILE:
        return ()
    reason = (
        f"a patch of {channels} x {patch_size}^2 pixels needs a tile of {pixels} values, the kernels take {MAX_TILE}"
    )
    return (refusal(reason, "torch runs; use smaller patches"),)
