"""Which backend runs, and what explain says about it."""

from typing import Any

import pytest
import torch

import mvlm_kernels
from mvlm_kernels import configs, dispatch


def test_cpu_tensors_take_torch_and_say_so():
    reasons = dispatch.device_reasons(torch.device("cpu"))
    assert any("CPU" in r for r in reasons)
    assert dispatch.choose(reasons) == "torch"


def test_other_devices_are_named():
    assert "device type is meta" in dispatch.device_reasons(torch.device("meta"))[0]


def test_use_backend_forces_restores_and_refuses():
    with mvlm_kernels.use_backend("torch"):
        assert dispatch.choose([]) == "torch"
        with mvlm_kernels.use_backend("triton"):
            assert dispatch.choose(["the tensors are on the CPU"]) == "triton"  # this process interprets
            with pytest.raises(RuntimeError, match="heads are purple"):
                dispatch.choose(["heads are purple"])
        assert dispatch.choose([]) == "torch"
    assert dispatch.choose([]) == "triton"
    wrong: Any = "cuda"
    with pytest.raises(ValueError, match=r'"triton" or "torch", got .cuda.'), mvlm_kernels.use_backend(wrong):
        pass


def test_explain_refuses_what_is_not_an_op():
    with pytest.raises(ValueError, match="op must be one of"):
        mvlm_kernels.explain(print)


def test_config_lookup_by_architecture(tmp_path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "toy.json").write_text(
        '{"sm_80": {"a": {"n": 1}}, "sm_90": {"a": {"n": 2}}, "sm_100": {"a": {"n": 3}}}'
    )
    monkeypatch.setenv("MVLM_KERNELS_CONFIGS", str(tmp_path))
    found = [configs.lookup("toy", arch, "a")["n"] for arch in (80, 86, 89, 90, 100, 103, 120)]
    assert found == [1, 1, 1, 2, 3, 3, 1]
    with pytest.raises(KeyError, match=r"toy\.json has no tiles for sm_90 b"):
        configs.lookup("toy", 90, "b")
