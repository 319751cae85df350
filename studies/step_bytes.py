"""Bytes that the fast step moves on a GPU, by kind of operation, counted without one.

    python studies/step_bytes.py [--preset base] [--batch 256] [--recompute]

The step runs on fake tensors, which have shapes and no values, and makes the choices of a GPU. A dispatch mode counts:
each operation reads its inputs and writes its outputs once; what it overwrites is not read, nor what it does not
select of a table. Our ops and SDPA are one operation each. Views, allocations and caches are free, so the figures are
lower bounds. The estimate of milliseconds divides bytes by a rate, and products by another, and adds: nothing here is
measured.
"""

import argparse
import contextlib
import importlib
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import fields
from typing import Any
from unittest.mock import patch

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from mvlm.config.model import MaskVLMConfig
from mvlm.model import attention_backends
from mvlm.model.maskvlm import MaskVLM
from mvlm_benchmarks.captions import caption_lengths
from mvlm_benchmarks.step.inputs import make_batch
from mvlm_kernels.split_linear import _SplitLinear

KINDS = {
    "products": ("mm", "addmm", "bmm", "baddbmm"),
    "attention": ("_scaled_dot_product", "cross_attention", "_softmax"),
    "norms": ("native_layer_norm", "add_layer_norm"),
    "GELU": ("gelu",),
    "other ops of ours": ("gather_patches", "place_tokens", "masked_pixel_loss"),
    "optimizer": ("_fused_adamw", "_foreach"),
    "casts and copies": ("_to_copy", "clone", "copy", "cat", "stack", "index", "slice_backward", "select_backward",
                         "embedding", "new_zeros", "zeros", "fill", "full"),
}  # fmt: skip
REST = "sums and other elementwise operations"
WRITTEN_ALONE = (
    "zero_", "fill_", "copy_", "new_zeros", "new_full", "zeros_like", "full_like", "ones_like", "_foreach_zero_",
    "_foreach_copy_",
)  # fmt: skip
"""Operations that do not read their first argument: they overwrite it, or take its shape."""
SELECTED = ("index_select", "gather", "embedding", "index")
"""Operations that read as much of their first argument as they return."""
RATE, PRODUCTS = 2.75e12, 600e12
"""Bytes and floating-point operations a second of an H100 at such shapes: a guess, from its data sheet and published
figures. Not measured."""


def tensor_bytes(x):
    return math.prod(n for n, s in zip(x.shape, x.stride(), strict=True) if s != 0) * x.element_size()


def kind_of(name: str) -> str:
    """The kind of an operation, by the start of its name without the namespace."""
    return next((kind for kind, starts in KINDS.items() if name.startswith(starts)), REST)


