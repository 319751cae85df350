"""Command line of one stage: `python -m mvlm_benchmarks.gpu STAGE --out FOLDER --seconds N [--rehearse]`.

`benchmarks/gpu_run.py` calls it with caches, paths and a hard limit of time.
"""

import argparse
import importlib
import os
from pathlib import Path

from mvlm_benchmarks.gpu.stages import PARTS, STAGES


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m mvlm_benchmarks.gpu", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("stage", choices=[*STAGES, *PARTS])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float)
    parser.add_argument("--rehearse", action="store_true")
    parser.add_argument("--quick", action="store_true", help="what is worth most, as a part of stage first")
    options = parser.parse_args()

    import torch

    from mvlm_benchmarks.gpu.stage import running
    from mvlm_benchmarks.gpu.warm import warm_up

    if not options.rehearse and not torch.cuda.is_available():
        parser.error("wanted a CUDA device, torch finds none; --rehearse runs small shapes on this CPU")
    if not options.rehearse and os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        parser.error("wanted TRITON_INTERPRET unset on a GPU, got 1, with which kernels are interpreted; unset it")
    spec = {**PARTS, **STAGES}[options.stage]
    seconds = options.seconds or spec.seconds
    with running(options.stage, options.out, seconds, options.rehearse, options.quick) as stage:
        if not (options.quick or options.rehearse or options.stage == "first"):
            warm_up(stage)
        importlib.import_module(spec.module).run(stage)


if __name__ == "__main__":
    main()
