"""Kernels of a pretraining step, compiled before the first one, so that none is compiled in the middle of the run."""

import logging
import os
import re
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext

import torch

from mvlm.config.pretrain import PretrainConfig
from mvlm.device import chosen_precision
from mvlm.distributed.world import World
from mvlm.progress import WorkProgress
from mvlm.runs.folder import RunFolder

log = logging.getLogger(__name__)


def compile_kernels(config: PretrainConfig, world: World) -> None:
    """Compile into Triton's cache what steps launch, for captions of any length. On a GPU and in bf16 alone.

    The first rank of each node does it, in processes of their own, and the others wait. If it fails, a warning says
    why, and kernels are compiled when they are launched.
    """
    device = world.device
    if device.type != "cuda" or config.plan != "fast" or chosen_precision(device, config.precision) != "bf16":
        return
    if world.local_rank == 0:
        pairs = config.batch_size // (world.size * config.accumulate)
        words = ["--config", str(RunFolder(config.out).config), "--pairs", str(pairs)]
        with WorkProgress("kernels") if world.first else nullcontext() as progress:
            good, said = compile_in_processes(
                words, device, lambda done, of: progress.show(done, of, done) if progress else None
            )
        if not good:
            log.warning("kernels are compiled during the first steps: %s", said)
    world.gather_objects(None)


def compile_in_processes(
    words: list[str], device: torch.device, show: Callable[[int, int], None] = lambda *_: None
) -> tuple[bool, str]:
    """Run `mvlm.costs.step_kernels` in a subprocess, for the architecture of a GPU, which it does not use.

    Args:
        words: arguments of that command.
        show: called with the numbers of compiled kernels and of all kernels.

    Returns whether it succeeded, and the last line of its output.
    """
    major, minor = torch.cuda.get_device_capability(device)
    command = [sys.executable, "-m", "mvlm.costs.step_kernels", *words, "--arch", f"sm_{major}{minor}"]
    environment, last = os.environ | {"TRITON_INTERPRET": "0"}, "no output"
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if counted := re.fullmatch(r"(\d+) of (\d+) kernels\n", line):
                show(int(counted[1]), int(counted[2]))
            elif line.strip():
                last = line.strip()
    return process.returncode == 0, last
