"""Tables of tiles."""

import inspect
import json

import pytest
import torch

from mvlm_kernels.cross_attention import tiles


def test_tile_tables_are_looked_up_by_architecture(tmp_path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "cross_attention.json").write_text(
        '{"sm_80": {"a": {"n": 1}}, "sm_90": {"a": {"n": 2}}, "sm_100": {"a": {"n": 3}}}'
    )
    monkeypatch.setenv("MVLM_KERNELS_CONFIGS", str(tmp_path))
    found = [tiles.exceptions(arch)["a"]["n"] for arch in (80, 86, 89, 90, 100, 103, 120)]
    assert found == [1, 1, 1, 2, 3, 3, 1]


def test_exceptions_replace_fields_of_the_rules_of_attention(tmp_path, monkeypatch: pytest.MonkeyPatch):
    kernel, other = "short_kv_forward", "short_q_forward"
    asked = torch.bfloat16, "cuda", 64, 24, 197

    def chosen(name: str, arch: int) -> dict:
        inspect.unwrap(tiles.meta, stop=lambda f: hasattr(f, "cache_clear")).cache_clear()  # pyright: ignore[reportFunctionMemberAccess]
        return tiles.meta(name, *asked, arch)

    rules = {(name, arch): chosen(name, arch) for name in (kernel, other) for arch in (80, 90)}
    table = {"sm_80": {}, "sm_90": {f"{kernel}/16bit/64/32": {"num_warps": 2, "num_stages": 3}}, "sm_100": {}}
    (tmp_path / "cross_attention.json").write_text(json.dumps(table))
    monkeypatch.setenv("MVLM_KERNELS_CONFIGS", str(tmp_path))
    assert chosen(kernel, 90) == {**rules[kernel, 90], "num_warps": 2, "num_stages": 3}
    for name, arch in ((kernel, 80), (other, 90)):
        assert chosen(name, arch) == rules[name, arch]
    inspect.unwrap(tiles.meta, stop=lambda f: hasattr(f, "cache_clear")).cache_clear()  # pyright: ignore[reportFunctionMemberAccess]
