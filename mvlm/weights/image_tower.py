"""Weights of image towers: timm's names, open_clip's, those of transformers' CLIP and SigLIP, and timm's downloads.

timm's `checkpoint_filter_fn` of the module converts its own names and open_clip's, and resizes positions. A source that
also has the other parts of a contrastive pair gives them too: the projection of images, the scale, and SigLIP's bias.
"""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mvlm.errors import RunError
from mvlm.files import is_finite, read_safetensors
from mvlm.model.network import MaskVLMNetwork
from mvlm.model.pretrained import ask_hub, is_cached
from mvlm.model.towers.timm_tower import PREFIX, TimmTower, make_module
from mvlm.untrusted import read_json
from mvlm.weights.load import LoadReport, Source, copy_encoder, log, split_prefix, weights_file, wide

DOWNLOAD = "timm"
"""Source that stands for the weights that timm downloads."""
HUB_NAMES = ("model.safetensors", "pytorch_model.bin")
"""Names of the files that timm looks for on the hub."""
HF_PATCHES = "embeddings.patch_embedding.weight"
"""Name of the patch embedding in transformers' CLIP and SigLIP."""
HF_NAMES = (
    ("embeddings.class_embedding", "cls_token"),
    ("embeddings.position_embedding.weight", "pos_embed"),
    ("embeddings.patch_embedding", "patch_embed.proj"),
    ("pre_layrnorm", "norm_pre"),
    ("post_layernorm", "norm"),
    ("encoder.layers.", "blocks."),
    ("self_attn.out_proj", "attn.proj"),
    ("layer_norm", "norm"),
    ("head.probe", "attn_pool.latent"),
    ("head.attention.out_proj", "attn_pool.proj"),
    ("head.layernorm", "attn_pool.norm"),
    ("head.mlp", "attn_pool.mlp"),
)
"""Parts of tensor names in transformers' CLIP and SigLIP, and timm's names for them."""


def load_image_tower(model: MaskVLMNetwork, source: Source) -> LoadReport:
    """Load a model's image tower, and what the source has of its contrastive pair.

    Args:
        source: a state dict, a .safetensors file, a folder with a model.safetensors, or "timm" for timm's download.

    Raises:
        RunError: the source is of another architecture, with all reasons, or cannot be read or downloaded. The model
            is then unchanged.
    """
    tower = model.image_encoder
    assert isinstance(tower, TimmTower)
    if isinstance(source, Mapping):
        tensors = dict(source)
    elif str(source) == DOWNLOAD:
        tensors = _downloaded(model)
    else:
        file = weights_file(source)
        tensors = read_safetensors(file)
        _check_settings(file.parent / "config.json", tower.module)
    named = _timm_names(tensors, tower.module)
    projection, bias = named.pop("head.weight", tensors.get("visual.head.proj.weight")), named.pop("head.bias", None)
    if bias is not None and bias.any():  # a classifier's: that of a pair has none
        projection = None
    further = _pair(model, tower, tensors, projection)
    if (mask_token := _mask_token(tensors, tower.mask_token.numel())) is not None:
        further["image_encoder.mask_token"] = mask_token
    if wrong := [name for name, tensor in further.items() if not is_finite(tensor)]:
        raise RunError(f"{', '.join(wrong)}: wanted finite values, found NaN or infinity; take another source")
    names: Any = {name: name for name, _ in tower.module.named_parameters()}
    inside = tuple(f"{name}." for name, _ in tower.module.named_children())
    report = copy_encoder(tower.module, LoadReport("image_encoder"), named, {}, names, inside, {})
    with torch.no_grad():
        for name, tensor in further.items():
            model.get_parameter(name).copy_(tensor)
    report.loaded += further
    return report


def _downloaded(model: MaskVLMNetwork) -> dict[str, Tensor]:
    """State dict of the model's image tower with timm's pretrained weights, downloaded or cached, head included."""
    config = model.config
    try:
        _check_download(config.image_tower)
        return make_module(config.image_tower, True, img_size=config.image_size).state_dict()
    except Exception as error:  # the network's, the hub's and the cache's own, which share no type
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        raise RunError(
            f"{config.image_tower}: wanted timm's pretrained weights, could not get them ({reason}); give a local file "
            f"with --image-weights FILE.safetensors"
        ) from error


def _check_download(tower: str) -> None:
    """Raise a connection error at once if timm's weights are not cached and the Hugging Face hub does not answer."""
    import timm

    source = timm.get_pretrained_cfg(tower.removeprefix(PREFIX))
    place = "" if source is None or source.hf_hub_filename else source.hf_hub_id
    if place and not any(is_cached(place, name) for name in HUB_NAMES):
        ask_hub()


