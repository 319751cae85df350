"""Table of all refusals: an input that leads to each, with the reason and the way out that it must name.

A refusal in the source that no row leads to fails, and so does a row that leads to no refusal of the source.
"""

import ast
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy
import pytest
import torch
import triton
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

timm = pytest.importorskip("timm")
transformers = pytest.importorskip("transformers")
pytest.importorskip("diffusers")

from diffusers.models.attention_processor import Attention, AttnProcessor, JointAttnProcessor2_0  # noqa: E402

import mvlm_kernels as ops  # noqa: E402
from mvlm_kernels import dispatch, use_backend  # noqa: E402
from mvlm_kernels.cross_attention import why_not_triton  # noqa: E402
from mvlm_kernels.integrations import blocks  # noqa: E402
from mvlm_kernels.integrations import diffusers as for_diffusers  # noqa: E402
from mvlm_kernels.integrations import timm as for_timm  # noqa: E402
from mvlm_kernels.integrations import transformers as for_transformers  # noqa: E402
from mvlm_kernels.integrations.calls import recorded_calls  # noqa: E402

pytestmark = pytest.mark.plain_empty
SOURCES = Path(ops.__file__).parent
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


@contextmanager
def gpu(capability: tuple[int, int] = (9, 0), interpreting: bool = False, hip: str | None = None) -> Iterator[None]:
    """Fake CUDA tensors, in a process that would have such a GPU."""
    with pytest.MonkeyPatch.context() as patch, FakeTensorMode():
        patch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
        patch.setattr(torch.version, "hip", hip)
        patch.setattr(dispatch, "interpreting", lambda: interpreting)
        patch.setattr(dispatch, "arch", lambda _: 10 * capability[0] + capability[1])
        dispatch.device_reasons.cache_clear()
        try:
            yield
        finally:
            dispatch.device_reasons.cache_clear()


def on_gpu(lead: Callable[[], Sequence[str]], **kind: Any) -> Sequence[str]:
    with gpu(**kind):
        return lead()


def norm(width: int = 8, **kind: Any) -> Sequence[str]:
    x, row = torch.empty(2, width, **kind), torch.empty(width, **kind)
    return ops.explain(ops.add_layer_norm, x, x, row, row).reasons


def gelu(**kind: Any) -> Sequence[str]:
    return ops.explain(ops.gelu_linear, torch.empty(2, 8, **kind), torch.empty(4, 8, **kind)).reasons


def gelu_in_transform() -> Sequence[str]:
    found: list[str] = []
    torch.func.grad(lambda x: x * len(found.extend(gelu()) or found))(torch.zeros(()))
    return found


def attention(queries: int = 9, keys: int = 5, width: int = 64, **kind: Any) -> Sequence[str]:
    q, k = (torch.empty(2, length, 2, width, **kind) for length in (queries, keys))
    return ops.explain(ops.cross_attention, q, k, k).reasons


def large_patches() -> Sequence[str]:
    return ops.explain(ops.gather_patches, torch.empty(1, 3, 128, 128), None, 128).reasons


def without_triton() -> Sequence[str]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("importlib.util.find_spec", lambda _: None)
        return on_gpu(partial(norm, device="cuda"))


def forced() -> Sequence[str]:
    with use_backend("torch"):
        return norm()


def old_triton() -> Sequence[str]:
    """Reasons in the error of a forced kernel."""
    with pytest.MonkeyPatch.context() as patch, use_backend("triton"):
        patch.setattr(triton, "__version__", "3.6.0")
        patch.setattr(numpy, "__version__", "2.4.6")
        dispatch.interpreter_reasons.cache_clear()
        try:
            with pytest.raises(RuntimeError) as error:
                ops.gather_patches(torch.zeros(1, 3, 4, 4), None, 2)
        finally:
            dispatch.interpreter_reasons.cache_clear()
    return [str(error.value).split("but: ")[1]]


def any_kernel(dtype: torch.dtype = torch.bfloat16, width: int = 64, rows: int = 9) -> Sequence[str]:
    return why_not_triton(torch.device("cuda"), dtype, head_width=width, short_rows=rows)


def high_precision() -> Sequence[str]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        return on_gpu(partial(attention, 197, 128, device="cuda"))
    finally:
        torch.set_float32_matmul_precision(before)


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


