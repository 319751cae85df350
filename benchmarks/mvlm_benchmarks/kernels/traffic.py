"""Count the bytes that each kernel moves, the fewest bytes possible, and the bytes of the eager torch composition.

    python -m mvlm_benchmarks.kernels.traffic [--json FILE] [--select REGEX]

The interpreter runs the kernels on a few images, and every load and store is counted. Lanes of one instruction that
share an address count once, as in hardware, and masked lanes do not count. Bytes grow linearly with the images, so
counts at two batches give that of 256 images. Sizes that kernels tile over are not reduced.

That is what memory moves where a kernel touches each byte once. Where several programs read the same rows, it depends
on the order of programs and on the size of the cache: contrastive losses are counted whole, through a :class:`Cache`,
and so is the case with `key_index`, through one that is scaled down with it.
"""

import argparse
import json
import math
import os
import re
import sys
import unittest.mock
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

# Triton decides at import whether it interprets, and torch may have imported it already.
if os.environ.get("TRITON_INTERPRET") != "1" and __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "1"
    os.execv(sys.executable, [sys.executable, "-m", "mvlm_benchmarks.kernels.traffic", *sys.argv[1:]])

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mvlm_benchmarks.kernels.peers import EAGER, ours
from mvlm_kernels import dispatch, use_backend
from mvlm_kernels.add_layer_norm import cases as add_layer_norm
from mvlm_kernels.case import PAPER, Case, Inputs, as_results
from mvlm_kernels.cases import timed
from mvlm_kernels.contrastive_loss import cases as contrastive_loss
from mvlm_kernels.cross_attention.cases import of_captions
from mvlm_kernels.gelu_linear import cases as gelu
from mvlm_kernels.hardware import GPUS
from mvlm_kernels.split_linear import cases as split

BF16 = torch.bfloat16
BATCH, SAMPLES = 256, (1, 2)
"""Batch size of the printed table, and the two batch sizes at which bytes are counted."""
TOKEN_SAMPLES = (2, 4)
"""Batch sizes of the counts of `qk_norm_rope`: they fill one and two multiprocessors as 256 fill those of an H100."""
ROW_SAMPLES = (6, 8)
"""Images of the counts of ops on rows, whose programs walk: more rows than an H100 has programs for at once."""
SECTOR = 32
"""Bytes of a sector, the smallest unit that memory moves: CUDA C++ programming guide, device memory accesses."""
L2, SHARE = 50_000_000, 192
"""Bytes of an H100's second-level cache (its architecture's white paper). The indexed case has as small a share of them
as its keys are of those of 256 images with 12 heads."""

RMS = add_layer_norm.Vectors("weight", y_bias=False, kind="rms")

Access = Callable[[Any, Any, int, bool], None]
"""Account for one load or store: numpy arrays of byte addresses and of which are accessed, the item's size, write."""


def counted(batch: int) -> list[Case]:
    """Cases whose memory traffic is counted: those of sequences of equal length that kernels compute alone.

    `gelu_linear` and `split_linear` are there without their matrix products, which torch computes. :func:`contrasts`
    has the contrastive losses.
    """
    found = [
        case
        for case in sorted(timed(batch, BF16), key=lambda case: not case.core)
        if not case.left_to_torch and case.op not in ("gelu_linear", "contrastive_loss")
        and not re.search("captions|packed|key_index|577", case.label)
    ]  # fmt: skip
    rows = 2 * batch * 197
    norms = [
        add_layer_norm.case(
            f"{rows} rows of {PAPER.width}, residual in float32, {name}", (rows, PAPER.width), vectors=vectors, eps=1e-6
        )
        for name, vectors in (("RMSNorm", RMS), ("LayerScale", add_layer_norm.LAYER_SCALE))
    ]
    post_norm = add_layer_norm.between_layers(rows, BF16, post_norm=True)
    return [*found, post_norm, *norms, _gelu(batch), _split(batch)]


def samples_of(case: Case) -> tuple[int, int]:
    if case.op == "qk_norm_rope":
        return TOKEN_SAMPLES
    rows = case.op in ("add_layer_norm", "gelu_linear", "split_linear") and "of each sample" not in case.label
    return ROW_SAMPLES if rows else SAMPLES


def _gelu(batch: int) -> Case:
    """Case of `gelu_linear` on bfloat16 rows with a float32 bias in front, whose linear layer has one output only."""
    rows, width = 197 * batch, 4 * PAPER.width
    case = gelu.case(f"{rows} rows of {width}, without products", (rows, width), 1, BF16, BF16, h_bias=torch.float32)
    values, vectors = rows * width, 4 * width
    return replace(case, minimum=(4 * values + vectors, 8 * values + 2 * vectors), flops=(0, 0))


def _split(batch: int) -> Case:
    """Case of `split_linear` whose backward stacks three gradients; x is narrow, so that its products cost little."""
    rows, width, parts = 197 * batch, PAPER.width, 3
    case = split.case(f"{rows} rows of {parts} x {width}, without products", rows, width, parts, BF16)
    return replace(case, minimum=(0, 4 * rows * parts * width + 4 * parts * width))


