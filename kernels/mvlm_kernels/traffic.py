"""Count the bytes that each kernel moves, the fewest bytes possible, and the bytes of the eager torch composition.

    python -m mvlm_kernels.traffic [--json FILE] [--select REGEX]

The interpreter runs the kernels on small inputs, and every load and store is counted. Lanes of one instruction that
share an address count once, as in hardware, and masked lanes do not count. Bytes grow linearly in each sampled size
(batch, patches), so samples at two values of each size give the count at the paper's sizes. Sizes that kernels tile
over are not reduced. The minimum reads each input once and writes each output once; tensors that forward saves for
backward count as outputs.
"""

import argparse
import itertools
import json
import math
import os
import re
import sys
import unittest.mock
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# Triton decides at import whether it interprets, and torch may have imported it already.
if os.environ.get("TRITON_INTERPRET") != "1" and __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "1"
    os.execv(sys.executable, [sys.executable, "-m", "mvlm_kernels.traffic", *sys.argv[1:]])

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mvlm_kernels.cases import Case, Sizes, cases
from mvlm_kernels.dispatch import use_backend
from mvlm_kernels.hardware import GPUS


class Counter:
    """Sum of the bytes moved. ``add`` takes the addresses and the mask of one load or store instruction."""

    def __init__(self) -> None:
        self.bytes = 0

    def add(self, addresses: Any, mask: Any, itemsize: int) -> None:
        import numpy as np

        self.bytes += int(np.unique(addresses[mask]).size) * itemsize


@contextmanager
def counting() -> Iterator[Counter]:
    """Count the bytes that interpreted kernels load and store inside the block."""
    from triton.runtime.interpreter import InterpreterBuilder, _get_np_dtype

    counter = Counter()
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

    def counted_load(self, ptrs, mask, *rest):
        value = load(self, ptrs, mask, *rest)
        counter.add(ptrs.data, mask.data, value.data.dtype.itemsize)
        return value

    def counted_store(self, ptrs, value, mask, *rest):
        counter.add(ptrs.data, mask.data, _itemsize(_get_np_dtype(ptrs.get_element_ty())))
        return store(self, ptrs, value, mask, *rest)

    counted = {"create_masked_load": counted_load, "create_masked_store": counted_store}
    with unittest.mock.patch.multiple(InterpreterBuilder, **counted):
        yield counter


def _itemsize(dtype: Any) -> int:
    import numpy as np

    return np.dtype(dtype).itemsize


class TorchTraffic(TorchDispatchMode):
    """Count the bytes that a composition of torch ops moves: each op reads its inputs and writes its outputs once.

    Views and allocations are free. On meta tensors nothing is computed.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        aliased = [r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns]
        if not any(aliased) and not func._schema.name.startswith(("aten::empty", "aten::new_empty")):
            given = {name: x for name, x in (kwargs or {}).items() if name != "out"}  # written, not read
            self.bytes += sum(tensor_bytes(x) for x in _tensors((args, given, out)))
        return out


def _tensors(tree: Any) -> list[Tensor]:
    return [x for x in tree_leaves(tree) if isinstance(x, Tensor)]


def tensor_bytes(x: Tensor) -> int:
    """Bytes of the distinct elements of x: an expanded dimension counts once."""
    return math.prod(n for n, s in zip(x.shape, x.stride(), strict=True) if s != 0) * x.element_size()


def measure(case: Case, sizes: Sizes) -> tuple[int, int]:
    """(forward, backward) bytes of the kernels, interpreted at these sizes."""
    inputs, call = case.run(sizes, "cpu")
    with use_backend("triton"):
        with counting() as forward:
            out = call(*inputs)
        with counting() as backward:
            if inputs:
                out.backward(torch.ones(()).expand_as(out) if not out.ndim else torch.ones_like(out))
    return forward.bytes, backward.bytes


def moved(case: Case) -> tuple[int, int]:
    """(forward, backward) bytes at the case's sizes: by the case's formula, else extrapolated from its samples."""
    if case.moved is not None:
        return case.moved(case.sizes)
    names = list(case.samples)
    totals = [0.0, 0.0]
    for corner in itertools.product((0, 1), repeat=len(names)):
        at = {name: case.samples[name][i] for name, i in zip(names, corner, strict=True)}
        # Linear in each size: the weight of a corner is a product of the two-point formula's weights.
        weight = 1.0
        for name, i in zip(names, corner, strict=True):
            this, other = case.samples[name][i], case.samples[name][1 - i]
            weight *= (case.sizes[name] - other) / (this - other)
        for k, count in enumerate(measure(case, {**case.sizes, **at})):
            totals[k] += weight * count
    return round(totals[0]), round(totals[1])


def torch_bytes(case: Case) -> tuple[int, int]:
    """(forward, backward) bytes of the eager composition, on meta tensors at the case's sizes."""
    inputs, call = case.eager(case.sizes, "meta")
    with TorchTraffic() as forward:
        out = call(*inputs)
    with TorchTraffic() as backward:
        if inputs:
            out.backward(torch.ones_like(out))
    return forward.bytes, backward.bytes


def rows(select: str = "") -> list[dict[str, Any]]:
    """One row for each pass of each case whose "op shape" matches the regex."""
    found = []
    for case in cases():
        if not re.search(select, f"{case.op} {case.shape}"):
            continue
        columns = zip(
            ("forward", "backward"), moved(case), case.minimum(case.sizes), torch_bytes(case), case.flops(case.sizes),
            strict=True,
        )  # fmt: skip
        for name, count, minimum, eager, flops in columns:
            if not minimum:  # a pass without a kernel
                continue
            roofline = {g: round(1e6 * max(minimum / gpu.bandwidth, flops / gpu.flops), 1) for g, gpu in GPUS.items()}
            found.append(
                {
                    "op": case.op, "pass": name, "shape": case.shape, "bytes_moved": count, "bytes_minimum": minimum,
                    "ratio": round(count / minimum, 4), "torch_bytes": eager, "roofline_us": roofline,
                }
            )  # fmt: skip
    return found


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m mvlm_kernels.traffic", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    parser.add_argument("--select", default="", help='regex on "op shape"')
    arguments = parser.parse_args()
    table = rows(arguments.select)
    gpus = " ".join(f"{name:>6}" for name in GPUS)
    print(f"{'op':18} {'pass':9} {'MB moved':>9} {'minimum':>8} {'ratio':>6} {'torch':>8}  {gpus}  shape (GPUs: us)")
    for row in table:
        times = " ".join(f"{t:6.1f}" for t in row["roofline_us"].values())
        megabytes = [row[k] / 1e6 for k in ("bytes_moved", "bytes_minimum", "torch_bytes")]
        print(
            f"{row['op']:18} {row['pass']:9} {megabytes[0]:9.1f} {megabytes[1]:8.1f} {row['ratio']:6.3f} "
            f"{megabytes[2]:8.1f}  {times}  {row['shape']}"
        )
    for name, gpu in GPUS.items():
        print(f"{name}: {gpu.bandwidth / 1e12} TB/s, {gpu.flops / 1e12:.0f} bfloat16 TFLOPS ({gpu.source})")
    if arguments.json:
        sources = {name: gpu.source for name, gpu in GPUS.items()}
        arguments.json.write_text(json.dumps({"rows": table, "sources": sources}, indent=1) + "\n")


if __name__ == "__main__":
    main()
