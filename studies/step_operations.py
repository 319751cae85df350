"""Processor time of one step on a CPU by operation: `python studies/step_operations.py [--threads 1] [CONTENDER ...]`.

A batch of the preset as in `mvlm bench step`, in bf16 where that is fast. Freed memory is kept, as in a training run.
"""

import argparse
import time
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mvlm.config.model import MaskVLMConfig
from mvlm.device import autocast
from mvlm.model.maskvlm import MaskVLM
from mvlm.training.freed_memory import keep_freed_memory
from mvlm_benchmarks.captions import caption_lengths
from mvlm_benchmarks.step.contenders import make_contenders, make_inputs


class OperationTimes(TorchDispatchMode):
    """Calls and processor milliseconds of the calling thread, by operation. An op of ours is one operation."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: dict[str, tuple[int, float]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        started = time.thread_time()
        found = func(*args, **(kwargs or {}))
        calls, spent = self.rows.get(str(func), (0, 0.0))
        self.rows[str(func)] = calls + 1, spent + 1e3 * (time.thread_time() - started)
        return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("contenders", nargs="*", default=["timm+roberta", "fast"])
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    keep_freed_memory()
    torch.set_num_threads(options.threads)
    device = torch.device("cpu")
    model = MaskVLM(MaskVLMConfig.preset(options.preset, cross_norm="post"))
    length = model.config.text_length
    inputs = make_inputs(model, caption_lengths(options.batch, length, length / 3), device)
    for contender in make_contenders(tuple(options.contenders), model, True, lambda: autocast(device)):
        for times in (OperationTimes(), OperationTimes()):  # the first step makes the optimizer's state
            with times:
                contender.backward(inputs)
                contender.update()
        print(f"\n{contender.name}: {sum(spent for _, spent in times.rows.values()):.1f} ms")
        for name, (calls, spent) in sorted(times.rows.items(), key=lambda row: -row[1][1])[:30]:
            print(f"{name:56}{calls:7}{spent:10.1f}")


if __name__ == "__main__":
    main()
