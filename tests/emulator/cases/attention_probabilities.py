"""Cases of ``attention_probabilities``, alone and with the log-sum-exp: against the reference in float64."""

from dataclasses import replace
from functools import partial
from typing import Any

import torch

from emulator.cases import Cases
from emulator.cases.attention import TYPES
from emulator.library import unwritten
from mvlm_kernels import attention_probabilities, cross_attention, use_backend
from mvlm_kernels.cross_attention.tiles import has_tiles
from support.kernels.attention import SIDES, Case, build

FAST = {"lengths/bf16", "long-packed-index/fp32"}


def check(case: Case) -> None:
    call = build(case)
    bounds: dict[str, Any] = {
        f"max_len_{side}": getattr(case, f"len_{side}") for side in "qk" if getattr(case, f"packed_{side}")
    }
    with use_backend("torch"):
        wanted = attention_probabilities(call.q.double(), call.k.double(), **call.kwargs, **bounds)
    given_lse: list[Any] = [None]
    if has_tiles(case.dtype, case.width, min(case.len_q, case.len_k), 80):
        given_lse.append(cross_attention(call.q, call.k, call.v, return_lse=True, **call.kwargs, **call.bounds)[1])
    for given in given_lse:
        got = attention_probabilities(call.q, call.k, given, **call.kwargs, **bounds)
        assert not unwritten(got)
        # The log-sum-exp of float32 comes from products in TF32.
        exact = given is None or case.dtype != torch.float32
        torch.testing.assert_close(got.double(), wanted, rtol=0, atol=1e-6 if exact else 5e-3)


def cases() -> Cases:
    for name, dtype in TYPES.items():
        for label, case in SIDES.items():
            yield f"{label}/{name}", partial(check, replace(case, dtype=dtype, width=64, heads=2))
