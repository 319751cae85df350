"""The machine, the package versions and the revision of the code that make a result."""

import os
import platform
import subprocess
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("torch", "triton", "numpy", "nvidia-dali-cuda130", "nvidia-dali-cuda120", "tokenizers")
"""Packages whose versions the numbers of a run depend on."""


FINER = {"family": "cpu family", "model": "model", "stepping": "stepping"}
"""Names of ours for the fields of /proc/cpuinfo in which processors with equal names may differ."""


@cache
def code_revision() -> str:
    """Short revision of the repository that this package lies in, with `-dirty` if it has changes; "" outside one.

    Untracked files are not changes. It is read once in a process.
    """
    folder = str(Path(__file__).parent)

    def git(*words: str) -> str:
        command = ["git", "-C", folder, *words]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()

    try:
        # An installed package may lie inside another repository, whose revision would be wrong.
        git("ls-files", "--error-unmatch", Path(__file__).name)
        revision = git("rev-parse", "--short=12", "HEAD")
        return revision + "-dirty" * bool(git("status", "--porcelain", "--untracked-files=no"))
    except (OSError, subprocess.SubprocessError):
        return ""


@cache
def cpu_facts() -> dict[str, str]:
    """Fields of the first processor in /proc/cpuinfo, such as `model name`; empty where there is no such file."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text().split("\n\n")[0].splitlines() if file.is_file() else []
    return {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}


def processor_name() -> str:
    """Model name of the processor, or its architecture where the system has no name."""
    return cpu_facts().get("model name") or platform.machine()


def describe_machine(device: torch.device, ranks: int = 1) -> dict[str, Any]:
    """Device, processor, cores that this process may use, threads of torch, and the number of ranks of a run.

    `device` is "cpu" or the GPU's name. A processor is told from others of its name by family, model and stepping.
    """
    facts = cpu_facts()
    kind = [f"{name} {facts[key]}" for name, key in FINER.items() if key in facts]
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "processor": ", ".join([processor_name(), *kind]),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "ranks": ranks,
    }


def package_versions() -> dict[str, str]:
    """Versions of Python and of the installed packages that the numbers of a run depend on."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
