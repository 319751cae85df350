"""Cases of ``gather_patches``: values and gradients against loops in float64."""

from functools import partial

import torch

from emulator.cases import Cases
from mvlm_kernels import gather_patches
from support.kernels.patches import LAYOUTS, MEAN, STD, check_gather, make_ids, make_images, patches_oracle
from triton_proof.allocations import guarded
from triton_proof.driver import changed

FAST = {"bf16/channels_last/p7", "bad-ids"}
PIXELS = {"uint8": torch.uint8, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def of_layout(pixels: torch.dtype, layout: str, patch: int) -> None:
    images = make_images((2, 3, 2 * patch, 3 * patch), pixels, layout)
    check_gather(images, make_ids(2, 9 if patch == 7 else 4, 6, torch.int32), patch, MEAN[:3], STD[:3])


def every_patch(pixels: torch.dtype, patch: int) -> None:
    check_gather(make_images((2, 3, 2 * patch, 3 * patch), pixels, "contiguous"), None, patch)


def at_224_pixels(pixels: torch.dtype) -> None:
    out = torch.bfloat16 if pixels == torch.uint8 else None
    images = make_images((2, 3, 224, 224), pixels, "contiguous")
    check_gather(images, make_ids(2, 116, 196, torch.int32), 16, MEAN[:3], STD[:3], out)


def large_patches() -> None:
    images = make_images((1, 3, 64, 128), torch.bfloat16, "contiguous")
    check_gather(images, make_ids(1, 3, 2, torch.int32), 64, MEAN[:3], STD[:3])


def bad_ids() -> None:
    """An id outside the image reads nothing, gives NaN, and gets no gradient."""
    images = guarded(make_images((1, 2, 4, 4), torch.float32, "contiguous")).requires_grad_()
    out = gather_patches(images, torch.tensor([[1, -1, 4, 2**31 - 1, 3]]), 2)
    assert out[0, 1:4].isnan().all()
    torch.testing.assert_close(out[:, [0, 4]], gather_patches(images, torch.tensor([[1, 3]]), 2))
    (grad,) = torch.autograd.grad(out, images, torch.ones_like(out))
    assert grad[0, :, :2, :2].eq(0).all()
    assert grad[0, :, 2:, 2:].eq(1).all()


def far_apart(stride: tuple[int, ...]) -> None:
    """Pixels more than 2^31 elements apart."""
    size = (2, 3, 2, 2)
    # Pages that nobody touches cost address space and no memory. Race checks would double it.
    with changed(checks=False):
        storage = torch.empty(1 + sum((n - 1) * s for n, s in zip(size, stride, strict=True)), dtype=torch.uint8)
        images = storage.as_strided(size, stride)
        images.copy_(make_images(size, torch.uint8, "contiguous"))
        out = gather_patches(images, None, 1)
    torch.testing.assert_close(out.double().numpy(), patches_oracle(images, None, 1, None, None), rtol=1e-6, atol=0)


def cases() -> Cases:
    for name, pixels in PIXELS.items():
        for layout in LAYOUTS:
            for patch in (7, 16):
                yield f"{name}/{layout}/p{patch}", partial(of_layout, pixels, layout, patch)
        for patch in (1, 14, 32):
            yield f"{name}/every-patch/p{patch}", partial(every_patch, pixels, patch)
        yield f"{name}/224px", partial(at_224_pixels, pixels)
    yield "p64", large_patches
    yield "bad-ids", bad_ids
    for stride in ((2**31 + 64, 4, 2, 1), (16, 2**30 + 8, 2, 1), (16, 8, 2**31 + 8, 1)):
        yield f"far-apart/{stride}", partial(far_apart, stride)
