"""Description of the machine and of the revision under test, and the roofline of a GPU."""

import os
import platform
import re
import subprocess
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import mvlm_kernels
from mvlm_kernels.hardware import Gpu

CPU_FIGURES = "CPU: torch references, no Triton kernel"
GPU_FIGURES = "GPU"
_KIND = {"family": "cpu family", "model": "model", "stepping": "stepping"}


def describe(device: str, distributions: list[str]) -> dict[str, Any]:
    """Machine and package versions, stored with every result. Unknown values are "".

    Args:
        device: "cpu" or "cuda".
        distributions: packages whose versions are listed under `versions`.
    """
    commit, dirty = source_commit()
    return {
        "figures": GPU_FIGURES if device == "cuda" else CPU_FIGURES,
        "device": torch.cuda.get_device_name() if device == "cuda" else _cpu_name(),
        "driver": driver_version() if device == "cuda" else "",
        "torch": torch.__version__,
        "triton": _version("triton"),
        "cuda": (torch.version.cuda or "") if device == "cuda" else "",
        "python": platform.python_version(),
        "commit": commit,
        "dirty": dirty,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {name: _version(name) for name in sorted(set(distributions) - {"torch"})},
    }


def _version(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return ""


def _cpu_name() -> str:
    """Name of the processor, its kind, the instructions and the number of threads that torch uses.

    The name alone tells little: that of a virtual machine may be "AMD EPYC", with or without bf16.
    """
    info = Path("/proc/cpuinfo")
    facts = dict(re.findall(r"^(.+?)\s*:\s*(.+)$", info.read_text(), re.MULTILINE)) if info.exists() else {}
    name = facts.get("model name", platform.processor() or platform.machine()).strip()
    kind = [f"{key} {facts[field]}" for key, field in _KIND.items() if field in facts]
    bf16 = ["bf16"] if {"avx512_bf16", "amx_bf16"} & set(facts.get("flags", "").split()) else []
    instructions = [torch.backends.cpu.get_cpu_capability(), *bf16]
    return ", ".join([name, *kind, " with ".join(instructions), f"{torch.get_num_threads()} threads"])


def load() -> str:
    """The load of the machine over the last minute, in words."""
    processes, cores = os.getloadavg()[0], len(os.sched_getaffinity(0))
    advice = "; other work takes time: trust the processor time, or wait" if processes > cores / 2 else ""
    return f"load {processes:.1f} on {cores} cores{advice}"


def driver_version() -> str:
    """Version of the NVIDIA driver, or "" if nvidia-smi is missing, or hangs as in some containers."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.split("\n")[0].strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""


def gpu_arch() -> int:
    """Compute capability of this process's GPU, such as 90."""
    major, minor = torch.cuda.get_device_capability()
    return 10 * major + minor


def source_root() -> Path:
    """Folder that contains kernels/mvlm_kernels. It is a git repository in a checkout, not in an installation."""
    return Path(mvlm_kernels.__file__).parents[2]


def git(root: Path, *arguments: str) -> subprocess.CompletedProcess[bytes] | None:
    """Run git in `root` and return the finished command, or None if git is not installed."""
    try:
        return subprocess.run(["git", "-C", str(root), *arguments], capture_output=True)
    except OSError:
        return None


def source_commit() -> tuple[str, bool | str]:
    """Git revision of the kernels, and True if the checkout has changes; ("", "") outside a checkout."""
    root = source_root()
    # Installed kernels may be in an environment inside another repository, whose revision would be wrong.
    tracked = git(root, "ls-files", "--error-unmatch", "kernels/mvlm_kernels/__init__.py")
    if tracked is None or tracked.returncode:
        return "", ""
    revision, status = git(root, "rev-parse", "--short=12", "HEAD"), git(root, "status", "--porcelain")
    if revision is None or revision.returncode or status is None:
        return "", ""
    return revision.stdout.decode().strip(), bool(status.stdout.strip())


def roofline_us(minimum: tuple[int, int], flops: tuple[int, int], gpu: Gpu) -> dict[str, float]:
    """Lower bound on the microseconds of each pass: the larger of bytes / bandwidth and operations / matrix peak.

    Args:
        minimum: fewest bytes of (forward, backward).
        flops: floating-point operations of (forward, backward).
        gpu: peak rates in bytes/s and operations/s.
    """
    forward, backward = (
        1e6 * max(moved / gpu.bandwidth, count / gpu.flops) for moved, count in zip(minimum, flops, strict=True)
    )
    return {"forward": forward, "backward": backward, "both": forward + backward}
