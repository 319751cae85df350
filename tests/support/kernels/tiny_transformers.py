"""Tiny models of every class that transformers exports, and inputs for them, by rule."""

import importlib
import inspect
import pkgutil
import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

BATCH, LENGTH = 2, 12


def _each(value: float, names: str) -> dict[str, float]:
    """Dict that has one value under each of several names. names: with blanks between."""
    return dict.fromkeys(names.split(), value)


_SIZES: dict[str, Any] = {
    **_each(
        64,
        "hidden_size d_model n_embd embed_dim dim encoder_hidden_size embedding_size width hidden_dim projection_dim "
        "max_position_embeddings max_source_positions max_target_positions n_positions n_ctx moe_intermediate_size "
        "shared_expert_intermediate_size",
    ),
    **_each(
        2,
        "num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers num_encoder_layers "
        "num_decoder_layers depth num_decode_layers encoder_num_hidden_layers num_attention_heads n_head n_heads "
        "encoder_attention_heads decoder_attention_heads num_heads num_key_value_heads n_kv_heads "
        "encoder_num_attention_heads num_experts_per_tok tubelet_size num_feat_extract_layers "
        "num_conv_pos_embedding_groups",
    ),
    **_each(32, "head_dim attention_head_dim d_kv kv_channels kv_lora_rank v_head_dim image_size"),
    **_each(
        128, "intermediate_size ffn_dim encoder_ffn_dim decoder_ffn_dim d_ff mlp_dim n_inner ffn_hidden_size vocab_size"
    ),
    **_each(4, "num_experts num_local_experts n_routed_experts moe_num_experts num_frames sep_token_id"),
    **_each(16, "num_mel_bins q_lora_rank qk_rope_head_dim qk_nope_head_dim"),
    **_each(3, "num_channels in_channels in_chans cls_token_id"),
    **_each(120, "image_token_index image_token_id"),
    **_each(121, "video_token_id video_token_index"),
    **_each(122, "audio_token_id audio_token_index"),
    **_each(1, "n_group topk_group bos_token_id decoder_start_token_id"),
    **_each(0.0, "layerdrop encoder_layerdrop decoder_layerdrop drop_path_rate mask_time_prob"),
    "patch_size": 8,
    "num_conv_pos_embeddings": 8,
    "pad_token_id": 0,
    "eos_token_id": 2,
    "vision_start_token_id": 123,
    "vision_end_token_id": 124,
    "boi_token_id": 125,
    "eoi_token_id": 126,
    "use_pretrained_backbone": False,
    "apply_spec_augment": False,
    "conv_dim": (16, 16),
    "conv_stride": (5, 2),
    "conv_kernel": (10, 3),
    "index_topk": 4,  # sparse attention that leaves keys out
}
_SIMPLE = {"hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size", "d_model"}
_BOTH_MODALITIES = re.compile(
    "CLIP|AltCLIP|Siglip|Blip|Flava|Vilt|Bridge|ChineseCLIP|XCLIP|GroupVit|Owl|Align|MetaClip|Aimv2Model|Git|CLIPSeg|"
    "LayoutLMv3|Lxmert|Kosmos2|Tvp|GroundingDino|MMGround|InstructBlip"
)


def exported_classes(architectures: Collection[str] | None = None) -> Iterator[type]:
    """Every class of transformers whose name ends in Model or Encoder and that a modelling file exports, sorted.

    architectures: folders of ``transformers.models`` to look into; None: all.
    """
    import transformers.models

    for info in pkgutil.iter_modules(transformers.models.__path__):
        if architectures is not None and info.name not in architectures:
            continue
        folder = Path(transformers.models.__path__[0]) / info.name
        for file in sorted(folder.glob("modeling_*.py")):
            exported = re.search(r"__all__ = \[(.*?)\]", file.read_text(), re.DOTALL)
            for name in dict.fromkeys(re.findall(r'"(\w+)"', exported.group(1))) if exported else []:
                if re.search(r"(Model|Encoder)$", name) and not name.endswith("PreTrainedModel"):
                    try:
                        module = importlib.import_module(f"transformers.models.{info.name}.{file.stem}")
                    except ImportError:  # a library that is not here
                        break
                    yield getattr(module, name)


def tiny_config(config_class: Any, depth: int = 0) -> Any:
    """A configuration with two layers and a width of 64 wherever its arguments have these names."""
    from transformers import PreTrainedConfig

    accepted = inspect.signature(config_class.__init__).parameters
    chosen = {name: value for name, value in _SIZES.items() if name in accepted}
    parts = dict(getattr(config_class, "sub_configs", {}) or {}) if depth < 3 else {}
    try:
        default = config_class() if parts else None
    except Exception:
        default = None
    for name, part in parts.items():
        own = getattr(default, name, None)
        kind = type(own) if own is not None else part
        if isinstance(kind, type) and issubclass(kind, PreTrainedConfig) and kind.__name__ not in (
            "AutoConfig", "PreTrainedConfig",
        ):  # fmt: skip
            try:
                chosen[name] = tiny_config(kind, depth + 1).to_dict()
            except Exception:
                continue
    attempts = (
        set(),
        {"pad_token_id", "bos_token_id", "eos_token_id"},
        {name for name in chosen if name.endswith(("_id", "_index"))},
        set(chosen) - _SIMPLE,
    )
    last: Exception = ValueError("no attempt")
    for left_out in attempts:
        try:
            return config_class(**{name: value for name, value in chosen.items() if name not in left_out})
        except Exception as error:
            last = error
    raise last


