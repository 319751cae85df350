"""The emulator's own tests compile kernels: they are not collected in a process that interprets them.

`make emulate` runs them, and tests/kernels/test_emulated.py in a process of its own.
"""

import os

import pytest

COMPILING = os.environ.get("TRITON_INTERPRET") == "0"
collect_ignore_glob = [] if COMPILING else ["test_[!p]*", "test_products.py"]


@pytest.fixture(params=["sm_80", "sm_90"])
def arch(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both architectures, one after the other, as the target of Triton's compiler."""
    from triton_proof.driver import install

    # The kernels of the emulator's own tests do not say whether products and sums are fused, which Triton warns of.
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")
    install(request.param)
    return request.param
