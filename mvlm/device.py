"""Device and precision of computations on this machine."""

import contextlib

import torch
from torch import Tensor

from mvlm.errors import ConfigError


def choose_device(wanted: str = "auto") -> torch.device:
    """The device named "cpu" or "cuda", or for "auto" the GPU if there is one, else the CPU.

    ConfigError for another name, or for "cuda" without a CUDA device.
    """
    if wanted not in ("auto", "cpu", "cuda"):
        raise ConfigError(f"device: wanted auto, cpu or cuda, got {wanted!r}")
    if wanted == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device: wanted cuda, but torch finds no CUDA device here; use --device cpu")
    return torch.device("cuda" if wanted == "cuda" or (wanted == "auto" and torch.cuda.is_available()) else "cpu")


def has_fast_bf16(device: torch.device) -> bool:
    """True if the device computes bf16 matrix products in hardware (on a CPU, AVX512-BF16 or AMX)."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    # torch has no public function for this yet.
    capabilities = torch.backends.cpu.get_cpu_capability()
    return "AVX512" in capabilities and bool(
        torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    )


def autocast(device: torch.device, precision: str = "auto") -> contextlib.AbstractContextManager[object]:
    """Autocast context for a precision: bf16 autocast for "bf16", no autocast for "fp32".

    "auto" is bf16 on a device with fast bf16, else fp32.
    """
    if precision == "bf16" or (precision == "auto" and has_fast_bf16(device)):
        return torch.autocast(device.type, torch.bfloat16)
    return contextlib.nullcontext()


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype of a matrix product of x at this point: autocast's if it is on and x is not float64, else x's."""
    kind = x.device.type
    if x.dtype != torch.float64 and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return x.dtype
