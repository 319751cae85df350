"""MVLM_KERNELS_DEBUG=1: ids and lengths are checked on a GPU too, and only then.

Meta tensors stand for a GPU's tensors: they are not on the CPU, and reading one raises.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from mvlm_kernels import (
    cross_attention,
    dispatch,
    gather_patches,
    linear_pixel_loss,
    masked_pixel_loss,
    place_tokens,
    use_backend,
)

pytestmark = pytest.mark.plain_empty


@pytest.mark.parametrize("value, checks", [(None, False), ("", False), ("0", False), ("1", True)])
def test_debug_switch_turns_on_checks_of_gpu_values(value: str | None, checks: bool, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("MVLM_KERNELS_DEBUG", raising=False)
    if value is not None:
        monkeypatch.setenv("MVLM_KERNELS_DEBUG", value)
    assert dispatch.checks_values(torch.device("cuda")) == checks
    assert dispatch.checks_values(torch.device("cpu"))


def calls() -> dict[str, Callable[[], Any]]:
    """A call of each op with every argument whose values it can check."""

    def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    ids, images = meta(2, 3, dtype=torch.int32), meta(2, 3, 32, 32, dtype=torch.uint8)
    row, positions = meta(8), meta(17, 8)
    q, k = meta(2, 9, 2, 32), meta(2, 7, 2, 32)
    lengths = meta(2, dtype=torch.int32)
    return {
        "key_lengths": lambda: cross_attention(q, k, k, key_lengths=lengths),
        "key_index": lambda: cross_attention(q, k, k, key_index=lengths),
        "gather_patches": lambda: gather_patches(images, ids, 8),
        "masked_pixel_loss": lambda: masked_pixel_loss(meta(2, 3, 192), images, ids, 8),
        "linear_pixel_loss": lambda: linear_pixel_loss(meta(2, 3, 5), meta(192, 5), None, images, ids, 8),
        "visible_ids": lambda: place_tokens(meta(2, 3, 8), row, positions, row, visible_ids=ids),
    }


@pytest.mark.parametrize("name", calls())
def test_gpu_values_are_read_in_debug_mode_only(name: str, monkeypatch: pytest.MonkeyPatch):
    launched = []
    with dispatch.recording(lambda kernel, *_: launched.append(kernel), 90), use_backend("triton"):
        monkeypatch.delenv("MVLM_KERNELS_DEBUG", raising=False)
        calls()[name]()
        assert launched
        launched.clear()
        monkeypatch.setenv("MVLM_KERNELS_DEBUG", "1")
        with pytest.raises(RuntimeError, match="meta tensors"):
            calls()[name]()
        assert not launched  # values are checked before the launch
