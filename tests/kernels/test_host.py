"""Host cost of a call in Python functions entered. A count, because times on a busy machine say nothing."""

import sys
from collections.abc import Callable
from typing import Any

import pytest

from mvlm_benchmarks.kernels.host_time import contenders
from mvlm_kernels import dispatch, use_backend

# Up to a tenth above the counts of today (58, 19, 26, 36, 19, 49, 22), so that code can be refactored. A Python
# function costs every call of every layer about a tenth of a microsecond.
MOST = {
    "cross_attention": 61,
    "gather_patches": 21,
    "masked_pixel_loss": 28,
    "linear_pixel_loss": 38,
    "place_tokens": 21,
    "add_layer_norm": 53,
    "gelu_linear": 24,
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
def test_call_of_an_op_enters_few_python_functions(op: str):
    ours, _ = CONTENDERS[op]
    with dispatch.recording(lambda *_: None, target_arch=90), use_backend("triton"):
        ours()  # fills the caches
        assert functions_entered(ours) <= MOST[op]


CONTENDERS = contenders()
