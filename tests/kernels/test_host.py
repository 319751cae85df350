"""What a call costs the host, in Python functions entered: a count, as times on a busy machine say nothing."""

import sys
from collections.abc import Callable
from typing import Any

import pytest

from mvlm_benchmarks.kernels.host_time import contenders
from mvlm_kernels import dispatch, use_backend

# Counted when these were written; one that grows costs every call of every layer about a tenth of a microsecond.
MOST = {
    "cross_attention": 44,
    "gather_patches": 19,
    "masked_pixel_loss": 25,
    "linear_pixel_loss": 33,
    "place_tokens": 20,
}


def functions_entered(call: Callable[[], Any]) -> int:
    count = 0

    def profile(frame: Any, event: str, argument: Any) -> None:
        nonlocal count
        count += event == "call" and frame.f_globals.get("__name__", "").startswith("mvlm_kernels")

    sys.setprofile(profile)
    try:
        call()
    finally:
        sys.setprofile(None)
    return count


@pytest.mark.plain_empty
@pytest.mark.parametrize("op", MOST)
def test_a_call_enters_no_more_functions_than_it_did(op: str):
    ours, _ = CONTENDERS[op]
    with dispatch.recording(lambda *_: None, target_arch=90), use_backend("triton"):
        ours()  # fills the caches
        assert functions_entered(ours) <= MOST[op]


CONTENDERS = contenders()
