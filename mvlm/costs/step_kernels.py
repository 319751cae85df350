"""Kernels that a training step launches on a GPU, recorded without one, and compiled before the first step.

    python -m mvlm.costs.step_kernels [--preset base | --config FILE] [--pairs 256] [--arch sm_90] [--jobs 12]

The step runs on meta tensors, which have shapes and no values, up to its launches. Processes compile the kernels into
Triton's cache (TRITON_CACHE_DIR), where the launches of a run on that GPU find them: their signatures are equal.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from mvlm.config.groups import FULL, PartSettings, RunConfig
from mvlm.config.json_files import read_config, run_config
from mvlm.config.model import MaskVLMConfig
from mvlm.costs.step_cost import fake_microbatch
from mvlm.model.adaptation import adapt
from mvlm.model.maskvlm import MaskVLM
from mvlm.terminal import say
from mvlm_dataloading import Batch, Masks
from mvlm_kernels import dispatch, use_backend
from mvlm_kernels.case import Launch

Recorder = Callable[..., None]
JOBS = min(12, len(os.sched_getaffinity(0)))


def model_of(config: MaskVLMConfig, parts: PartSettings | RunConfig = FULL) -> MaskVLM:
    """Build a model on the meta device whose image attention is that of a GPU. parts: how its parts learn."""
    with torch.device("meta"):
        model = MaskVLM(config)
        adapt(model, parts)
    model.set_attention("sdpa", "auto")
    return model


class LinearInBf16(TorchFunctionMode):
    """Casts the inputs of linear layers to bf16 on the meta device, for which torch's autocast does not work."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear:
            args = [x.bfloat16() if isinstance(x, Tensor) else x for x in args]
        return func(*args, **(kwargs or {}))


@contextmanager
def recorded_steps(recorder: Recorder, arch: int) -> Iterator[Callable[[MaskVLM, Batch, Masks], None]]:
    """Context with a function that makes one training step of a model on the meta device.

    recorder: called as recorder(kernel, grid, args, meta) for each launch of a kernel. arch: such as 90 for sm_90.
    """

    def step(model: MaskVLM, batch: Batch, masks: Masks) -> None:
        model(batch, masks, plan="fast").total.backward()
        model.zero_grad(set_to_none=True)

    with dispatch.recording(recorder, arch, torch.bfloat16), use_backend("triton"), LinearInBf16():
        yield step


def lengths_of(config: MaskVLMConfig) -> list[int]:
    """Longest captions of a batch, in tokens, that together lead to every choice of kernel tiles.

    Tiles are chosen by the next power of two.
    """
    lengths = {config.text_length}
    length = 16
    while length < config.text_length:
        lengths.add(length)
        length *= 2
    return sorted(lengths)


def launches_of(config: MaskVLMConfig, pairs: int, arch: str, parts: PartSettings | RunConfig = FULL) -> list[Launch]:
    """One launch of each different kernel of a training step, for captions of all lengths.

    Kernels differ by tiles, which depend on the longest caption of a batch. Blocks of one kind launch equal kernels, so
    a model with one block of each is recorded.
    """
    from mvlm_kernels import aot  # here: it takes TRITON_INTERPRET out of the environment

    blocks = {f"{kind}_layers": 1 for kind in ("image", "text", "cross", "decoder")}
    model, found = model_of(replace(config, **blocks), parts), {}

    def record(kernel: Any, grid: Any, args: tuple, meta: dict[str, Any]) -> None:
        found.setdefault(aot.signature(kernel, args, meta, arch), Launch("step", kernel, args, meta, ""))

    with recorded_steps(record, aot.capability_of(arch)) as step:
        for longest in lengths_of(config):
            with torch.device("meta"):
                batch = fake_microbatch(config, pairs, min(12, longest), longest)
            step(model, *batch)
    return list(found.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--preset", default="base", choices=["tiny", "small", "base"])
    parser.add_argument("--config", type=Path, help="config.json of a pretraining run, in place of a preset")
    parser.add_argument("--pairs", type=int, default=256)
    parser.add_argument("--arch", default="sm_90", help="such as sm_90")
    parser.add_argument("--jobs", type=int, default=JOBS)
    options = parser.parse_args()
    started, name = time.perf_counter(), options.preset if options.config is None else str(options.config)
    if options.config is None:
        launches = launches_of(MaskVLMConfig.preset(name), options.pairs, options.arch)
    else:
        run = run_config(read_config(options.config), name)
        models = dict.fromkeys(stage.model for stage in run.parsed_stages)
        launches = [x for model in models for x in launches_of(model, options.pairs, options.arch, run)]

    from mvlm_kernels.aot import compile_all, signature

    # Stages share most kernels.
    launches = list({signature(x.kernel, x.args, x.meta, options.arch): x for x in launches}.values())

    def show(done: int) -> None:
        say(f"{done} of {len(launches)} kernels", flush=True)

    failed = compile_all(launches, options.arch, options.jobs, show)
    for line in (f"kernels of {name} for {options.arch} in {time.perf_counter() - started:.0f} s", *failed):
        say(line)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
