"""Checks and conversions of arguments that several ops share, and the dtype in which they compute."""

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from mvlm_kernels.dispatch import Refusal, check_number, power_of_two, refusal

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
ChannelValues = Sequence[float] | Tensor | None
MAX_TILE = 32768
"""Values of a tile of pixels. With 16 warps this is 64 values per thread, about the most that fits without spilling."""


def compute_dtype(*dtypes: torch.dtype) -> torch.dtype:
    """The dtype in which values of these dtypes are computed and summed: float64 if one of them is, else float32."""
    return torch.float64 if torch.float64 in dtypes else torch.float32


def check_images(images: Tensor, patch_size: int) -> int:
    """Number of patches N of images (B, C, H, W).

    Raises ValueError for another rank, a dtype that is neither uint8 nor floating, and a patch size that does not
    divide H and W.
    """
    if not isinstance(images, Tensor):
        raise ValueError(f"images must be a tensor, got {type(images).__name__}")
    if images.ndim != 4:
        raise ValueError(f"images must have shape (B, C, H, W), got {tuple(images.shape)}")
    if isinstance(patch_size, tuple | list | float | Tensor):
        raise ValueError(f"patch_size must be an int, the side of a square patch, got {patch_size!r}")
    if images.dtype != torch.uint8 and images.dtype not in FLOATS:
        raise ValueError(f"images must be uint8, float16, bfloat16, float32 or float64, got {images.dtype}")
    _, channels, height, width = images.shape
    if patch_size < 1 or height % patch_size or width % patch_size:
        raise ValueError(f"patch_size must divide the image's height and width {(height, width)}, got {patch_size}")
    if channels < 1:
        raise ValueError(f"images must have at least one channel, got {tuple(images.shape)}")
    return (height // patch_size) * (width // patch_size)


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
    if not isinstance(ids, Tensor):
        raise ValueError(f"{name} must be a tensor, got {type(ids).__name__}")
    if ids.dtype not in (torch.int32, torch.int64):
        hint = "; of a bool mask with as many patches in every row, pass mask.nonzero()[:, 1].view(B, K)"
        raise ValueError(f"{name} must be int32 or int64, got {ids.dtype}{hint if ids.dtype == torch.bool else ''}")
    if ids.ndim != 2 or ids.shape[0] != batch:
        raise ValueError(f"{name} must have shape (B, K) with the B of {other}, ({batch}, K), got {tuple(ids.shape)}")
    check_device(name, ids, device)


def check_device(name: str, x: Tensor, device: torch.device) -> None:
    if x.device != device:
        raise ValueError(f"{name} must be on the device of the other inputs, {device}, got {x.device}")


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
    kept = not torch.compiler.is_compiling() and type(images) in (Tensor, torch.nn.Parameter)
    channels = images.shape[1]
    return (
        None if mean is None else _channel_tensor("mean", mean, channels, wide, device, kept),
        None if std is None else _channel_tensor("std", std, channels, wide, device, kept),
    )


def _channel_tensor(
    name: str, values: Sequence[float] | Tensor, channels: int, wide: torch.dtype, device: torch.device, kept: bool
) -> Tensor:
    if not isinstance(values, Tensor):
        got = len(values) if hasattr(values, "__len__") else values
        if got != channels:
            raise ValueError(f"{name} must have one value for each of {channels} channels, got {got}")
        if not kept or torch._C._are_functorch_transforms_active():
            _check_numbers(name, values)
            # A tensor made in a compiled graph must not be cached: it could be in the memory of a CUDA graph, or a fake
            # tensor without values. These fills are part of the graph and copy nothing from the host. A tensor made in
            # a transform of torch.func belongs to that transform.
            return torch.stack([torch.full((), v, dtype=wide, device=device) for v in values])
        return _constant(name, tuple(values), wide, device)
    if values.shape != (channels,) or values.dtype not in FLOATS:
        raise ValueError(
            f"{name} must be floating with one value for each of {channels} channels, "
            f"got {values.dtype} of shape {tuple(values.shape)}"
        )
    check_device(name, values, device)
    if kept and device.type == "cpu":  # on a GPU reading the values would wait for the device
        _check_positive(name, values.tolist())
    return values.contiguous()


def _check_numbers(name: str, values: Sequence[float]) -> None:
    for value in values:
        if not isinstance(value, Tensor):  # which may be on a GPU
            check_number(name, value)
    _check_positive(name, values)


def _check_positive(name: str, values: Sequence[float]) -> None:
    if name == "std" and min(values) <= 0:
        raise ValueError(f"std must be positive, got {tuple(values)}")


@functools.lru_cache(maxsize=256)
def _constant(name: str, values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    _check_numbers(name, values)
    with torch.inference_mode(False):  # an inference tensor could not be saved for a later backward pass
        return torch.tensor(values, dtype=dtype, device=device)


@functools.cache
def tile_reasons(channels: int, patch_size: int) -> tuple[Refusal, ...]:
    """Reasons against Triton for patches that do not fit a tile."""
    pixels = power_of_two(channels) * power_of_two(patch_size**2)
    if pixels <= MAX_TILE:
        return ()
    reason = (
        f"a patch of {channels} x {patch_size}^2 pixels needs a tile of {pixels} values, the kernels take {MAX_TILE}"
    )
    return (refusal(reason, "torch runs; use smaller patches"),)
