"""Cases of cross-attention: output and gradients against the float64 reference."""

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch

from emulator.cases import Cases
from emulator.library import multiprocessors
from mvlm_kernels import cross_attention, dispatch
from mvlm_kernels.cross_attention.arguments import Sides, longest_sequences, short_side
from mvlm_kernels.cross_attention.reference import cross_attention_reference
from mvlm_kernels.cross_attention.tiles import has_tiles
from support.kernels.accuracy import assert_accurate
from support.kernels.attention import SIDES, Case, build, run
from triton_proof.driver import unwritten

TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# Relative RMS error of products of float32 operands, which keep 10 bits of their mantissa (TF32).
TF32_RMS = 4e-3
NAMES = ("out", "dq", "dk", "dv")


def check(case: Case, processors: int = 0, **options: Any) -> None:
    """16-bit types within the bounds of the interpreted kernels, float32 within TF32_RMS; every element written."""
    call = build(case)
    oracle = run(cross_attention_reference, call, torch.float64, **options)
    same = run(cross_attention_reference, call, **options)
    cu_q, cu_k, max_q, max_k = (
        values.get(f"{name}_{side}")
        for values, name in ((call.kwargs, "cu_seqlens"), (call.bounds, "max_len"))
        for side in "qk"
    )
    lengths = longest_sequences(call.q, call.k, Sides(cu_seqlens_q=cu_q, cu_seqlens_k=cu_k), max_q, max_k)
    short = lengths[1] if short_side(*lengths) == "kv" else lengths[0]
    if not has_tiles(case.dtype, case.width, short, dispatch.arch(call.q.device)):
        pytest.skip("no tiles: another backend runs on a GPU")
    with multiprocessors(processors):
        got = run(cross_attention, call, **call.bounds, **options)
    for name, terms, x, y, z in zip(NAMES, (1, 8, 8, 1), got, same, oracle, strict=True):
        assert not unwritten(x), f"{name}: {unwritten(x)} elements unwritten"
        if case.dtype == torch.float32:
            assert x.isfinite().all(), f"{name}: not finite"
            scale = max(float(z.square().mean().sqrt()), 0.02 * terms)
            error = float((x.double() - z).square().mean().sqrt()) / scale
            assert error < TF32_RMS, f"{name}: relative RMS error {error:.2e}"
        else:
            assert_accurate(name, x, y, z, terms=terms)


PAPER = {
    "image-text": Case(len_q=197, len_k=32, batch=3, heads=2, width=64, lengths=True),
    "text-image": Case(len_q=32, len_k=197, batch=3, heads=2, width=64),
    "text-self-packed": Case(len_q=32, len_k=32, batch=6, heads=2, width=64, packed_q=True, packed_k=True),
    "text-self": Case(len_q=32, len_k=32, batch=3, heads=2, width=64, lengths=True),
    "384px-image-text": Case(len_q=577, len_k=32, batch=2, heads=2, width=64, lengths=True),
    "384px-text-image": Case(len_q=32, len_k=577, batch=2, heads=2, width=64),
    "captions-of-one-image": Case(len_q=32, len_k=197, batch=2, readers=5, heads=2, width=64),
    "packed-text-image": Case(len_q=32, len_k=197, batch=3, heads=2, width=64, packed_q=True),
    "image-packed-text": Case(len_q=197, len_k=32, batch=3, heads=2, width=64, packed_k=True),
    "batch-1": Case(len_q=197, len_k=32, batch=1, heads=1, width=64),
    # [CLS] alone asks in the last block: one query an image, its keys packed and shared by an index.
    "cls-packed-index": Case(len_q=1, len_k=32, batch=3, readers=5, heads=2, width=64, packed_k=True),
}
FAST = {
    "paper/image-text/bf16/whole",
    "paper/text-image/bf16/splits",
    "paper/captions-of-one-image/bf16/splits",
    "paper/cls-packed-index/bf16/whole",
}
SIZES = ((65, 31), (31, 131), (130, 100), (100, 150), (197, 16), (9, 197))


def cases() -> Cases:
    for name, dtype in TYPES.items():
        for processors in (0, 40):
            ending = f"{name}/{'splits' if processors else 'whole'}"
            for label, case in PAPER.items():
                yield f"paper/{label}/{ending}", partial(check, replace(case, dtype=dtype), processors)
            ids = torch.int64 if processors else torch.int32
            for label, case in SIDES.items():
                case = replace(case, dtype=dtype, width=64, heads=2, ids=ids, seed=processors)
                yield f"sides/{label}/{ending}", partial(check, case, processors)
        for width in (32, 64, 80, 96, 128):
            for len_q, len_k in SIZES:
                case = Case(len_q=len_q, len_k=len_k, width=width, dtype=dtype, lengths=True)
                yield f"widths/{width}/{len_q}x{len_k}/{name}", partial(check, case)
        for width in (8, 40, 104):  # no multiple of 16: vectors by what tile_io says of strides
            for len_q, len_k in SIZES[:2]:
                case = Case(len_q=len_q, len_k=len_k, width=width, dtype=dtype, heads=3, layout="strided")
                yield f"widths/{width}/{len_q}x{len_k}/{name}", partial(check, case)
    for label in ("lengths", "index", "packed-both", "long-lengths", "long-index", "long-packed-q"):
        case = replace(SIDES[label], heads=4, width=64, dtype=torch.bfloat16)
        yield f"grouped/{label}", partial(check, replace(case, key_heads=2))
        yield f"dropout/{label}", partial(check, case, dropout_p=0.2, seed=torch.tensor(2**62 + 5))
    for layout in ("strided", "expanded"):
        for label in ("lengths", "packed-k", "long-index", "index", "long-packed-k"):
            case = replace(SIDES[label], layout=layout, heads=2, dtype=torch.bfloat16)
            yield f"layouts/{layout}/{label}", partial(check, case)
    for label in ("packed-k", "packed-both", "packed-q", "long-packed-q", "long-packed-k"):
        yield f"unbounded/{label}", partial(check, replace(SIDES[label], bounded=False, dtype=torch.bfloat16))
