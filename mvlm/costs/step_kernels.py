"""Kernels that a training step launches on a GPU, recorded without one, and compiled before the first step.

    python -m mvlm.costs.step_kernels [--preset base] [--pairs 256] [--arch sm_90] [--jobs 12]

The step runs on meta tensors, which have shapes and no values, up to its launches. Processes compile the kernels into
Triton's cache (TRITON_CACHE_DIR), where the launches of a run on that GPU find them: their signatures are equal.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from mvlm.config.model import MaskVLMConfig
from mvlm.costs.step_cost import LONGEST, fake_microbatch
from mvlm.model.maskvlm import MaskVLM
from mvlm_dataloading import Batch, Masks
from mvlm_kernels import aot, dispatch, use_backend

Recorder = Callable[..., None]
JOBS = 12


def model_of(config: MaskVLMConfig) -> MaskVLM:
    """The model on the meta device, which attends between patches as on a GPU."""
    with torch.device("meta"):
        model = MaskVLM(config)
    model.set_attention("sdpa", "auto")
    return model


class LinearInBf16(TorchFunctionMode):
    """Casts of autocast for linear layers on the meta device, which torch's autocast does not know."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear:
            args = [x.bfloat16() if isinstance(x, Tensor) else x for x in args]
        return func(*args, **(kwargs or {}))


@contextmanager
def recorded_steps(recorder: Recorder, arch: int) -> Iterator[Callable[[MaskVLM, Batch, Masks], None]]:
    """Context with a function that makes one step, and calls `recorder(kernel, grid, args, meta)` for each launch."""

    def step(model: MaskVLM, batch: Batch, masks: Masks) -> None:
        model(batch, masks, plan="fast").total.backward()
        model.zero_grad(set_to_none=True)

    with dispatch.recording(recorder, arch, torch.bfloat16), use_backend("triton"), LinearInBf16():
        yield step


def launches_of(config: MaskVLMConfig, pairs: int, arch: str) -> list[aot.Launch]:
    """One launch of each kernel of a step, for all lengths of captions: tiles depend on the longest of a batch.

    config: blocks of one kind launch the same kernels, so one of each is recorded.
    """
    blocks = {f"{kind}_layers": 1 for kind in ("image", "text", "cross", "decoder")}
    model, found = model_of(replace(config, **blocks)), {}

    def record(kernel: Any, grid: Any, args: tuple, meta: dict[str, Any]) -> None:
        found.setdefault(aot.signature(kernel, args, meta, arch), aot.Launch("step", kernel, args, meta, ""))

    lengths = {min(longest, config.text_length) for longest in (16, LONGEST, 64, 128, config.text_length)}
    with recorded_steps(record, aot.capability_of(arch)) as step:
        for longest in sorted(lengths):
            with torch.device("meta"):
                batch = fake_microbatch(config, pairs, min(12, longest), longest)
            step(model, *batch)
    return list(found.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--preset", default="base", choices=["tiny", "small", "base"])
    parser.add_argument("--pairs", type=int, default=256)
    parser.add_argument("--arch", default="sm_90", help="such as sm_90")
    parser.add_argument("--jobs", type=int, default=JOBS)
    options = parser.parse_args()
    started, config = time.perf_counter(), MaskVLMConfig.preset(options.preset)
    failed = aot.compile_all(launches_of(config, options.pairs, options.arch), options.arch, options.jobs)
    for line in failed:
        print(line)
    print(f"kernels of {options.preset} for {options.arch} in {time.perf_counter() - started:.0f} s")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
