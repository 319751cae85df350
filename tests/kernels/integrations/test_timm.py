"""Swapped patch embeddings of timm models: features, gradients, what is honoured after a swap, and refusals."""

import copy
import pickle
import warnings
from typing import Any

import pytest
import torch
from torch import nn

timm = pytest.importorskip("timm")

from mvlm_kernels.integrations.timm import GatherPatchEmbed, swap, swap_patch_embed  # noqa: E402

MEAN, STD = timm.data.IMAGENET_DEFAULT_MEAN, timm.data.IMAGENET_DEFAULT_STD


def small_vit(**options: Any) -> Any:
    torch.manual_seed(0)
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2, "num_classes": 0}
    return timm.models.VisionTransformer(**(sizes | options)).eval()


def swapped_vit(**options: Any) -> Any:
    return swap_patch_embed(small_vit(**options))


def normalised(images: torch.Tensor) -> torch.Tensor:
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    return (images / 255 - mean) / std


def test_swapped_patch_embed_gives_the_same_features():
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    model = small_vit()
    wanted, tokens, names = model(normalised(images)), model.patch_embed(normalised(images)), set(model.state_dict())
    report = swap(model, mean=MEAN, std=torch.tensor(STD))
    assert str(report) == "swapped: patch_embed (PatchEmbed)"
    assert set(model.state_dict()) == names
    torch.testing.assert_close(model(images), wanted)
    ids = torch.tensor([[3, 0, 15], [7, 8, 1]])
    chosen = tokens.gather(1, ids[:, :, None].expand(-1, -1, 24))
    torch.testing.assert_close(model.patch_embed(images, ids), chosen)
    assert report.undo() == report.swapped
    assert type(model.patch_embed) is timm.layers.PatchEmbed
    torch.testing.assert_close(model(normalised(images)), wanted)


def test_embeddings_of_features_are_kept_where_channels_have_values():
    """As in Visformer, whose stem reads the image and whose embeddings read features."""
    torch.manual_seed(0)
    model = nn.Sequential(
        timm.layers.PatchEmbed(32, 4, embed_dim=16, flatten=False), timm.layers.PatchEmbed(8, 2, 16, 24)
    )
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    wanted = model(normalised(images))
    report = swap(model, mean=MEAN, std=STD)
    assert [part.path for part in report.swapped] == ["0"]
    assert [part.path for part in report.kept] == ["1"]
    assert "proj reads 16 channels, and mean or std has 3 values" in str(report)
    torch.testing.assert_close(model(images), wanted)
    report.undo()
    assert len(swap(model).swapped) == 2


@pytest.mark.parametrize("output_format", ["NHWC", "NCHW", "NLC", "NCL"])
def test_every_output_format_and_a_dynamic_size_are_served(output_format: str):
    torch.manual_seed(0)
    embed = timm.layers.PatchEmbed(32, 8, embed_dim=24, output_fmt=output_format, strict_img_size=False)
    images = torch.rand(2, 3, 40, 24)
    wanted = embed(images)
    assert swap(embed).swapped
    torch.testing.assert_close(embed(images), wanted)


@pytest.mark.parametrize("options", [{"dynamic_img_pad": True}, {"img_size": None}])
def test_images_that_do_not_divide_are_padded_or_cut_as_before(options: dict[str, Any]):
    torch.manual_seed(0)
    given: dict[str, Any] = {"img_size": 32, "strict_img_size": False} | options
    embed = timm.layers.PatchEmbed(patch_size=8, embed_dim=24, **given)
    images = torch.randint(0, 256, (2, 3, 37, 35), dtype=torch.uint8)
    wanted = embed(normalised(images))
    swap(embed, mean=MEAN, std=STD)
    torch.testing.assert_close(embed(images), wanted)
    assert "padded or cut" in embed.why_not_gathered(images)


def test_copies_and_meta_device():
    model, images = swapped_vit(), torch.rand(2, 3, 32, 32)
    assert not model.patch_embed.training
    wanted = model(images)
    torch.testing.assert_close(copy.deepcopy(model)(images), wanted)
    torch.testing.assert_close(pickle.loads(pickle.dumps(model))(images), wanted)
    called = torch.func.functional_call(model, dict(model.named_parameters()), (images,))
    torch.testing.assert_close(called, wanted)
    with torch.autocast("cpu", torch.bfloat16):
        assert copy.deepcopy(model).to("meta")(images.to("meta")).shape == wanted.shape


