"""Random combinations of attention's features, and their comparison with the oracle."""

import random
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mvlm_kernels.cross_attention.cases import oracle

SEED = 0x1234_5678_9ABC_DEF1


@dataclass
class Drawn:
    """A random call of attention: q, k and v, the output's gradient, the other arguments, and a description of all."""

    tensors: tuple[Any, Any, Any]  # q, k, v
    grad: Tensor
    options: dict[str, Any]
    longest_keys: int
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

    def side(form: str, seqs: int, longest: int, count: int, name: str) -> tuple[int, Tensor]:
        """Draw one side, q or k, and add its lengths to the options. Returns its number of rows and its tensor.

        form: "dense" or "packed". count: number of heads. name: "q" or "k". Rows past the last sequence are NaN.
        """
        lengths = [longest] * seqs
        if form != "dense":
            lengths = [draw.choice([0, 1, longest // 2, longest]) for _ in range(seqs)]
            lengths[draw.randrange(seqs)] = longest
        bounds = [sum(lengths[:i]) for i in range(seqs + 1)]
        total = bounds[-1] + (3 if form == "packed" else 0)
        shape = (total, 2, count, width) if draw.random() < 0.3 else (total, 1, count, width)
        rows = torch.randn(shape, generator=torch_draw, dtype=torch.float64)[:, 0]
        rows[bounds[-1] :] = torch.nan
        if form == "dense":
            return bounds[-1], rows.unflatten(0, (seqs, longest))
        cu = torch.tensor(bounds, dtype=draw.choice([torch.int32, torch.int64]))
        options[f"cu_seqlens_{name}"] = cu
        if draw.random() < 0.7 or longest > 128:
            options[f"max_len_{name}"] = longest
        return bounds[-1], rows

    def like(form: str, x: Tensor, rows: int) -> Tensor:
        """Draw values of x's shape, with NaN behind the last packed sequence. rows: number of rows of all sequences."""
        drawn = torch.randn((rows, *x.shape[-2:]), generator=torch_draw, dtype=torch.float64)
        if form == "dense":
            return drawn.view_as(x)
        return torch.cat([drawn, torch.full((3, *x.shape[-2:]), torch.nan, dtype=torch.float64)])

    rows_q, q = side(form_q, seqs_q, len_q, heads, "q")
    rows_k, k = side(form_k, seqs_k, len_k, k_heads, "k")
    v = like(form_k, k, rows_k)
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
        k, v = (x.clone() if x.is_contiguous() else x for x in (k, v))
        for x in (k, v):
            x[~there] = torch.nan
    if readers:
        reads = [draw.randrange(seqs_k) for _ in range(readers)]
        options["key_index"] = torch.tensor(reads, dtype=draw.choice([torch.int32, torch.int64]))
    grad = like(form_q, q, rows_q)
    sizes = f"{form_q} q {seqs_q}x{len_q}x{heads}, {form_k} k {seqs_k}x{len_k}x{k_heads}"
    what = f"{number}: {sizes}, width {width}, {options}"
    return Drawn((q, k, v), grad, options, len_k, what)


def results(drawn: Drawn, function: Any, lse: bool) -> dict[str, Tensor]:
    """Output, log-sum-exp, and gradients of q, k and v."""
    leaves = [x.detach().requires_grad_() for x in drawn.tensors]
    out = function(*leaves, **drawn.options, **({"return_lse": True} if lse else {}))
    out, *sums = out if lse else (out,)
    (out * 1).backward(drawn.grad)
    found = {"out": out.detach(), **{f"lse {i}": x.detach() for i, x in enumerate(sums)}}
    return found | {f"d{name}": x.grad for name, x in zip("qkv", leaves, strict=True) if x.grad is not None}


def check(drawn: Drawn, function: Any, lse: bool) -> None:
    wanted, found = results(drawn, oracle, lse), results(drawn, function, lse)
    assert list(found) == list(wanted)
    for name, x in found.items():
        x = x[..., : wanted[name].shape[-1]]  # rows of no sequence have no log-sum-exp
        what = f"{name} of {drawn.what}"
        torch.testing.assert_close(
            x, wanted[name], rtol=1e-9, atol=1e-10, msg=lambda text, what=what: f"{what}: {text}"
        )