def sharpen(model: Any) -> None:
    """Multiply projections of queries and keys by 6, so that attention is not uniform. Fill what is not finite."""
    for name, p in model.named_parameters():
        if not torch.isfinite(p).all():
            p.data.normal_(0, 0.02)
        elif p.dim() > 1 and re.search(r"query|q_proj|key|k_proj|qkv|\.q\.|\.k\.", name):
            p.data.mul_(6)


def inputs_for(model: Any, *, padded: bool, batch: int = BATCH) -> list[dict[str, Any]]:
    """Candidates of keyword arguments, the likeliest first. padded: the last sample ends early, by a mask."""
    g = torch.Generator().manual_seed(5)
    accepted = inspect.signature(model.forward).parameters
    config = model.config
    parts = [config] + [getattr(config, name, None) for name in getattr(config, "sub_configs", None) or {}]
    sides = [x.image_size for x in parts if getattr(x, "image_size", None)]
    side = next((s if isinstance(s, int) else s[0] for s in sides if isinstance(s, int | tuple | list)), 32)
    channels = next((x.num_channels for x in parts if isinstance(getattr(x, "num_channels", None), int)), 3)

    def padding(length: int, kept: int) -> Tensor:
        mask = torch.ones(batch, length, dtype=torch.long)
        mask[-1, kept:] = 0
        return mask

    text: dict[str, Any] = {}
    ids = torch.randint(5, 100, (batch, LENGTH), generator=g)
    if "input_ids" in accepted:
        text["input_ids"] = ids
    elif "inputs_embeds" in accepted and "pixel_values" not in accepted:
        text["inputs_embeds"] = torch.randn(batch, LENGTH, getattr(config, "hidden_size", 64), generator=g)
    if padded and text and "attention_mask" in accepted:
        text["attention_mask"] = padding(LENGTH, LENGTH // 2)
    if "decoder_input_ids" in accepted:
        text["decoder_input_ids"] = ids[:, :7]
    if "bbox" in accepted:
        text["bbox"] = torch.randint(0, 50, (batch, LENGTH, 4), generator=g).sort(-1).values
    if "visual_feats" in accepted:
        text |= {
            "visual_feats": torch.randn(batch, 4, 2048, generator=g),
            "visual_pos": torch.rand(batch, 4, 4, generator=g),
        }
    found: list[dict[str, Any]] = []
    asks_pixels = "pixel_values" in accepted and (
        accepted["pixel_values"].default is inspect.Parameter.empty
        or "input_ids" not in accepted
        or _BOTH_MODALITIES.match(type(model).__name__) is not None
    )
    if asks_pixels:
        image = {"pixel_values": torch.randn(batch, channels, side, side, generator=g)}
        if "pixel_attention_mask" in accepted:
            shapes = [[4, 4]] * (batch - 1) + [[4, 3] if padded else [4, 4]]
            found.append({
                **text,
                "pixel_values": torch.randn(batch, 16, 192, generator=g),
                "pixel_attention_mask": padding(16, 12 if padded else 16),
                "spatial_shapes": torch.tensor(shapes),
            })  # fmt: skip
        if "pixel_mask" in accepted:
            mask = torch.ones(batch, side, side, dtype=torch.long)
            mask[-1, :, side // 2 if padded else side :] = 0
            found.append({**text, **image, "pixel_mask": mask})
        found.append({**text, **image})
        found.append({name: x for name, x in text.items() if name != "attention_mask"} | image)
        found.append({**text, "pixel_values": torch.randn(batch, 4, channels, side, side, generator=g)})
    if "pixel_values_videos" in accepted and "input_ids" not in accepted:
        found.append({**text, "pixel_values_videos": torch.randn(batch, 4, channels, side, side, generator=g)})
    if "input_values" in accepted:
        wave = {"input_values": torch.randn(batch, 1600, generator=g)}
        found.append({**text, **wave, **({"attention_mask": padding(1600, 900)} if padded else {})})
        found.append({**text, **wave})
        found.append({"input_values": torch.randn(batch, 1024, 128, generator=g)})
        found.append({"input_values": torch.randn(batch, 1, 1600, generator=g)})
    if "input_features" in accepted:
        names = ("num_mel_bins", "feature_size", "feature_projection_input_dim")
        mel = next((getattr(config, name) for name in names if getattr(config, name, None)), 80)
        extra = {"attention_mask": padding(128, 64)} if padded else {}
        for shape in ((batch, mel, 128), (batch, 128, mel)):
            found.append({**text, "input_features": torch.randn(shape, generator=g), **extra})
        found.append({**text, "input_features": torch.randn(batch, mel, 128, generator=g)})
    if "query_embeds" in accepted:
        width = getattr(config, "encoder_hidden_size", 64)
        found.append({
            "query_embeds": torch.randn(batch, 5, 64, generator=g),
            "encoder_hidden_states": torch.randn(batch, 9, width, generator=g),
            **({"encoder_attention_mask": padding(9, 5)} if padded else {}),
        })  # fmt: skip
    if "input_ids" in accepted and "pixel_values" not in accepted:
        found.append(text)
    if "encoder_hidden_states" in accepted:
        states = torch.randn(batch, 9, 64, generator=g)
        found.append({**text, "encoder_hidden_states": states, "encoder_attention_mask": padding(9, 5)})
    if "inputs" in accepted:
        extra = {"attention_mask": padding(LENGTH, LENGTH // 2)} if padded else {}
        found.append({"inputs": torch.randint(5, 100, (batch, LENGTH), generator=g), **extra})
    found.append(text)
    return [x for x in found if x]