def _split_eager(inputs: Inputs) -> Any:
    """Eager function in place of `split_linear`, without its product: views of the bias, repeated for each row of x."""
    parts = inputs.fixed["parts"]
    return lambda x, weight, bias: bias.expand(len(x), -1).unflatten(1, (parts, -1)).unbind(1)


def _gelu_eager(inputs: Inputs) -> Any:
    return lambda h, weight, h_bias: F.gelu(h + h_bias.to(h))


def indexed() -> Case:
    """Case of attention in which three captions read each image by key_index. Its backward is two kernels that read
    every input.
    """
    return of_captions(BF16, 2, len_q=32, len_k=197, batch=8, readers=24, index="popular")


def contrasts() -> list[Case]:
    """Contrastive losses of a rank's 512 pairs with all pairs, without the products that torch makes backward."""
    rows, columns, width = 512, 32768, 256
    found = []
    for name, bias, draws in (("InfoNCE", False, False), ("InfoNCE with draws", False, True), ("sigmoid", True, False)):
        case = contrastive_loss.case(
            f"{rows} x {columns} of {width}, {name}", rows, columns, BF16, torch.float32, width=width, bias=bias,
            draws=draws, unit=True,
        )  # fmt: skip
        item = BF16.itemsize
        read, terms = item * width * (rows + columns), 4 * (2 * rows + columns * (1 if bias else 2))
        minimum = read + terms, read + terms + item * rows * columns
        found.append(
            replace(case, minimum=minimum, product=(rows, columns, width), flops=(2 * rows * columns * width,) * 2)
        )
    return found


def _contrast_eager(inputs: Inputs) -> Any:
    """Terms of rows and of columns from kept logits, in float32 as autocast has them, without draws."""
    own = inputs.fixed["rows"]

    def compute(image: Tensor, text: Tensor, log_scale: Tensor, bias: Tensor | None = None) -> Any:
        logits = (image @ text.T).float() * log_scale.exp()
        if bias is None:
            right = logits.gather(1, own[:, None])[:, 0]
            return logits.logsumexp(1) - 2 * right, logits.logsumexp(0)
        signs = torch.full_like(logits, -1.0).scatter(1, own[:, None], 1.0)
        return F.softplus(-signs * (logits + bias)).sum(1)

    return compute


WITHOUT_PRODUCTS = {"gelu_linear": _gelu_eager, "split_linear": _split_eager, "contrastive_terms": _contrast_eager}
"""Compositions of eager torch of the ops that are counted without products, or in other torch than the oracle's."""


def every_case(batch: int) -> list[Case]:
    """All cases of the table, those that are counted whole at the end."""
    return [*counted(batch), indexed(), *contrasts()]


class Counter:
    """Counts the bytes that kernels load and store, in `bytes`. An address counts once in each access."""

    def __init__(self) -> None:
        self.bytes = 0

    def access(self, addresses: Any, mask: Any, itemsize: int, write: bool) -> None:
        import numpy as np

        self.bytes += int(np.unique(addresses[mask]).size) * itemsize

    def flush(self) -> None:
        pass


class Cache(Counter):
    """Bytes between a GPU's second-level cache and memory. The sectors used last stay; written ones go when evicted.

    Programs run one after another in their order, and a GPU runs hundreds at once: the model holds for rows whose
    programs are close to each other, or far apart. Only grids of one dimension run in a GPU's order here: the
    interpreter's last dimension runs fastest. size: bytes.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self.capacity = size // SECTOR
        self.sectors: OrderedDict[int, bool] = OrderedDict()  # sector -> True if it was written

    def access(self, addresses: Any, mask: Any, itemsize: int, write: bool) -> None:
        import numpy as np

        first = addresses[mask].astype(np.int64)
        for sector in np.unique([first // SECTOR, (first + itemsize - 1) // SECTOR]).tolist():
            written = self.sectors.pop(sector, None)
            if written is None and not write:
                self.bytes += SECTOR
            self.sectors[sector] = write or bool(written)
            if len(self.sectors) > self.capacity:
                self.bytes += SECTOR * self.sectors.popitem(last=False)[1]

    def flush(self) -> None:
        """Write every written sector back."""
        self.bytes += SECTOR * sum(self.sectors.values())
        self.sectors.clear()


@contextmanager
def counting(counter: Counter) -> Iterator[Counter]:
    """Count the bytes that interpreted kernels load and store inside the block."""
    import numpy as np
    from triton.runtime.interpreter import InterpreterBuilder, _get_np_dtype

    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

    def counted_load(self, ptrs, mask, *rest):
        value = load(self, ptrs, mask, *rest)
        counter.access(ptrs.data, mask.data, value.data.dtype.itemsize, False)
        return value

    def counted_store(self, ptrs, value, mask, *rest):
        counter.access(ptrs.data, mask.data, np.dtype(_get_np_dtype(ptrs.get_element_ty())).itemsize, True)
        return store(self, ptrs, value, mask, *rest)

    patched = {"create_masked_load": counted_load, "create_masked_store": counted_store}
    with unittest.mock.patch.multiple(InterpreterBuilder, **patched):
        yield counter
    counter.flush()


class TorchTraffic(TorchDispatchMode):
    """Count the bytes that a composition of torch ops moves: each op reads its inputs and writes its outputs once.

    Views and allocations are free. An expanded dimension counts once.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        aliased = [r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns]
        if not any(aliased) and not func._schema.name.startswith(("aten::empty", "aten::new_empty")):
            given = {name: x for name, x in (kwargs or {}).items() if name != "out"}  # written, not read
            for x in tree_leaves((args, given, out)):
                if isinstance(x, Tensor):
                    elements = math.prod(n for n, s in zip(x.shape, x.stride(), strict=True) if s != 0)
                    self.bytes += elements * x.element_size()
        return out


