"""Choice of the backend, the text of explain, and versions that cannot interpret."""

import subprocess
import sys
from typing import Any

import pytest

import mvlm_kernels
from mvlm_kernels import dispatch
from mvlm_kernels.dispatch import interpreter_fault, refusal


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


@pytest.mark.parametrize(
    "triton_version, numpy_version, works",
    [
        ("3.6.0", "2.3.5", True),
        ("3.6.0", "2.4.0rc1", False),
        ("3.6.0", "3.0.0", False),
        ("3.7.0", "2.4.6", True),
        ("4.0.0", "2.4.6", True),
    ],
)
def test_interpreter_of_triton_before_3_7_needs_numpy_before_2_4(triton_version: str, numpy_version: str, works: bool):
    assert (interpreter_fault(triton_version, numpy_version) is None) == works


@pytest.mark.slow
def test_importing_the_kernels_does_not_import_the_compiler():
    code = "import sys, mvlm_kernels; assert not {'torch._dynamo', 'triton'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
