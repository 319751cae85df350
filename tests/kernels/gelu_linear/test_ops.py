"""gelu_linear as an op: registration, compilation, errors, and the text of explain."""

import pytest
import torch

from mvlm_kernels import dispatch, explain, gelu_linear, use_backend
from mvlm_kernels.aot_cases import CASES
from mvlm_kernels.dispatch import ON_CPU

BF16 = torch.bfloat16
OPS = torch.ops.mvlm_kernels


@pytest.mark.slow
@pytest.mark.plain_empty
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_both_passes_pass_opcheck(backend):
    h, bias = torch.randn(3, 8, dtype=BF16), torch.randn(8)
    with use_backend(backend):
        for h_bias in (bias, None):
            torch.library.opcheck(OPS.gelu.default, (h, h_bias))
            for again in (True, False):
                torch.library.opcheck(OPS.gelu_backward.default, (h, h, h_bias, again))


@pytest.mark.slow
@pytest.mark.plain_empty
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiles_without_a_break_for_any_size():
    compiled = torch.compile(gelu_linear, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows, width in ((3, 8), (5, 12)):
        leaves = [torch.randn(s, requires_grad=True) for s in ((rows, width), (4, width), (4,), (width,))]
        h, weight, bias, h_bias = leaves
        with use_backend("triton"):
            got, want = (f(h, weight, bias, h_bias=h_bias) for f in (compiled, gelu_linear))
            grads = [torch.autograd.grad(out.square().sum(), leaves) for out in (got, want)]
        for a, b in zip((got, *grads[0]), (want, *grads[1]), strict=True):
            torch.testing.assert_close(a, b)


H, W, B, C = torch.zeros(2, 3, 4), torch.zeros(5, 4), torch.zeros(5), torch.zeros(4)


@pytest.mark.parametrize(
    "args, kwargs, message",
    [
        ((H[0, 0], W), {}, r"h and weight must have shapes \(.., C\) and \(D, C\), got \(4,\) and \(5, 4\)"),
        ((H, W[:, :3]), {}, r"h and weight must have shapes .*, got \(2, 3, 4\) and \(5, 3\)"),
        ((H, W, C), {}, r"bias must have shape \(5,\), got \(4,\)"),
        ((H, W, B), {"h_bias": B}, r"h_bias must have shape \(4,\), got \(5,\)"),
        ((H.int(), W), {}, "h must be float16, .*, got torch.int32"),
        ((H, W.to("meta")), {}, "weight must be on the device"),
    ],
)
def test_bad_input_says_what_was_wanted(args, kwargs, message):
    with pytest.raises(ValueError, match=message):
        gelu_linear(*args, **kwargs)


def test_explain_names_the_reasons():
    assert explain(gelu_linear, H, W).reasons == (ON_CPU,)


@pytest.mark.parametrize(
    "backend, trains_weight, rows", [("triton", True, 100), ("torch", True, 200), ("torch", False, 100)]
)
def test_the_gelu_is_saved_on_a_cpu_alone(backend, trains_weight, rows):
    """Kernels recompute it, and a frozen weight does not need it."""
    saved = []
    h = torch.randn(100, 8, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t), use_backend(backend):
        gelu_linear(h, torch.randn(5, 8, requires_grad=trains_weight))
    assert sum(t.numel() for t in saved) == rows * 8 + 5 * 8


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_frozen_weight_changes_no_other_gradient(backend):
    leaves = [torch.randn(s, requires_grad=True) for s in ((7, 12), (5, 12), (5,), (12,))]
    found = []
    with use_backend(backend):
        for weight in (leaves[1], leaves[1].detach()):
            h, _, bias, h_bias = leaves
            out = gelu_linear(h, weight, bias, h_bias=h_bias)
            found.append(torch.autograd.grad(out.square().sum(), (h, bias, h_bias)))
    for trained, frozen in zip(*found, strict=True):
        assert torch.equal(trained, frozen)


def test_launchers_read_no_tensor():
    launched = []
    with dispatch.recording(lambda kernel, *_: launched.append(kernel.__name__), 90):
        for _, launch in CASES["gelu_linear"]():
            launch()  # meta tensors: reading one on the host would raise
    assert {"gelu_kernel", "gelu_backward_kernel", "column_sum_kernel"} == set(launched)


@pytest.mark.plain_empty
def test_outputs_for_other_strides_are_those_that_a_compiler_is_told():
    h = torch.randn(4, 8, 6).transpose(1, 2)
    with use_backend("torch"):
        torch.library.opcheck(OPS.gelu.default, (h, None))
        torch.library.opcheck(OPS.gelu_backward.default, (h, h, None, True))