def passes(case: Case, build: Callable[[Inputs], Any], count: Callable[[], Any]) -> tuple[int, int]:
    """Bytes of (forward, backward), by two contexts that `count` makes."""
    inputs = case.make("cpu")
    leaves, call = list(inputs.leaves.values()), build(inputs)
    with count() as forward:
        outs = as_results(call(*leaves))
    gradients = [torch.ones_like(x) for x in outs]
    with count() as backward:
        if leaves:
            torch.autograd.grad(outs, leaves, gradients, allow_unused=True)
    return forward.bytes, backward.bytes


def _as_many_programs(case: Case) -> Any:
    """Context in which each sample has as many programs as on an H100 with the table's batch, if samples have any."""
    if "of each sample" not in case.label and case.op != "qk_norm_rope":
        return nullcontext()
    multiprocessors = round(132 * int(case.label.split()[0]) / BATCH)
    return unittest.mock.patch.object(dispatch, "multiprocessors", return_value=multiprocessors)


@contextmanager
def _tensors_kept() -> Iterator[None]:
    """Keep the tensors of all launches: memory that is given out anew would be counted by luck of the allocator."""
    launch, kept = dispatch.launch, []

    def kept_launch(*args: Any, **options: Any) -> None:
        kept.append(args)
        launch(*args, **options)

    with unittest.mock.patch.object(dispatch, "launch", kept_launch):
        yield


def measure(case: Case, new: Callable[[], Counter] | None = None) -> tuple[int, int]:
    """(forward, backward) bytes of the kernels, interpreted.

    new: makes the counter, by default one of all accesses, and for `qk_norm_rope` a cache, in which its tables stay.
    """
    new = new or (lambda: Cache(L2) if case.op == "qk_norm_rope" else Counter())
    with use_backend("triton"), _as_many_programs(case), _tensors_kept():
        return passes(case, lambda inputs: ours(case, inputs), lambda: counting(new()))


def extrapolated(few: tuple[int, ...], more: tuple[int, ...], samples: tuple[int, int]) -> tuple[int, ...]:
    """Bytes of both passes at the table's batch, from those at two batches."""
    first, second = samples
    return tuple(round(a + (BATCH - first) * (b - a) / (second - first)) for a, b in zip(few, more, strict=True))


def rows(select: str = "") -> list[dict[str, Any]]:
    """One row for each pass of each case whose "op shape" matches the regex."""
    found = []
    for number, case in enumerate(every_case(BATCH)):
        if not re.search(select, f"{case.op} {case.label}"):
            continue
        plain = partial(ours, replace(case, ours=case.oracle))
        eager = WITHOUT_PRODUCTS.get(case.op) or EAGER.get(case.op, plain)
        if number >= len(counted(BATCH)):
            size = L2 // SHARE if "key_index" in case.label else L2
            moved, by_torch = measure(case, lambda size=size: Cache(size)), passes(case, eager, TorchTraffic)
        else:
            samples = samples_of(case)
            few, more = (counted(batch)[number] for batch in samples)
            moved = extrapolated(measure(few), measure(more), samples)
            by_torch = extrapolated(passes(few, eager, TorchTraffic), passes(more, eager, TorchTraffic), samples)
        columns = zip(("forward", "backward"), moved, case.minimum, by_torch, case.flops, strict=True)
        for name, count, minimum, composed, flops in columns:
            if not count:  # a pass without a kernel
                continue
            roofline = {g: round(1e6 * max(minimum / gpu.bandwidth, flops / gpu.flops), 1) for g, gpu in GPUS.items()}
            found.append(
                {
                    "op": case.op, "pass": name, "shape": case.label, "bytes_moved": count, "bytes_minimum": minimum,
                    "ratio": round(count / minimum, 4), "torch_bytes": composed, "roofline_us": roofline,
                }
            )  # fmt: skip
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m mvlm_benchmarks.kernels.traffic", description=(__doc__ or "").split("\n")[0]
    )
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
