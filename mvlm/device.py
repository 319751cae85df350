"""Device and precision of a run on this machine."""

import contextlib

import torch
from torch import Tensor

from mvlm.errors import ConfigError


def choose_device(wanted: str = "auto") -> torch.device:
    """The device for "auto" (the GPU when there is one), "cpu" or "cuda"; ConfigError where there is no such device."""
    if wanted not in ("auto", "cpu", "cuda"):
        raise ConfigError(f"device: wanted auto, cpu or cuda, got {wanted!r}")
    if wanted == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device: wanted cuda, but torch finds no CUDA device here; use --device cpu")
    return torch.device("cuda" if wanted == "cuda" or (wanted == "auto" and torch.cuda.is_available()) else "cpu")


def has_fast_bf16(device: torch.device) -> bool:
    """Whether bf16 matrix products run in hardware (AVX512-BF16 or AMX on a CPU)."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    # The one place where torch tells; there is no public name for it yet.
    capabilities = torch.backends.cpu.get_cpu_capability()
    return "AVX512" in capabilities and bool(
        torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    )


def autocast(device: torch.device, precision: str = "auto") -> contextlib.AbstractContextManager[object]:
    """bf16 autocast where `precision` ("auto", "bf16" or "fp32") asks for it, else a context that does nothing."""
    if precision == "bf16" or (precision == "auto" and has_fast_bf16(device)):
        return torch.autocast(device.type, torch.bfloat16)
    return contextlib.nullcontext()


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype of a matrix product of x here: autocast's, or x's own."""
    kind = x.device.type
    if x.dtype != torch.float64 and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return x.dtype
