"""Choice of the backend, the text of explain, and versions that cannot interpret."""

import subprocess
import sys
from typing import Any

import pytest
import torch
from triton.runtime.errors import OutOfResources

import mvlm_kernels
from mvlm_kernels import dispatch
from mvlm_kernels.dispatch import refusal
from support.kernels.ops import ROWS, distinct


def test_use_backend_forces_restores_and_refuses():
    with mvlm_kernels.use_backend("torch"):
        assert dispatch.choose([]) == "torch"
        with mvlm_kernels.use_backend("triton"):
            assert dispatch.choose([dispatch.ON_CPU]) == "triton"  # this process interprets
            with pytest.raises(RuntimeError, match="heads are purple"):
                dispatch.choose([refusal("heads are purple", "paint them")])
        assert dispatch.choose([]) == "torch"
    assert dispatch.choose([]) == "triton"
    wrong: Any = "cuda"
    with pytest.raises(ValueError, match=r'"triton" or "torch", got .cuda.'), mvlm_kernels.use_backend(wrong):
        pass


@pytest.mark.parametrize("name", ["attention", "attention, packed", "patches", "loss", "tokens", "norm", "gelu"])
def test_a_kernel_that_does_not_fit_the_gpu_is_left_to_torch_from_then_on(name: str, monkeypatch):
    row = next(row for label, row in ROWS.items() if label.startswith(name))
    if row.op == "cross_attention":
        row = row.cast(torch.bfloat16)  # its float64 has no kernel on any GPU
    leaves = row.leaves()
    wanted = distinct(row.ours(*leaves, **row.constants))
    launches = []

    def launch(kernel: Any, *_: Any, **__: Any) -> None:
        launches.append(kernel)
        raise OutOfResources(200_000, 101_376, "shared memory")

    monkeypatch.setattr(dispatch, "launch", launch)
    monkeypatch.setattr(dispatch, "device_reasons", lambda _: ())
    monkeypatch.setattr(dispatch, "_without_resources", {})
    with pytest.warns(RuntimeWarning, match="shared memory"):
        found = distinct(row.ours(*leaves, **row.constants))
    if found[0].requires_grad:
        torch.autograd.grad(found, leaves, [torch.ones_like(x) for x in found], allow_unused=True)
    torch.testing.assert_close(found, wanted, rtol=2e-2, atol=2e-2)
    assert len(launches) == 1
    if row.op == "cross_attention":
        assert "shared memory" in str(mvlm_kernels.explain(mvlm_kernels.cross_attention, *leaves, **row.constants))


@pytest.mark.slow
def test_importing_the_kernels_does_not_import_the_compiler():
    code = "import sys, mvlm_kernels; assert not {'torch._dynamo', 'triton'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
