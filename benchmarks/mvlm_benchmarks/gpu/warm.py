"""Compile all kernels of the step and of the benchmark's cases, by 12 processes, into Triton's cache.

    python -m mvlm_benchmarks.gpu.warm [--arch sm_90] [--batch 256] [--jobs 12] [--few]

It needs no GPU, and uses none: its processes are forked.
"""

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Thread
from typing import Any

from mvlm_benchmarks.gpu.processes import run_program
from mvlm_benchmarks.gpu.stage import Stage
from mvlm_benchmarks.machine import gpu_arch


def warm_up(stage: Stage) -> None:
    """Compile all kernels for the GPU of a stage, by this module's command in a process of its own.

    A failure is a line of the log: kernels are then compiled when they run.
    """
    command = [sys.executable, "-m", "mvlm_benchmarks.gpu.warm", "--batch", str(stage.batch)]
    command += ["--few", "--jobs", "1"] if stage.rehearse else ["--arch", f"sm_{gpu_arch()}"]
    with (stage.out / "warm.txt").open("w") as output:
        code = run_program(command, max(1.0, 0.8 * stage.budget.left), output, {"TRITON_INTERPRET": "0"})
    last = (stage.out / "warm.txt").read_text().strip().splitlines()[-1:]
    stage.say(f"warm-up: {last[0] if last else 'no output'}")
    stage.end_part("warm-up", "ok" if code == 0 else "out of time" if code is None else "error")


@contextmanager
def warming(stage: Stage) -> Iterator[None]:
    """Compile all kernels (:func:`warm_up`) in a thread while the block runs, and wait for its end after the block."""
    thread = Thread(target=warm_up, args=(stage,))
    thread.start()
    try:
        yield
    finally:
        thread.join()


def launches(arch: str, batch: int, few: bool) -> list[Any]:
    """Launches of kernels in training steps and in the benchmark's cases, one for each kernel that has to be compiled.

    batch: pairs of a step, in addition to 32, 64 and 128. few: those of `tiny` at this batch, and of the small cases.
    """
    # Imported here: it takes TRITON_INTERPRET out of the environment, and a rehearsed stage interprets kernels.
    import torch

    from mvlm.config.model import MaskVLMConfig
    from mvlm.costs.step_kernels import launches_of
    from mvlm_benchmarks.kernels.cases import cases
    from mvlm_kernels import aot
    from mvlm_kernels.cases import small as small_cases

    config = MaskVLMConfig.preset("tiny" if few else "base", cross_norm="post")
    found = {}
    for pairs in (batch,) if few else (32, 64, 128, batch):
        for launch in launches_of(config, pairs, arch):
            found.setdefault(aot.signature(launch.kernel, launch.args, launch.meta, arch), launch)
    dtype = torch.bfloat16
    for case in [*small_cases(dtype), *([] if few else cases(batch, dtype))]:
        if not case.has_kernels:
            continue
        try:
            recorded = case.launches(aot.capability_of(arch))
        except RuntimeError:  # left to torch by rule
            continue
        for one in recorded:
            found.setdefault(aot.signature(one.kernel, one.args, one.meta, arch), one)
    return list(found.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--arch", default="sm_90", help="such as sm_90")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--jobs", type=int, default=12)
    parser.add_argument("--few", action="store_true", help="three kernels, for a rehearsal")
    options = parser.parse_args()
    from mvlm_kernels import aot

    found = launches(options.arch, options.batch, options.few)
    failed = aot.compile_all(found[:3] if options.few else found, options.arch, options.jobs)
    print(*failed, sep="\n")
    print(f"{len(found)} kernels for {options.arch}, {len(failed)} of which failed")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
