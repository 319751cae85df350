"""Limits of the attention kernels, as why_not_triton and the tile tables give them without tensors."""

import json

import pytest
import torch

from mvlm_kernels import cross_attention, use_backend
from mvlm_kernels.cross_attention import HEAD_WIDTHS, LONGEST_SHORT_SIDE, tiles, why_not_triton
from mvlm_kernels.cross_attention.arguments import short_sides_up_to
from mvlm_kernels.cross_attention.cases import Shape
from mvlm_kernels.cross_attention.launch import heads_of
from mvlm_kernels.cross_attention.reference import cross_attention_reference
from mvlm_kernels.cross_attention.tiles import has_tiles
from support.kernels.attention import build, run

GPU = torch.device("cuda", 0)
needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="asks for a machine without CUDA")


@pytest.mark.parametrize("width", HEAD_WIDTHS)
@needs_no_gpu
def test_every_width_up_to_the_longest_short_side_has_a_kernel(width: int):
    assert why_not_triton(GPU, torch.bfloat16, head_width=width, short_rows=LONGEST_SHORT_SIDE) == ()


def test_widest_tiles_need_the_shared_memory_of_a_compute_capability():
    """A block has 99 KiB on 8.6, 8.9 and 12.x, and 163 or more on all others, 8.7 (Orin) included."""
    capabilities = 80, 86, 87, 89, 90, 100, 110, 120, 121
    assert [arch for arch in capabilities if not has_tiles(torch.bfloat16, 128, 128, arch)] == [86, 89, 120, 121]


def test_sides_of_197_rows_are_short_only_on_demand():
    """Self-attention of image patches on the kernels, in tiles of 256 keys."""
    call = build(Shape(len_q=197, len_k=197, batch=1, dtype=torch.float64))
    with use_backend("triton"):
        with pytest.raises(RuntimeError, match="both sides are longer than 128"):
            cross_attention(call.q, call.k, call.v)
        with short_sides_up_to(256):
            got = run(cross_attention, call)
    for a, b in zip(got, run(cross_attention_reference, call), strict=True):
        torch.testing.assert_close(a, b)
    capabilities = 80, 90, 100, 120
    assert [arch for arch in capabilities if has_tiles(torch.bfloat16, 64, 197, arch)] == [90, 100]
    assert not has_tiles(torch.bfloat16, 128, 197, 90)


def test_strides_of_odd_widths_are_multiples_of_a_vector():
    """Kernels load heads of 8, 24, 40 ... in vectors of 8 elements, so other strides have to be copied first."""
    fused = torch.zeros(2, 9, 3, 2, 40)  # projections of queries, keys and values side by side
    q = fused[:, :, 0]
    assert heads_of(q, False)[0].data_ptr() == q.data_ptr()
    odd = torch.zeros(2, 9, 2, 41)[..., :40]
    x, *strides = heads_of(odd, False)
    assert x.is_contiguous()
    assert not any(stride % 8 for stride in strides)
    even = torch.zeros(2, 9, 2, 65)[..., :64]  # Triton sees these strides itself
    assert heads_of(even, False)[0] is even


def test_exceptions_replace_fields_of_the_rules_of_attention(tmp_path, monkeypatch: pytest.MonkeyPatch):
    kernel, other = "short_kv_forward", "short_q_forward"
    asked = torch.bfloat16, "cuda", 64, 24, 197

    def chosen(name: str, arch: int) -> dict:
        tiles.meta.cache_clear()
        return tiles.meta(name, *asked, arch)

    rules = {(name, arch): chosen(name, arch) for name in (kernel, other) for arch in (80, 90)}
    table = {"sm_80": {}, "sm_90": {f"{kernel}/16bit/64/32": {"num_warps": 2, "num_stages": 3}}, "sm_100": {}}
    (tmp_path / "cross_attention.json").write_text(json.dumps(table))
    monkeypatch.setenv("MVLM_KERNELS_CONFIGS", str(tmp_path))
    assert chosen(kernel, 90) == {**rules[kernel, 90], "num_warps": 2, "num_stages": 3}
    for name, arch in ((kernel, 80), (other, 90)):
        assert chosen(name, arch) == rules[name, arch]
    tiles.meta.cache_clear()
