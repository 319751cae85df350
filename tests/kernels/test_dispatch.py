"""Choice of the backend, the text of explain, and versions that cannot interpret."""

import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import numpy
import pytest
import torch
import triton

import mvlm_kernels
from mvlm_kernels import dispatch
from mvlm_kernels.dispatch import interpreter_fault, refusal
from mvlm_kernels.layers import CrossAttention


def test_cpu_tensors_take_torch_and_say_so():
    reasons = dispatch.device_reasons(torch.device("cpu"))
    assert any("CPU" in r for r in reasons)
    assert dispatch.choose(reasons) == "torch"


@pytest.fixture
def fresh_reasons() -> Iterator[None]:
    dispatch.device_reasons.cache_clear()
    yield
    dispatch.device_reasons.cache_clear()


@pytest.mark.parametrize("kind", ["meta", "xpu", "mps"])
def test_reasons_name_a_device_without_kernels_and_what_runs(kind: str):
    wanted = (f"the kernels run on cuda, and the tensors are on {kind}; torch runs; move them to cuda",)
    assert dispatch.device_reasons(torch.device(kind)) == wanted


def test_reasons_say_how_to_get_triton(monkeypatch: pytest.MonkeyPatch, fresh_reasons: None):
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    assert dispatch.device_reasons(torch.device("cuda")) == ("triton is not installed; pip install triton",)
    assert len(dispatch.device_reasons(torch.device("cpu"))) == 2


def test_reasons_name_an_older_gpu(monkeypatch: pytest.MonkeyPatch, fresh_reasons: None):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (7, 5))
    wanted = ("compute capability 8.0 or later is needed, cuda:1 has 7.5; torch runs; use an A100 or a later GPU",)
    assert dispatch.device_reasons(torch.device("cuda", 1)) == wanted


def test_reasons_name_a_torch_for_rocm(monkeypatch: pytest.MonkeyPatch, fresh_reasons: None):
    monkeypatch.setattr(torch.version, "hip", "7.0")
    (reason,) = dispatch.device_reasons(torch.device("cuda"))
    assert "AMD" in reason


def test_reasons_name_the_interpreter(monkeypatch: pytest.MonkeyPatch, fresh_reasons: None):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(dispatch, "interpreting", lambda: True)
    assert "TRITON_INTERPRET=1 is set" in dispatch.device_reasons(torch.device("cuda", 0))[0]
    assert "unset it for cuda:0" in dispatch.device_reasons(torch.device("cuda", 0))[0]


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


def test_text_of_explain_separates_the_choice_from_what_is_against_triton():
    images = torch.zeros(1, 3, 4, 4)

    def text() -> str:
        return str(mvlm_kernels.explain(mvlm_kernels.gather_patches, images, None, 2))

    assert text() == f"runs: torch on cpu\nnot triton: {dispatch.ON_CPU}"
    with mvlm_kernels.use_backend("torch"):
        forced = 'use_backend("torch") is in force; leave its block for the usual choice'
        assert text() == f"runs: torch on cpu\nnot triton: {forced}\nnot triton: {dispatch.ON_CPU}"
    with mvlm_kernels.use_backend("triton"):
        forced = 'use_backend("triton") is in force; leave its block for the usual choice'
        assert text() == f"runs: triton on cpu\nbecause: {forced}\nagainst triton: {dispatch.ON_CPU}"
    covered = mvlm_kernels.Explanation("triton", ("the fused kernel covers this call",), torch.device("cuda", 0))
    assert str(covered) == "runs: triton on cuda:0\nbecause: the fused kernel covers this call"


def test_explain_refuses_a_function_that_is_not_an_op():
    with pytest.raises(ValueError, match=r"op must be one of .*, got print$"):
        mvlm_kernels.explain(print)
    with pytest.raises(
        ValueError, match=r"op must be one of .*, got CrossAttention; a layer calls an op: explain that$"
    ):
        mvlm_kernels.explain(CrossAttention(64, 4), torch.zeros(2, 3, 64))


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


def test_forced_kernels_name_the_versions_that_cannot_interpret(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(triton, "__version__", "3.6.0")
    monkeypatch.setattr(numpy, "__version__", "2.4.6")
    images = torch.zeros(1, 3, 4, 4)
    dispatch.interpreter_reasons.cache_clear()
    try:
        assert mvlm_kernels.gather_patches(images, None, 2).shape == (1, 4, 12)  # torch runs as before
        with (
            mvlm_kernels.use_backend("triton"),
            pytest.raises(
                RuntimeError, match=r"triton 3\.6\.0 needs numpy<2\.4, and numpy 2\.4\.6 .* install triton>=3\.7"
            ),
        ):
            mvlm_kernels.gather_patches(images, None, 2)
    finally:
        dispatch.interpreter_reasons.cache_clear()


def test_ops_that_ask_for_autocast_run_on_the_meta_device():
    def meta(*shape: int) -> torch.Tensor:
        return torch.empty(shape, device="meta")

    assert mvlm_kernels.cross_attention(meta(2, 9, 2, 32), meta(2, 7, 2, 32), meta(2, 7, 2, 32)).shape == (2, 9, 2, 32)
    loss = mvlm_kernels.linear_pixel_loss(meta(2, 4, 5), meta(12, 5), meta(12), meta(2, 3, 4, 4), None, 2)
    assert loss.shape == ()


@pytest.mark.slow
def test_importing_the_kernels_does_not_import_the_compiler():
    code = "import sys, mvlm_kernels; assert not {'torch._dynamo', 'triton'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_constant_of_compilers_is_marked_as_torch_marks_it():
    def ours() -> None: ...
    def theirs() -> None: ...

    wanted = vars(torch.compiler.assume_constant_result(theirs))
    assert wanted
    assert vars(dispatch.constant_when_compiled(ours)) == wanted
