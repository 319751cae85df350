"""MVLM_KERNELS_DEBUG=1: values of ids and lengths are read on a GPU too, and only then.

Without a GPU, tensors on the meta device stand for its tensors: they are away from the CPU, and reading one raises.
"""

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch

from mvlm_kernels import dispatch, use_backend

pytestmark = pytest.mark.plain_empty


@pytest.mark.parametrize("value, checks", [(None, False), ("", False), ("0", False), ("1", True)])
def test_the_switch(value: str | None, checks: bool, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("MVLM_KERNELS_DEBUG", raising=False)
    if value is not None:
        monkeypatch.setenv("MVLM_KERNELS_DEBUG", value)
    assert dispatch.checks_values(torch.device("cuda")) == checks
    assert dispatch.checks_values(torch.device("cpu"))


def launches() -> dict[str, Callable[[], Any]]:
    """What each op runs on a GPU, below the dispatcher, with everything whose values it could check."""

    def module(name: str) -> Any:
        return importlib.import_module(f"mvlm_kernels.{name}")

    def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    ids, images = meta(2, 3, dtype=torch.int32), meta(2, 3, 32, 32, dtype=torch.uint8)
    pred, row = meta(2, 3, 192), meta(8)
    q, k = meta(2, 9, 2, 32), meta(2, 7, 2, 32)
    lengths = meta(2, dtype=torch.int32)
    pixels = (images, ids, 8, None, None)
    losses = module("pixel_loss.ops")
    attention = module("cross_attention.ops")._implementation
    bounds = (0.2, 9, 7)
    return {
        "key_lengths": lambda: attention(q, k, k, lengths, None, None, None, None, *bounds),
        "key_index": lambda: attention(q, k, k, None, None, lengths, None, None, *bounds),
        "gather_patches": lambda: module("gather_patches")._forward(*pixels, torch.bfloat16),
        "masked_pixel_loss": lambda: losses._masked(pred, *pixels, "l1", False, True, True),
        "linear_pixel_loss": lambda: losses._linear(
            meta(2, 3, 5), meta(192, 5), None, *pixels, "l1", False, True, True
        ),
        "visible_ids": lambda: module("place_tokens")._forward(meta(2, 3, 8), row, meta(17, 8), row, None, ids),
    }


@pytest.mark.parametrize("name", launches())
def test_values_are_read_in_debug_mode_alone(name: str, monkeypatch: pytest.MonkeyPatch):
    launched = []
    with dispatch.recording(lambda kernel, *_: launched.append(kernel), 90), use_backend("triton"):
        monkeypatch.delenv("MVLM_KERNELS_DEBUG", raising=False)
        launches()[name]()
        assert launched
        launched.clear()
        monkeypatch.setenv("MVLM_KERNELS_DEBUG", "1")
        with pytest.raises(RuntimeError, match="meta tensors"):
            launches()[name]()
        assert not launched  # the values come first
