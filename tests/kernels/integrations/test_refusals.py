"""What the swaps leave alone in other libraries' models, as a table: an input, the reason, the way out."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

timm = pytest.importorskip("timm")
transformers = pytest.importorskip("transformers")
pytest.importorskip("diffusers")

from diffusers.models.attention_processor import Attention, AttnProcessor, JointAttnProcessor2_0  # noqa: E402

from mvlm_kernels import use_backend  # noqa: E402
from mvlm_kernels.integrations import blocks  # noqa: E402
from mvlm_kernels.integrations import diffusers as for_diffusers  # noqa: E402
from mvlm_kernels.integrations import timm as for_timm  # noqa: E402
from mvlm_kernels.integrations import transformers as for_transformers  # noqa: E402
from mvlm_kernels.integrations.calls import recorded_calls  # noqa: E402

pytestmark = pytest.mark.plain_empty
VIT: Any = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 1, "num_heads": 2, "num_classes": 5}
TEXT: Any = {
    "vocab_size": 99,
    "hidden_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 64,
}


class Row(NamedTuple):
    """lead: gives reasons, among them one with the texts `reason` and `way_out` before and after its "; "."""

    lead: Callable[[], Sequence[str | None]]
    reason: str
    way_out: str


def vit(**options: Any) -> Any:
    return timm.models.VisionTransformer(**(VIT | options))


def kept_blocks(change: Callable[[Any], object] | None = None, **options: Any) -> Sequence[str | None]:
    model = vit(**options)
    if change is not None:
        change(model.blocks[0])
    return [part.reason for part in blocks.swap_blocks(model).kept]


def fast_norm() -> Sequence[str | None]:
    timm.layers.set_fast_norm(True)
    try:
        return kept_blocks(norm_layer=timm.layers.LayerNorm)
    finally:
        timm.layers.set_fast_norm(False)


def wide_norm() -> Sequence[str | None]:
    with torch.device("meta"):
        block = timm.models.vision_transformer.Block(8200, 2)
    return [part.reason for part in blocks.swap_blocks(block).kept]


def hooked(layer: nn.Module) -> object:
    return layer.register_forward_hook(lambda *_: None)


def kept_embeddings(change: Callable[[Any], object] | None = None) -> Sequence[str | None]:
    embed = timm.layers.PatchEmbed(32, 8, embed_dim=24)
    if change is not None:
        change(embed)
    return [part.reason for part in for_timm.swap(embed).kept]


def wrapped(embed: Any) -> None:
    embed.proj = nn.Sequential(embed.proj)


def padded_images() -> Sequence[str | None]:
    embed: Any = timm.layers.PatchEmbed(32, 8, embed_dim=24, strict_img_size=False, dynamic_img_pad=True)
    for_timm.swap(embed)
    return [embed.why_not_gathered(torch.rand(1, 3, 37, 35))]


def layer(**options: Any) -> Any:
    return Attention(query_dim=64, cross_attention_dim=48, heads=2, dim_head=32, **options)


def kept_layers(module: nn.Module) -> Sequence[str | None]:
    return [part.reason for part in for_diffusers.swap(module).kept]


def denoiser_call(mask: Tensor | None = None, **further: Any) -> Sequence[str]:
    module = layer()
    for_diffusers.swap(module)
    with use_backend("torch"), recorded_calls() as calls:
        module.processor(module, torch.randn(2, 9, 64), torch.randn(2, 5, 48), mask, **further)
    return calls[0].reasons


def twice(swap: Callable[[nn.Module], Any], model: nn.Module) -> Sequence[str | None]:
    swap(model)
    return [part.reason for part in swap(model).kept]


def text_call(**changes: Any) -> Sequence[str]:
    q, k, v = torch.randn(3, 2, 2, 5, 32)
    given: dict[str, Any] = {"query": q, "key": k, "value": v, "attention_mask": None, "is_causal": False}
    with use_backend("torch"):
        return for_transformers.why_not_fused(nn.Module(), **(given | changes))


def kept_text(model: nn.Module) -> Sequence[str | None]:
    return [part.reason for part in for_transformers.swap(model).kept]


def mpnet() -> Any:
    return transformers.MPNetModel(transformers.MPNetConfig(**TEXT))


def splinter() -> Any:
    return transformers.SplinterModel(transformers.SplinterConfig(**TEXT))


def gemma() -> Any:
    return transformers.Gemma4TextModel(
        transformers.Gemma4TextConfig(**TEXT, vocab_size_per_layer_input=99, head_dim=32)
    )


TABLE = {
    # blocks
    "block twice": Row(partial(twice, blocks.swap_blocks, vit()), "it is swapped already", "undo the earlier swap"),
    "other activation": Row(
        partial(kept_blocks, act_layer=nn.SiLU), "wanted GELU, got SiLU", "unwrap it if it is a wrapped GELU"
    ),
    "hooked norm": Row(
        partial(kept_blocks, lambda block: hooked(block.norm2)), "its LayerNorm has hooks", "forward calls them"
    ),
    "norm without weight": Row(
        partial(kept_blocks, norm_layer=lambda width, **_: nn.LayerNorm(width, elementwise_affine=False)),
        "the norm must have weight and bias",
        "give the norm both",
    ),
    "wide norm": Row(wide_norm, "a row of the norm has 8200 values", "use rows of at most that width"),
    "fast norm": Row(fast_norm, "timm's fast norm is on", "timm.layers.set_fast_norm(False)"),
    "tanh": Row(
        partial(kept_blocks, act_layer=lambda: nn.GELU("tanh")), "the module its tanh approximation", "use nn.GELU()"
    ),
    # timm
    "embedding twice": Row(partial(twice, for_timm.swap, vit()), "it is swapped already", "undo the earlier swap"),
    "wrapped conv": Row(partial(kept_embeddings, wrapped), "a Conv2d, got Sequential", "merge its adapter"),
    "hooked conv": Row(partial(kept_embeddings, lambda embed: hooked(embed.proj)), "proj has hooks", "calls them"),
    "embedding's own forward": Row(
        lambda: kept_embeddings(lambda embed: setattr(embed, "forward", embed.forward)),
        "it has a forward of its own",
        "remove it, swap, put it on again",
    ),
    "oblong patches": Row(
        lambda: kept_embeddings(lambda embed: setattr(embed, "proj", nn.Conv2d(3, 24, (8, 4), (8, 4)))),
        "proj must be a square conv of disjoint patches",
        "use another patch embedding",
    ),
    "embedding of features": Row(
        lambda: [p.reason for p in for_timm.swap(timm.layers.PatchEmbed(32, 8, 16, 24), mean=(0.5,) * 3).kept],
        "proj reads 16 channels, and mean or std has 3 values",
        "one value for each channel of the images",
    ),
    "other embedding": Row(
        lambda: [p.reason for p in for_timm.swap(nn.ModuleDict({"patch_embed": nn.Linear(1, 1)})).kept],
        "it must be a timm.layers.PatchEmbed itself, got torch.nn.modules.linear.Linear",
        "call gather_patches in its forward",
    ),
    "padded images": Row(padded_images, "images of (37, 35) pixels are padded or cut", "give images of whole patches"),
    # diffusers
    "layer twice": Row(partial(twice, for_diffusers.swap, layer()), "it is swapped already", "undo the earlier swap"),
    "processor": Row(
        lambda: kept_layers(layer(processor=AttnProcessor())), "got AttnProcessor", "set_processor(AttnProcessor2_0())"
    ),
    "processor of a model": Row(
        lambda: kept_layers(layer(processor=JointAttnProcessor2_0())), "got JointAttnProcessor2_0", "leave it: an Attn"
    ),
    "grouped heads": Row(lambda: kept_layers(layer(kv_heads=1)), "heads are grouped", "diffusers' processor runs"),
    "further argument": Row(
        partial(denoiser_call, beside=1.0), "there are further arguments: beside", "computes them; leave them out"
    ),
    "mask of queries": Row(
        lambda: denoiser_call(torch.rand(4, 9, 5)), "is not one row of 5 keys", "pass a mask of shape (2, 5)"
    ),
    "floating mask": Row(lambda: denoiser_call(torch.zeros(2, 1, 5)), "the mask is floating", "padding_masks=True"),
    # transformers
    "position bias": Row(partial(text_call, position_bias=torch.zeros(1)), "there is a position_bias", "SDPA adds it"),
    "window": Row(partial(text_call, sliding_window=3), "there is a sliding_window", "SDPA runs with its mask"),
    "probabilities": Row(partial(text_call, output_attentions=True), "output_attentions is set", "returns them"),
    "causal": Row(partial(text_call, is_causal=True), "the module is causal", "SDPA runs"),
    "mask of scores": Row(
        partial(text_call, attention_mask=torch.zeros(2, 1, 5, 5)), "not plain key padding", "the tokenizer's mask"
    ),
    "batches": Row(partial(text_call, query=torch.zeros(1, 2, 5, 32)), "have batches and lengths", "SDPA broadcasts"),
    "values": Row(
        partial(text_call, value=torch.zeros(2, 2, 5, 16)), "head widths differ: 32, 32 and 16", "the width of keys"
    ),
    "no interface": Row(lambda: kept_text(mpnet()), "MPNetModel does not call", "call cross_attention in it"),
    "sdpa by name": Row(lambda: kept_text(gemma()), 'asks for "sdpa" by name', "its own attention runs"),
    "refused there": Row(lambda: kept_text(splinter()), "SplinterModel does not support", "its own attention runs"),
}  # fmt: skip


@pytest.mark.parametrize("name", TABLE)
def test_a_refusal_names_its_reason_and_a_way_out(name: str):
    row = TABLE[name]
    (text,) = {text for text in row.lead() if text is not None and row.reason in text}
    reason, way_out = text.split("; ", 1)
    assert row.reason in reason
    assert row.way_out in way_out
