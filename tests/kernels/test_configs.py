"""Tables of tiles."""

import pytest

from mvlm_kernels import configs


def test_tile_tables_are_looked_up_by_architecture(tmp_path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "toy.json").write_text(
        '{"sm_80": {"a": {"n": 1}}, "sm_90": {"a": {"n": 2}}, "sm_100": {"a": {"n": 3}}}'
    )
    monkeypatch.setenv("MVLM_KERNELS_CONFIGS", str(tmp_path))
    found = [configs.lookup("toy", arch, "a")["n"] for arch in (80, 86, 89, 90, 100, 103, 120)]
    assert found == [1, 1, 1, 2, 3, 3, 1]
    with pytest.raises(KeyError, match=r"toy\.json has no tiles for sm_90 b"):
        configs.lookup("toy", 90, "b")
