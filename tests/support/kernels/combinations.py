"""Random combinations of attention's features, and their comparison with formulas in numpy."""

import random
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from support.kernels.attention_oracle import Sequences, attend

SEED = 0x1234_5678_9ABC_DEF1


@dataclass
class Drawn:
    """A call: arguments, the same as sequences, and the description of what was drawn."""

    tensors: tuple[Any, Any, Any]  # q, k, v
    grad: Tensor
    options: dict[str, Any]
    sequences: Sequences
    cu_q: list[int] | None
    cu_k: list[int] | None
    what: str


def draw_call(number: int) -> Drawn:
    draw, torch_draw = random.Random(number), torch.Generator().manual_seed(number)
    long = draw.choice(["none", "none", "k", "q"])
    len_q = draw.choice([1, 2, 5, 16, 19]) if long != "q" else draw.choice([1, 130])
    len_k = draw.choice([1, 3, 8, 17, 33]) if long != "k" else draw.choice([129, 140])
    heads = draw.choice([2, 4, 6])
    k_heads = draw.choice([n for n in (1, 2, 3, heads) if heads % n == 0])
    width = draw.choice([8, 16, 24, 40, 72])
    if long != "none":
        heads, k_heads, width = 2, draw.choice([1, 2]), draw.choice([8, 24])
    seqs_k = draw.choice([1, 2, 3])
    readers = draw.choice([0, 0, 1, 4])
    seqs_q = readers or seqs_k
    form_q, form_k = (draw.choice(["dense", "packed"]) for _ in range(2))
    options: dict[str, Any] = {"scale": draw.choice([None, 0.7, -0.4])}
    if draw.random() < 0.6:
        options |= {"dropout_p": draw.choice([0.1, 0.5, 0.9]), "seed": draw.choice([SEED, 0, torch.tensor([7])])}

    def side(form: str, seqs: int, longest: int, count: int, name: str) -> tuple[list[Tensor], Any, list[int] | None]:
        """Rows of each sequence, the tensor that holds them, and its bounds if it is packed."""
        lengths = [longest] * seqs
        if form != "dense":
            lengths = [draw.choice([0, 1, longest // 2, longest]) for _ in range(seqs)]
            lengths[draw.randrange(seqs)] = longest
        bounds = [sum(lengths[:i]) for i in range(seqs + 1)]
        total = bounds[-1] + (3 if form == "packed" else 0)
        shape = (total, 2, count, width) if draw.random() < 0.3 else (total, 1, count, width)
        rows = torch.randn(shape, generator=torch_draw, dtype=torch.float64)[:, 0]
        rows[bounds[-1] :] = torch.nan
        each = [rows[a:b] for a, b in pairwise(bounds)]
        if form == "dense":
            return each, rows.unflatten(0, (seqs, longest)), None
        cu = torch.tensor(bounds, dtype=draw.choice([torch.int32, torch.int64]))
        options[f"cu_seqlens_{name}"] = cu
        if draw.random() < 0.7 or longest > 128:
            options[f"max_len_{name}"] = longest
        return each, rows, bounds

    q_rows, q, cu_q = side(form_q, seqs_q, len_q, heads, "q")
    k_rows, k, cu_k = side(form_k, seqs_k, len_k, k_heads, "k")
    v_rows = [torch.randn(x.shape, generator=torch_draw, dtype=torch.float64) for x in k_rows]
    packed_v = torch.cat(v_rows)
    if form_k == "dense":
        v: Any = packed_v.view_as(k)
    else:
        v = torch.cat([packed_v, torch.full((3, k_heads, width), torch.nan, dtype=torch.float64)])
    exists = [list(range(len(x))) for x in k_rows]
    k_copy, v_copy = [x.numpy().copy() for x in k_rows], [x.numpy().copy() for x in v_rows]
    if form_k == "dense":
        there = torch.ones(seqs_k, len_k, dtype=torch.bool)
        if draw.random() < 0.6:
            lengths = torch.tensor([draw.choice([0, 1, len_k // 2, len_k]) for _ in range(seqs_k)])
            options["key_lengths"] = lengths.to(draw.choice([torch.int32, torch.int64]))
            there &= torch.arange(len_k) < lengths[:, None]
        if draw.random() < 0.4:
            mask = torch.rand(seqs_k, len_k, generator=torch_draw) < 0.7
            options["key_mask"] = mask
            there &= mask
        exists = [row.nonzero()[:, 0].tolist() for row in there]
        k, v = (x.clone() if x.is_contiguous() else x for x in (k, v))
        for x in (k, v):
            x[~there] = torch.nan
    reads = list(range(seqs_q))
    if readers:
        reads = [draw.randrange(seqs_k) for _ in range(readers)]
        options["key_index"] = torch.tensor(reads, dtype=draw.choice([torch.int32, torch.int64]))
    grads = [torch.randn(x.shape, generator=torch_draw, dtype=torch.float64) for x in q_rows]
    grad = torch.cat(grads)
    if form_q == "dense":
        grad = grad.view_as(q)
    elif form_q == "packed":
        grad = torch.cat([grad, torch.full((3, heads, width), torch.nan, dtype=torch.float64)])
    sequences = Sequences(
        q=[x.numpy() for x in q_rows], k=k_copy, v=v_copy, grad=[x.numpy() for x in grads], reads=reads, exists=exists
    )
    sizes = f"{form_q} q {seqs_q}x{len_q}x{heads}, {form_k} k {seqs_k}x{len_k}x{k_heads}"
    what = f"{number}: {sizes}, width {width}, {options}"
    return Drawn((q, k, v), grad, options, sequences, cu_q, cu_k, what)


def by_sequence(x: Tensor, cu: list[int] | None) -> list[Any]:
    x = x.detach()
    if cu is None:
        return [rows.numpy() for rows in x]
    assert not x[cu[-1] :].any(), "rows of no sequence must be zeros"
    return [x[a:b].numpy() for a, b in pairwise(cu)]


def check(drawn: Drawn, function: Any, lse: bool) -> None:
    leaves = [x.detach().requires_grad_() for x in drawn.tensors]
    options = dict(drawn.options)
    out = function(*leaves, **options, **({"return_lse": True} if lse else {}))
    out, found_lse = out if lse else (out, None)
    (out * 1).backward(drawn.grad)
    scale = leaves[0].shape[-1] ** -0.5 if options["scale"] is None else options["scale"]
    wanted = attend(drawn.sequences, scale, options.get("dropout_p", 0.0), int(options.get("seed", 0)))
    got = {"out": by_sequence(out, drawn.cu_q)}
    for name, leaf, cu in zip(("dq", "dk", "dv"), leaves, (drawn.cu_q, drawn.cu_k, drawn.cu_k), strict=True):
        assert leaf.grad is not None
        got[name] = by_sequence(leaf.grad, cu)
    pairs = dict(zip(("out", "dq", "dk", "dv"), (wanted[0], *wanted[2:]), strict=True))
    for name, each in pairs.items():
        for n, (a, b) in enumerate(zip(got[name], each, strict=True)):
            np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-10, err_msg=f"{name} of sequence {n}, {drawn.what}")
    if found_lse is not None:
        rows, cu = found_lse.mT.numpy(), drawn.cu_q  # [..., heads, queries] -> [..., queries, heads]
        each = rows if cu is None else [rows[a:b] for a, b in pairwise(cu)]
        for n, (a, b) in enumerate(zip(each, wanted[1], strict=True)):
            np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-10, err_msg=f"lse of sequence {n}, {drawn.what}")
