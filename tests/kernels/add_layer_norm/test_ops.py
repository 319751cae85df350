"""add_layer_norm as an op: registration, compilation, errors, and the text of explain."""

from typing import Any

import pytest
import torch

from mvlm_kernels import add_layer_norm, dispatch, explain, use_backend
from mvlm_kernels.aot_cases import CASES
from mvlm_kernels.dispatch import ON_CPU
from support.kernels.norms import case

BF16, FP32 = torch.bfloat16, torch.float32
OPS = torch.ops.mvlm_kernels


@pytest.mark.slow
@pytest.mark.plain_empty
@pytest.mark.parametrize("post_norm", [False, True])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_both_passes_pass_opcheck(backend, post_norm):
    with use_backend(backend):
        for y_dtype in (BF16, FP32, None):
            leaves: list[Any] = [None if t is None else t.requires_grad_() for t in case(3, 8, y_dtype=y_dtype)]
            torch.library.opcheck(OPS.add_layer_norm.default, (*leaves, 1e-5, BF16, post_norm))
        x, weight = leaves[0].detach(), leaves[3].detach()
        for needs_bias, y_dtype in ((True, BF16), (False, FP32)):
            args = x.to(BF16), x, x, x[:, 0].clone(), x[:, 1].clone(), weight, FP32, y_dtype, post_norm, needs_bias
            torch.library.opcheck(OPS.add_layer_norm_backward.default, args)


@pytest.mark.slow
@pytest.mark.plain_empty
@pytest.mark.parametrize("post_norm", [False, True])
def test_compiles_without_a_break_for_any_size(post_norm):
    compiled = torch.compile(add_layer_norm, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows, width in ((3, 8), (5, 12)):
        x, y, y_bias, weight, bias = leaves = [t.requires_grad_() for t in case(rows, width)]
        options = {"y_bias": y_bias, "out_dtype": BF16, "post_norm": post_norm}
        with use_backend("triton"):
            got = compiled(x, y, weight, bias, **options)
            want = add_layer_norm(x, y, weight, bias, **options)
            grads = [
                torch.autograd.grad([out.float().square().sum() for out in outputs], leaves) for outputs in (got, want)
            ]
        for a, b in zip((*got, *grads[0]), (*want, *grads[1]), strict=True):
            assert torch.equal(a, b)


X, W = torch.zeros(2, 3, 4), torch.zeros(4)


@pytest.mark.parametrize(
    "args, kwargs, message",
    [
        ((X[..., :0], None, W, W), {}, r"x must have shape \(.., C\) with C at least 1, got \(2, 3, 0\)"),
        ((X, X[:1], W, W), {}, r"y must have the shape of x, \(2, 3, 4\), got \(1, 3, 4\)"),
        ((X, None, W, W), {"y_bias": W}, "y_bias must be None where y is None"),
        ((X, X, W[:3], W), {}, r"weight must have shape \(4,\), got \(3,\)"),
        ((X, X, W, W[:3]), {}, r"bias must have shape \(4,\), got \(3,\)"),
        ((X, X, W, W), {"y_bias": W[:3]}, r"y_bias must have shape \(4,\), got \(3,\)"),
        ((X.int(), X, W, W), {}, "x must be float16, .*, got torch.int32"),
        ((X, X.to("meta"), W, W), {}, "y must be on the device"),
        ((X, X, W, W), {"out_dtype": torch.int8}, "out_dtype must be float16, .*, got torch.int8"),
    ],
)
def test_bad_input_says_what_was_wanted(args, kwargs, message):
    with pytest.raises(ValueError, match=message):
        add_layer_norm(*args, **kwargs)


def test_explain_names_the_reasons():
    assert explain(add_layer_norm, X, X, W, W).reasons == (ON_CPU,)
    wide = torch.zeros(1, 9000)
    assert "a row has 9000 values" in explain(add_layer_norm, wide, wide, wide[0], wide[0]).reasons[1]


def test_nothing_is_copied_where_one_tensor_serves():
    x = torch.randn(3, 4)
    stream, n = add_layer_norm(x, None, W, W, out_dtype=BF16)
    assert stream is x
    assert n.dtype == BF16
    stream, n = add_layer_norm(x, x, W, W, post_norm=True)
    assert stream is n


def test_launchers_read_no_tensor():
    launched = []
    with dispatch.recording(lambda kernel, *_: launched.append(kernel.__name__), 90):
        for _, launch in CASES["add_layer_norm"]():
            launch()  # meta tensors: reading one on the host would raise
    assert {"add_norm_kernel", "add_norm_backward_kernel", "column_sum_kernel"} == set(launched)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of torch.export about its own internals
def test_an_exported_program_takes_any_number_of_rows():
    class Norm(torch.nn.Module):
        def forward(self, x, y):
            return add_layer_norm(x, y, torch.ones(8), torch.zeros(8), post_norm=True)

    x, y = torch.randn(2, 3, 5, 8)
    sizes = {0: torch.export.Dim("batch", min=1), 1: torch.export.Dim("length", min=1)}
    program = torch.export.export(Norm(), (x, y), dynamic_shapes=(sizes, sizes)).module()
    for shape in ((1, 1, 8), (4, 7, 8)):
        x, y = torch.randn(2, *shape)
        torch.testing.assert_close(program(x, y)[1], torch.nn.functional.layer_norm(x + y, (8,)))


@pytest.mark.plain_empty
def test_outputs_for_other_strides_are_those_that_a_compiler_is_told():
    x, ones = torch.randn(4, 8, 6).transpose(1, 2), torch.ones(8)
    with use_backend("torch"):
        torch.library.opcheck(OPS.add_layer_norm.default, (x, x, None, ones, ones, 1e-5, FP32, False))


def test_a_single_row_without_other_dimensions():
    x, y, weight, bias, y_bias = made = [torch.randn(8, dtype=torch.float64, requires_grad=True) for _ in range(5)]
    flat = add_layer_norm(x, y, weight, bias, y_bias=y_bias)
    rows = add_layer_norm(x[None], y[None], weight, bias, y_bias=y_bias)
    for a, b in zip(flat, rows, strict=True):
        wanted = torch.autograd.grad(b.square().sum(), made, retain_graph=True, allow_unused=True)
        found = torch.autograd.grad(a.square().sum(), made, retain_graph=True, allow_unused=True)
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)