class Stem(timm.layers.PatchEmbed):
    """An embedding with a forward of its own."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x * 2)


def test_embeddings_that_cannot_be_swapped_are_kept_with_a_reason():
    model = nn.ModuleDict({"patch_embed": nn.Linear(1, 1), "stem": Stem(32, 8), "plain": timm.layers.PatchEmbed(32, 8)})
    model["tall"] = timm.layers.PatchEmbed((32, 32), (8, 4))
    report = swap(model)
    assert [part.path for part in report.swapped] == ["plain"]
    reasons = {part.path: part.reason or "" for part in report.kept}
    assert "must be a timm.layers.PatchEmbed itself, got torch.nn.modules.linear.Linear" in reasons["patch_embed"]
    assert "Stem, whose forward may differ" in reasons["stem"]
    assert "square conv of disjoint patches" in reasons["tall"]
    assert "swapped already" in str(swap(model))


def test_floats_that_were_normalised_before_are_warned_of_once():
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    model = swap_patch_embed(small_vit(), mean=MEAN, std=STD)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(images)
        model(images / 255)
        swapped_vit()(normalised(images))  # which normalises nothing
        embed: Any = model.patch_embed
        torch.func.vmap(embed)(normalised(images)[None])  # whose values cannot be read
    with pytest.warns(UserWarning, match="the model normalises them itself"):
        model(normalised(images))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(normalised(images))


def test_pixels_that_nobody_normalises_are_warned_of_once():
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    model = swapped_vit()
    with pytest.warns(UserWarning, match="mean and std"):
        model(images)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(images)
        swap_patch_embed(small_vit(), mean=MEAN, std=STD)(images)


def test_refusals():
    for values in ({"mean": (123.7, 116.3, 103.5)}, {"std": (58.4, 57.1, 57.4)}):
        with pytest.raises(ValueError, match=f"{next(iter(values))} must be that of pixels in 0..1"):
            swap(small_vit(), **values)
    with pytest.raises(ValueError, match="std must have one value for each channel"):
        swap(small_vit(), mean=MEAN, std=0)  # pyright: ignore[reportArgumentType]
    assert "integrations.transformers" in str(swap(nn.Linear(1, 1)))
    with pytest.raises(ValueError, match="model must have a patch_embed, got Linear"):
        swap_patch_embed(nn.Linear(1, 1))
    with pytest.raises(ValueError, match="cannot be swapped: it is swapped already"):
        swap_patch_embed(swapped_vit())
    with pytest.raises(ValueError, match="proj reads 3 channels, and mean or std has 1 values"):
        swap_patch_embed(small_vit(), mean=MEAN, std=(0.5,))
    with pytest.raises(ValueError, match=r"images must be \(32, 32\) pixels, got \(16, 16\)"):
        swapped_vit()(torch.rand(1, 3, 16, 16))
    with pytest.raises(ValueError, match=r"images must have shape \(B, 3, H, W\), got \(1, 4, 32, 32\)"):
        swapped_vit()(torch.rand(1, 4, 32, 32))
    assert isinstance(swapped_vit().patch_embed, GatherPatchEmbed)


def test_a_forward_of_the_convs_own_is_called():
    """Offloading and patches replace `forward` on the instance."""
    model = small_vit()
    embed = model.patch_embed
    own = embed.proj.forward
    embed.proj.forward = lambda x: 2 * own(x)
    images = torch.randn(2, 3, 32, 32)
    wanted = embed(images)
    with pytest.raises(ValueError, match="proj has hooks"):
        swap_patch_embed(model)
    assert torch.equal(embed(images), wanted)


def test_an_embedding_with_a_forward_of_its_own_is_kept():
    """accelerate's hooks replace `forward` on the instance, which would hide that of the swap."""
    model = small_vit()
    images = torch.randn(2, 3, 32, 32)
    wanted = model(images)
    model.patch_embed.forward = model.patch_embed.forward
    (part,) = swap(model, mean=MEAN, std=STD).kept
    assert "it has a forward of its own" in (part.reason or "")
    assert torch.equal(model(images), wanted)
    del model.patch_embed.forward
    assert swap(model, mean=MEAN, std=STD).swapped
