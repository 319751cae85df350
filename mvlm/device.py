"""Device and precision of computations on this machine."""

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from mvlm.errors import ConfigError
from mvlm_kernels.dispatch import autocast_dtype


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


def chosen_precision(device: torch.device, precision: str = "auto") -> str:
    """The precision that "auto" stands for on a device, "bf16" or "fp32"; these are returned unchanged.

    ConfigError for another name.
    """
    if precision not in ("auto", "bf16", "fp32"):
        raise ConfigError(f"precision: wanted auto, bf16 or fp32, got {precision!r}")
    if precision != "auto":
        return precision
    return "bf16" if has_fast_bf16(device) else "fp32"


def autocast(device: torch.device, precision: str = "auto") -> contextlib.AbstractContextManager[object]:
    """Autocast context for a precision: bf16 autocast for "bf16", no autocast for "fp32".

    "auto" is bf16 on a device with fast bf16, else fp32.
    """
    if chosen_precision(device, precision) == "bf16":
        return torch.autocast(device.type, torch.bfloat16)
    return contextlib.nullcontext()


@contextlib.contextmanager
def deterministic_kernels(device: torch.device) -> Iterator[None]:
    """Inside the block, torch's operations give the same bits in every run on this device.

    Torch's CPU kernels that training uses do so anyway. On a GPU the backward of SDPA adds up in the order in which
    blocks finish: that of cuDNN always, that of flash attention unless deterministic algorithms are asked for. An
    operation without a deterministic kernel warns.
    """
    if device.type != "cuda":
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it when its first handle is made
    settings: Any = torch.utils.deterministic  # torch's stubs leave out its one setting
    mode, filled = torch.get_deterministic_debug_mode(), settings.fill_uninitialized_memory
    cudnn = torch.backends.cuda.cudnn_sdp_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    settings.fill_uninitialized_memory = False  # it would fill every new tensor, and find bugs, not make bits equal
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(mode)
        settings.fill_uninitialized_memory = filled
        torch.backends.cuda.enable_cudnn_sdp(cudnn)


def compute_dtype(x: Tensor) -> torch.dtype:
    """Dtype in which torch now multiplies x with a matrix: autocast's if it is on and x is not float64, else x's."""
    dtype = None if x.dtype == torch.float64 else autocast_dtype(x.device)
    return x.dtype if dtype is None else dtype


def mean_seconds(work: Callable[[], object], device: torch.device, calls: int) -> float:
    """Mean seconds of a call of `work` over `calls` calls in a row, including what they leave a GPU to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    for _ in range(calls):
        work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - started) / calls