def _check_settings(file: Path, module: Any) -> None:
    """Raise RunError if a config.json of transformers names another number of heads or another GELU than a tower has.

    The shapes of the tensors would not show that.

    module: the tower, as timm made it.
    """
    if not file.is_file():
        return
    try:
        config = dict(read_json(file, "settings", "the configuration of the weights beside it"))
        config = config.get("vision_config") or config
        heads, activation = config.get("num_attention_heads"), config.get("hidden_act")
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise RunError(f"{file}: wanted the configuration of the weights beside it, got {error}; remove it") from None
    block = module.blocks[0]
    own = getattr(getattr(block, "attn", None), "num_heads", heads)
    if heads not in (None, own):
        raise RunError(f"{file}: wanted num_attention_heads {own}, as in the tower, got {heads!r}; take another tower")
    quick = any("quick" in type(part).__name__.lower() for part in block.modules())
    if activation is not None and quick != (activation == "quick_gelu"):
        wanted = "quick_gelu" if quick else "another hidden_act than quick_gelu"
        raise RunError(
            f"{file}: wanted {wanted}, as in the tower, got {activation!r}; timm's towers with quickgelu in their name "
            f"have quick_gelu"
        )


def _timm_names(tensors: dict[str, Tensor], module: nn.Module) -> dict[str, Tensor]:
    """Rename the tensors of a source's image encoder to timm's names, with positions resized to the module's size.

    module: the tower, as timm made it.
    """
    if any(name.endswith(HF_PATCHES) for name in tensors):
        tensors = _from_transformers(tensors)
    convert = sys.modules[type(module).__module__].checkpoint_filter_fn
    try:
        return convert(dict(tensors), module)
    except (KeyError, ValueError, RuntimeError, IndexError, AttributeError) as error:
        raise RunError(f"image_encoder: wanted weights that timm converts, got {error!r}; take others") from None


def _from_transformers(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of transformers' CLIP or SigLIP, or of a model that contains one, under timm's names."""
    inside, rest = split_prefix(tensors, HF_PATCHES)
    renamed: dict[str, Tensor] = {}
    for name, tensor in inside.items():
        part = name.rpartition(".")[2]
        if ".q_proj." in name:
            thirds = [inside[name.replace("q_proj", third)] for third in ("q_proj", "k_proj", "v_proj")]
            name, tensor = name.replace("self_attn.q_proj", "attn.qkv"), torch.cat(thirds)
        elif ".k_proj." in name or ".v_proj." in name:
            continue
        elif part.startswith("in_proj_"):
            kind, width = part.removeprefix("in_proj_"), len(tensor) // 3
            renamed[f"attn_pool.q.{kind}"], renamed[f"attn_pool.kv.{kind}"] = tensor[:width], tensor[width:]
            continue
        for theirs, timms in HF_NAMES:
            name = name.replace(theirs, timms)
        renamed[name] = tensor
    for name in ("cls_token", "pos_embed"):
        if name in renamed:
            renamed[name] = renamed[name].reshape(1, -1, renamed[name].shape[-1])
    renamed.pop("embeddings.position_ids", None)  # 0, 1, 2, ..., which old files contain
    if "visual_projection.weight" in rest:
        renamed["head.weight"] = rest["visual_projection.weight"]
    return renamed


def _pair(
    model: MaskVLMNetwork, tower: TimmTower, tensors: Mapping[str, Tensor], projection: Tensor | None
) -> dict[str, Tensor]:
    """Tensors, under the model's names, that a CLIP or SigLIP has beside its encoders: projection, scale and bias.

    Args:
        tensors: the source's, by name.
        projection: weight (embedding width, tower width) of the source's projection of images; None if it has none.
    """
    pair: dict[str, Tensor] = {}
    wanted, width = model.image_projection, tower.mask_token.numel()
    if projection is None and tower.module.attn_pool is not None and wanted.out_features == width:
        projection = torch.eye(width)  # SigLIP's embedding is the output of its pooling
    if projection is not None and projection.shape == (wanted.out_features, width):
        weight = wide(projection)
        pair["image_projection.weight"] = nn.functional.pad(weight, (0, wanted.in_features - width))
        pair["image_projection.bias"] = torch.zeros(wanted.out_features)
    elif projection is not None:
        log.warning(
            "itc_width: wanted %d, as the source's projection of images has, got %d; the projection is not loaded",
            len(projection), wanted.out_features,
        )  # fmt: skip
    for name, ours in (("logit_scale", model.log_scale), ("logit_bias", model.logit_bias)):
        if ours is not None and name in tensors and tensors[name].numel() == 1:
            pair[name.replace("logit_scale", "log_scale")] = wide(tensors[name]).reshape(1)
    return pair


def _mask_token(tensors: Mapping[str, Tensor], width: int) -> Tensor | None:
    """Mask token (width,) by which a pretraining such as DINOv2's replaced embedded patches; None if there is none.

    That of MAE is left out: it belongs to the decoder.
    """
    if any(name.endswith("decoder_pos_embed") for name in tensors):
        return None
    tokens = [tensor for name, tensor in tensors.items() if name.split(".")[-1] == "mask_token"]
    return wide(tokens[0]).flatten() if len(tokens) == 1 and tokens[0].numel() == width else None
