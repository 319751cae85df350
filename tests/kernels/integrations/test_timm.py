"""Swapped patch embeddings of timm models: features, gradients, and refusals."""

import pytest
import torch
from torch import nn

from mvlm_kernels.integrations.timm import GatherPatchEmbed, swap_patch_embed

timm = pytest.importorskip("timm")


def small_vit(**options):
    torch.manual_seed(0)
    return timm.models.VisionTransformer(
        img_size=32, patch_size=8, embed_dim=24, depth=1, num_heads=2, num_classes=0, **options
    ).eval()


def test_swapped_patch_embed_gives_the_same_features():
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    mean, std = torch.tensor(timm.data.IMAGENET_DEFAULT_MEAN), torch.tensor(timm.data.IMAGENET_DEFAULT_STD)
    normalised = (images / 255 - mean[:, None, None]) / std[:, None, None]
    model = small_vit()
    wanted, tokens, names = model(normalised), model.patch_embed(normalised), set(model.state_dict())
    swap_patch_embed(model, mean=mean.tolist(), std=std.tolist())
    assert set(model.state_dict()) == names
    torch.testing.assert_close(model(images), wanted)
    ids = torch.tensor([[3, 0, 15], [7, 8, 1]])
    chosen = tokens.gather(1, ids[:, :, None].expand(-1, -1, 24))
    torch.testing.assert_close(model.patch_embed(images, ids), chosen)


def test_gradients_of_swapped_patch_embed_reach_the_conv_weight():
    model = small_vit()
    images = torch.rand(2, 3, 32, 32)
    weight = model.patch_embed.proj.weight
    (wanted,) = torch.autograd.grad(model(images).square().sum(), weight)
    (got,) = torch.autograd.grad(swap_patch_embed(model)(images).square().sum(), weight)
    torch.testing.assert_close(got, wanted)


def test_patch_embeds_that_cannot_be_swapped_are_refused():
    with pytest.raises(ValueError, match="model must have a patch_embed, got Linear"):
        swap_patch_embed(nn.Linear(1, 1))
    with pytest.raises(ValueError, match="must be a timm PatchEmbed"):
        GatherPatchEmbed(nn.Linear(1, 1))
    overlapping = nn.Module()
    overlapping.proj = nn.Conv2d(3, 8, 4, stride=2)
    with pytest.raises(ValueError, match="must be a square conv of disjoint patches"):
        GatherPatchEmbed(overlapping)
    with pytest.raises(ValueError, match=r"images must be \(32, 32\) pixels, got \(16, 16\)"):
        swap_patch_embed(small_vit())(torch.rand(1, 3, 16, 16))