CUDA: Any = {"device": "cuda"}
DOUBLE: Any = {"device": "cuda", "dtype": torch.float64}
TABLE = {
    # every op
    "CPU": Row(norm, "the tensors are on the CPU", "kernels need a CUDA device"),
    "other device": Row(partial(norm, device="meta"), "the tensors are on meta", "move them to cuda"),
    "no Triton": Row(without_triton, "triton is not installed", "pip install triton"),
    "AMD": Row(partial(on_gpu, partial(norm, **CUDA), hip="7.0"), "for AMD", "torch runs"),
    "old GPU": Row(partial(on_gpu, partial(norm, **CUDA), capability=(7, 5)), "has 7.5", "use an A100 or a later GPU"),
    "interpreter": Row(
        partial(on_gpu, partial(norm, **CUDA), interpreting=True), "TRITON_INTERPRET=1 is set", "unset it for cuda"
    ),
    "versions": Row(old_triton, "triton 3.6.0 needs numpy<2.4, and numpy 2.4.6", "install triton>=3.7"),
    "forced": Row(forced, 'use_backend("torch") is in force', "leave its block"),
    # limits of ops
    "GELU in a transform": Row(gelu_in_transform, "torch.func and dual numbers have no kernel", "call it outside"),
    "float64 norm": Row(partial(on_gpu, partial(norm, **DOUBLE)), "float64 has no kernel", "pass float32"),
    "float64 GELU": Row(partial(on_gpu, partial(gelu, **DOUBLE)), "float64 has no kernel", "pass float32"),
    "float64 attention": Row(partial(on_gpu, partial(attention, **DOUBLE)), "float64 has no kernel", "pass float32"),
    "wide row": Row(partial(norm, 9000), "a row has 9000 values", "use rows of at most that width"),
    "large patch": Row(large_patches, "a patch of 3 x 128^2 pixels needs a tile of 65536", "use smaller patches"),
    "both sides long": Row(partial(attention, 200, 300), "(200 queries, 300 keys)", "SDPA runs, or the reference"),
    "float32 without TF32": Row(
        partial(on_gpu, partial(attention, **CUDA)), "TF32, which float32_matmul_precision", 'precision("high") allows'
    ),
    "no tile": Row(high_precision, "no tile of torch.float32 at width 64 and 128 rows", "16 bits, narrower heads"),
    # choices without tensors
    "head width": Row(partial(any_kernel, width=4), "heads are 4 wide", "choose another number of heads"),
    "dtype": Row(partial(any_kernel, torch.float8_e4m3fn), "float8_e4m3fn has no kernel", "pass float16, bfloat16"),
    "rows": Row(partial(any_kernel, rows=200), "the shorter side has 200 rows", "use scaled_dot_product_attention"),
    # blocks
    "block twice": Row(partial(twice, blocks.swap_blocks, vit()), "it is swapped already", "undo the earlier swap"),
    "float64 block": Row(
        lambda: on_gpu(lambda: blocks.kernel_reasons(torch.empty(2, **DOUBLE))), "float64 has no kernel", "pass float32"
    ),
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


def found(row: Row) -> str:
    (text,) = {text for text in row.lead() if text is not None and row.reason in text}
    return text


@pytest.mark.parametrize("name", TABLE)
def test_a_refusal_names_its_reason_and_a_way_out(name: str):
    reason, way_out = found(TABLE[name]).split("; ", 1)
    assert TABLE[name].reason in reason
    assert TABLE[name].way_out in way_out


def templates(text: str) -> list[re.Pattern[str]]:
    """Pattern of the text that each call of `refusal` in the source makes."""

    def pattern(node: ast.expr, names: dict[str, ast.expr]) -> str:
        if isinstance(node, ast.Constant):
            return re.escape(str(node.value))
        if isinstance(node, ast.JoinedStr):
            return "".join(".*" if isinstance(v, ast.FormattedValue) else pattern(v, names) for v in node.values)
        return pattern(names[node.id], {}) if isinstance(node, ast.Name) and node.id in names else ".*"

    found, names = [], {}
    nodes = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Assign | ast.Call)]
    for node in sorted(nodes, key=lambda node: (node.lineno, node.col_offset)):
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            names[node.targets[0].id] = node.value  # such as `reason = "..."` in the line before
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "refusal":
            reason, way_out = node.args
            found.append(re.compile(f"{pattern(reason, names)}; {pattern(way_out, names)}", re.DOTALL))
    return found


@pytest.mark.slow
def test_every_refusal_of_the_source_has_a_row():
    patterns = [p for file in sorted(SOURCES.rglob("*.py")) for p in templates(file.read_text())]
    assert len(patterns) > 40
    texts = [found(row) for row in TABLE.values()]
    assert [p.pattern for p in patterns if not any(p.fullmatch(text) for text in texts)] == []
    assert [text for text in texts if not any(p.fullmatch(text) for p in patterns)] == []


def test_refusals_are_found_in_a_source():
    made = templates(
        'def f(x):\n    reason = f"a row of {x}"\n    return (refusal(reason, "leave it"), refusal(x.y, "z"))'
    )
    assert [p.pattern for p in made] == [r"a\ row\ of\ .*;\ leave\ it".replace(";\\ ", "; "), ".*; z"]
    assert not made[0].fullmatch("a row of 3; do not leave it")


def test_an_explanation_names_the_device():
    with gpu():
        x, row = torch.empty(2, 8, device="cuda"), torch.empty(8, device="cuda")
        assert str(ops.explain(ops.add_layer_norm, x, None, row, row)).startswith("runs: triton on cuda")
    x, row = torch.empty(2, 8, device="meta"), torch.empty(8, device="meta")
    assert str(ops.explain(ops.add_layer_norm, x=x, y=None, weight=row, bias=row)).startswith("runs: torch on meta\n")