class Traffic(TorchDispatchMode):
    """Counts bytes and operations by kind, and floating-point operations of products."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()
        self.flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func._schema.name.split("::")[1]
        aliases = [r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns]
        asked = func._schema.name.startswith("prim")  # a property, such as the device
        if any(aliases) or asked or name.startswith(("empty", "new_empty", "detach", "_unsafe_view")):
            return out
        kind = kind_of(name)
        given = {key: value for key, value in (kwargs or {}).items() if key != "out"}
        written = () if func._schema.returns else _written_in_place(func, args, given)  # else they are in `out`
        first = () if name in WRITTEN_ALONE else (out,) if name in SELECTED else args[:1]
        leaves = tree_leaves((first, args[1:], given, out, written))
        self.bytes[kind] += sum(tensor_bytes(t) for t in leaves if isinstance(t, torch.Tensor))
        self.calls[kind] += 1
        if kind == "products":
            self.flops += flop_registry[func.overloadpacket](*args, **(kwargs or {}), out_val=out)
        return out


def _written_in_place(func: Any, args: Any, kwargs: Any) -> list[Any]:
    """Arguments that an operation overwrites. AdamW's schema also names the gradients, which only a scaler changes."""
    names = [a.name for a in func._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    given = {a.name: value for a, value in zip(func._schema.arguments, args, strict=False)} | kwargs
    return [given[name] for name in names if name in given and name != "grads"]


@contextlib.contextmanager
def choices_of_a_gpu(kept: bool) -> Iterator[None]:
    """Make a step on CPU tensors choose as on a GPU: kernels, biases added by them, bounds in place of host reads."""

    def choose(*_: Any, text: bool, **__: Any) -> attention_backends.BackendChoice:
        return attention_backends.BackendChoice("triton" if text else "sdpa", {})

    linear_cross_entropy = importlib.import_module("mvlm.objectives.linear_cross_entropy")
    chunks = dict(linear_cross_entropy.LOGITS_PER_CHUNK)
    with (
        patch.object(attention_backends, "choose_backend", choose),
        patch("mvlm.model.attention.adds_bias_later", lambda _: True),
        patch.object(linear_cross_entropy, "LOGITS_PER_CHUNK", {**chunks, "cpu": chunks["cuda"]}),
        patch.object(importlib.import_module("mvlm_kernels.gelu_linear"), "KEPT_ON", ("cpu",) if kept else ()),
        patch.object(torch.compiler, "is_compiling", lambda: True),
        # A compiler would not see the Function.
        patch("mvlm.model.attention.split_linear", lambda x, w, b, heads: _SplitLinear.apply(x, heads, *w, *b)),
        patch("torch.nn.init.trunc_normal_", lambda weight, **_: weight),  # it reads a value
    ):
        yield


def count(preset: str, pairs: int, kept: bool) -> Traffic:
    """Traffic of one step in bf16, from images to the end of AdamW. kept: GELUs are saved for backward."""
    config = MaskVLMConfig.preset(preset, cross_norm="post")
    lengths = caption_lengths(pairs, config.text_length, config.text_length / 3)
    inputs = make_batch(config, lengths)
    with FakeTensorMode() as fake:
        with choices_of_a_gpu(kept):
            model = MaskVLM(config)
            batch, masks = (type(x)(**{f.name: _fake(fake, getattr(x, f.name)) for f in fields(x)}) for x in inputs)
            with Traffic() as traffic:
                with torch.autocast("cpu", torch.bfloat16):
                    losses = model(batch, masks, plan="fast")
                losses.total.backward()
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        optimizer.step()  # not counted: the first step also fills its state with zeros
        with traffic:
            optimizer.step()
    return traffic


def _fake(mode: FakeTensorMode, value: Any) -> Any:
    return mode.from_tensor(value) if isinstance(value, torch.Tensor) else value


def rows(traffic: Traffic) -> list[dict[str, Any]]:
    """One row for each kind: gigabytes, operations, and the estimate of milliseconds."""
    found = []
    for kind in (*KINDS, REST):
        seconds = traffic.flops / PRODUCTS if kind == "products" else traffic.bytes[kind] / RATE
        found.append(
            {
                "kind": kind,
                "gigabytes": round(traffic.bytes[kind] / 1e9, 2),
                "operations": traffic.calls[kind],
                "ms_estimated_not_measured": round(1e3 * seconds, 1),
            }
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--preset", default="base", choices=["tiny", "small", "base"])
    parser.add_argument("--batch", type=int, default=256, help="pairs of the step")
    parser.add_argument("--recompute", action="store_true", help="GELUs do not fit into memory")
    options = parser.parse_args()
    table = rows(count(options.preset, options.batch, not options.recompute))
    print(f"{options.preset}, {options.batch} pairs; estimated for an H100, not measured\n")
    print(f"{'kind':40}{'GB':>9}{'operations':>12}{'ms':>8}")
    for row in table:
        kind, *figures = row.values()
        print("{:40}{:9.2f}{:12}{:8.1f}".format(kind, *figures))
    sums = [sum(row[name] for row in table) for name in list(table[0])[1:]]
    print("{:40}{:9.2f}{:12}{:8.1f}".format("sum", *sums))


if __name__ == "__main__":
    main()
