"""gather_patches as an op: registration, compilation, errors, and the text of explain."""

import pytest
import torch

from mvlm_kernels import dispatch, explain, use_backend
from mvlm_kernels.aot_cases import CASES
from mvlm_kernels.dispatch import ON_CPU
from mvlm_kernels.gather_patches import gather_patches
from support.kernels.patches import MEAN, STD, make_ids, make_images

OP = torch.ops.mvlm_kernels.gather_patches.default


@pytest.mark.slow
@pytest.mark.plain_empty
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_gather_patches_passes_opcheck(backend):
    images = make_images((2, 3, 4, 6), torch.float32, "channels_last").requires_grad_()
    ids = make_ids(2, 3, 6)
    with use_backend(backend):
        torch.library.opcheck(OP, (images, ids, 2, torch.tensor(MEAN[:3]), torch.tensor(STD[:3]), torch.float32))
        torch.library.opcheck(OP, (images.detach(), None, 2, torch.rand(3), None, torch.bfloat16))


@pytest.mark.slow
@pytest.mark.plain_empty
def test_gather_patches_compiles_without_a_break_for_any_size():
    compiled = torch.compile(
        lambda x, i: gather_patches(x, i, 2, mean=MEAN[:3], std=STD[:3]),
        fullgraph=True,
        dynamic=True,
        backend="aot_eager",
    )
    for batch, rows, count in ((2, 2, 3), (3, 4, 5)):
        images = make_images((batch, 3, 2 * rows, 8), torch.float32, "contiguous").requires_grad_()
        ids = make_ids(batch, count, 4 * rows)
        with use_backend("triton"):
            got = compiled(images, ids)
            (grad,) = torch.autograd.grad(got.square().sum(), images)
            want = gather_patches(images, ids, 2, mean=MEAN[:3], std=STD[:3])
            (want_grad,) = torch.autograd.grad(want.square().sum(), images)
        assert torch.equal(got, want)
        assert torch.equal(grad, want_grad)


IMAGES = torch.zeros(2, 3, 4, 6)
IDS = torch.zeros(2, 1, dtype=torch.int64)


@pytest.mark.parametrize(
    "args, kwargs, message",
    [
        ((IMAGES[0], None, 2), {}, r"images must have shape \(B, C, H, W\), got \(3, 4, 6\)"),
        ((IMAGES.long(), None, 2), {}, "images must be uint8, .*, got torch.int64"),
        ((IMAGES, None, 4), {}, r"patch_size must divide .* \(4, 6\), got 4"),
        ((IMAGES, None, 0), {}, "patch_size must divide"),
        ((IMAGES, IDS[:1], 2), {}, r"patch_ids must have shape .*\(2, K\), got \(1, 1\)"),
        ((IMAGES, IDS.float(), 2), {}, "patch_ids must be int32 or int64, got torch.float32"),
        ((IMAGES, IDS - 1, 2), {}, r"patch_ids must be in \[0, 6\), got values in \[-1, -1\]"),
        ((IMAGES, IDS + 6, 2), {}, r"patch_ids must be in \[0, 6\), got values in \[6, 6\]"),
        ((IMAGES, IDS.to("meta"), 2), {}, "patch_ids must be on the device .* cpu, got meta"),
        ((IMAGES, None, 2), {"mean": (0.5,)}, "mean must have one value for each of 3 channels, got 1"),
        ((IMAGES, None, 2), {"std": (0.5, 0.0, 1.0)}, "std must be positive"),
        ((IMAGES, None, 2), {"mean": torch.zeros(2)}, r"mean must be floating .* 3 channels, got torch.float32 of"),
        ((IMAGES, None, 2), {"dtype": torch.int32}, "dtype must be .*, got torch.int32"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_bad_input_of_gather_patches_says_what_was_wanted(backend, args, kwargs, message):
    with use_backend(backend), pytest.raises(ValueError, match=message):
        gather_patches(*args, **kwargs)


def test_explain_names_reasons_of_gather_patches():
    assert explain(gather_patches, IMAGES, None, 2).reasons == (ON_CPU,)
    reasons = explain(gather_patches, torch.zeros(1, 3, 256, 256), None, 256).reasons
    limit = "a patch of 3 x 256^2 pixels needs a tile of 262144 values, the kernels take 32768"
    assert reasons[1] == f"{limit}; torch runs; use smaller patches"


def test_launchers_of_gather_patches_read_no_tensor():
    launched = []
    with dispatch.recording(lambda kernel, *_: launched.append(kernel.__name__), 90):
        for _, launch in CASES["gather_patches"]():
            launch()  # meta tensors: reading one on the host would raise
    assert {"gather_kernel", "gather_backward_kernel", "reader_lists_kernel"} <= set(launched)
