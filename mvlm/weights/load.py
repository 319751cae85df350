"""Loading of pretrained encoders: ViTs of timm and transformers, RoBERTa and BERT of transformers.

Either all tensors of an encoder are loaded or none: an error lists everything that is missing, unexpected or of another
shape, and leaves the model unchanged. A table maps our names of tensors to theirs. If they store queries, keys and
values in one tensor, it maps to that tensor and one of its thirds.

The encoders compute what the models of these libraries compute, with the LayerNorm eps of a ViT (1e-6) and of RoBERTa
(1e-5). BERT's eps is 1e-12; features of MiniLM differ by less than 0.002.

Sources are state dicts and safetensors files. Nothing is unpickled.
"""

import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mvlm.errors import RunError
from mvlm.files import is_finite, read_safetensors
from mvlm.model.encoders import resize_positions
from mvlm.model.network import MaskVLMNetwork
from mvlm.untrusted import read_json

log = logging.getLogger(__name__)

Source = Mapping[str, Tensor] | str | Path
"""A state dict, a .safetensors file, or a folder with a model.safetensors."""
Tower = Literal["image", "text"]
"""The encoder that is looked for in a source."""

PARTS: dict[Tower, tuple[str, ...]] = {
    "image": ("vision_config", "image_config", "encoder"),
    "text": ("text_config", "decoder"),
}
"""Keys under which the config.json of a model with several encoders may have an encoder's settings, by encoder."""
BERT, ROBERTA = "bert", "roberta"
TEXT_FAMILIES = {
    **dict.fromkeys(
        ("bert", "electra", "ernie", "splinter", "big_bird", "dpr", "chinese_clip_text_model", "align_text_model"), BERT
    ),
    **dict.fromkeys(("roberta", "xlm-roberta", "camembert", "data2vec-text", "bridgetower_text_model"), ROBERTA),
}
"""`model_type` of transformers' text encoders that compute what ours does -> BERT or RoBERTa, by their positions."""
EXACT_GELU = ("gelu", "gelu_python")
"""Names in transformers of the GELU that our encoders compute."""
TANH_GELU = ("gelu_new", "gelu_pytorch_tanh", "gelu_python_tanh", "gelu_fast", "gelu_accurate")
"""Names in transformers of GELU's approximation by tanh, whose values differ by less than 0.0005."""


def read_source(source: Source, tower: Tower, heads: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read all tensors of a source by name, for one of the encoders, with a number of attention heads.

    Returns the tensors, and the encoder's settings in the config.json beside them, none if there is no such file.
    RunError for a file that is missing or is not safetensors, or beside which a config.json says that its model
    computes something else.
    """
    if isinstance(source, Mapping):
        return dict(source), {}
    path = weights_file(source)
    return read_safetensors(path), _checked_settings(path.parent / "config.json", tower, heads)


def weights_file(source: str | Path) -> Path:
    """The one safetensors file of a source. RunError for another kind of file, and for several."""
    path = Path(source) / "model.safetensors" if Path(source).is_dir() else Path(source)
    if path.suffix != ".safetensors":
        raise RunError(
            f"{path}: wanted a .safetensors file; another kind may run code when it is read, so convert it first"
        )
    index = path.with_name(path.name + ".index.json")
    if index.is_file() and not path.is_file():
        raise RunError(
            f"{path}: wanted one safetensors file, found {index.name} of several; join them: load the model in "
            f'transformers and save it with save_pretrained(..., max_shard_size="100GB")'
        )
    return path


def _checked_settings(path: Path, tower: Tower, heads: int) -> dict[str, Any]:
    """Settings of an encoder in a config.json, if there is one, after a check of what the tensors do not show."""
    if not path.is_file():
        return {}
    try:
        config = dict(read_json(path, "settings", "the configuration of the weights beside it"))
    except (OSError, ValueError, TypeError) as error:
        raise RunError(f"{path}: wanted the configuration of the weights beside it, got {error}; remove it") from None
    if "num_attention_heads" not in config:
        config = next((part for name in PARTS[tower] if isinstance(part := config.get(name), dict)), config)
    if tower == "text":
        _check_text(path, config)
    elif "rope" in str(config.get("architecture")):  # whose rotary positions may be no tensor
        raise RunError(
            f"{path}: wanted a ViT with added positions alone, got {config['architecture']}, which also rotates "
            f"queries and keys; take another source"
        )
    stated = config.get("num_attention_heads")
    if stated is None:
        log.warning(
            "%s: wanted num_attention_heads, to compare it with the model's %d, found none; set --model.heads to the "
            "source's",
            path,
            heads,
        )
    elif stated != heads:
        raise RunError(
            f"{path}: wanted num_attention_heads {heads}, as in the model, got {stated!r}: with other heads the same "
            f"weights compute something else; set --model.heads {stated}"
        )
    activation = config.get("hidden_act", "gelu")
    if activation in TANH_GELU:
        log.warning("%s: wanted hidden_act gelu, got %s; features will differ slightly", path, activation)
    elif activation not in EXACT_GELU:
        raise RunError(f"{path}: wanted hidden_act gelu, got {activation!r}; take weights that were trained with it")
    return config


def _check_text(path: Path, config: Mapping[str, Any]) -> None:
    """Raise RunError if a config.json names a text model that computes something else than ours with equal tensors.

    path: of the config.json, for the error.
    """
    kind = config.get("model_type")
    if kind is not None and str(kind) not in TEXT_FAMILIES:
        raise RunError(
            f"{path}: wanted a model_type of {', '.join(TEXT_FAMILIES)}, got {kind!r}; give weights of another model a "
            f"folder of their own, and the state dict of a BERT or RoBERTa under another name to load_hf_bert or "
            f"load_hf_roberta"
        )
    if config.get("is_decoder"):
        raise RunError(
            f"{path}: wanted an encoder, got is_decoder {config['is_decoder']!r}, where no word sees the words after "
            f"it; take another source"
        )
    if config.get("rescale_embeddings"):
        raise RunError(
            f"{path}: wanted word embeddings as they are stored, got rescale_embeddings "
            f"{config['rescale_embeddings']!r}, which multiplies them by the root of the width; take another source"
        )
    pad = config.get("pad_token_id", 0)
    if TEXT_FAMILIES.get(str(kind)) == ROBERTA and (not isinstance(pad, int) or pad < 0):
        raise RunError(f"{path}: wanted pad_token_id, after which positions start, got {pad!r}; correct it")


def split_prefix(tensors: Mapping[str, Tensor], anchor: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Find a model inside another one, by the prefix that its tensor `anchor` has (`vit.`, `roberta.`, `module.`).

    Returns the tensors with this prefix, without it in their names, and the other tensors. Of a model inside another
    one with the same tensor, the outer one is taken. If no tensor is called `anchor`, all are returned as they are.
    RunError for several models side by side, such as a student and its teacher.
    """
    prefixes = sorted((name.removesuffix(anchor) for name in tensors if name.endswith(anchor)), key=len)
    prefix = prefixes[0] if prefixes else ""
    if beside := [other for other in prefixes if not other.startswith(prefix)]:
        raise RunError(
            f"{anchor}: wanted one encoder, found several, {', '.join((prefix, *beside))}; "
            f"give the state dict or file of one of them alone"
        )
    inside = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
    return inside, {name: t for name, t in tensors.items() if not name.startswith(prefix)}


Convert = Callable[[Tensor], Tensor]


SourceName = str | tuple[str, int]
"""Name of a tensor in the source; or the name, and 0, 1 or 2 for one third of the tensor."""
ROBERTA_FIRST_POSITION = 2
"""Row of RoBERTa's first position: positions start after its padding id, 1."""


def timm_names(layers: int) -> dict[str, SourceName]:
    """Table of our names -> timm's, for all tensors of the image encoder."""
    modules = {"attention.out": "attn.proj", "mlp.up": "mlp.fc1", "mlp.down": "mlp.fc2"}
    modules |= {name: name for name in ("norm1", "norm2")}
    names: dict[str, SourceName] = {
        **{name: name for name in ("mask_token", "cls_token")}, "position": "pos_embed",
        **_of_modules({"patch_projection": "patch_embed.proj", "norm": "norm"}),
        **_of_modules({f"blocks.{i}.{a}": f"blocks.{i}.{b}" for i in range(layers) for a, b in modules.items()}),
    }  # fmt: skip
    for kind in ("weight", "bias"):
        for i in range(layers):
            for third, part in enumerate(("query", "key", "value")):
                names[f"blocks.{i}.attention.{part}.{kind}"] = (f"blocks.{i}.attn.qkv.{kind}", third)
    return names


def hf_vit_names(layers: int) -> dict[str, SourceName]:
    """Table of our names -> those of transformers' ViT, for all tensors of the image encoder."""
    modules = {
        "attention.query": "attention.q_proj", "attention.key": "attention.k_proj",
        "attention.value": "attention.v_proj",
        "attention.out": "attention.o_proj", "norm1": "layernorm_before", "norm2": "layernorm_after",
        "mlp.up": "mlp.fc1", "mlp.down": "mlp.fc2",
    }  # fmt: skip
    return {
        **{name: f"embeddings.{name}" for name in ("mask_token", "cls_token")},
        "position": "embeddings.position_embeddings",
        **_of_modules({"patch_projection": "embeddings.patch_embeddings.projection", "norm": "layernorm"}),
        **_of_modules({f"blocks.{i}.{a}": f"layers.{i}.{b}" for i in range(layers) for a, b in modules.items()}),
    }


def _of_modules(modules: Mapping[str, str]) -> dict[str, SourceName]:
    """Names of weights and biases, ours -> theirs, from the names of modules, ours -> theirs."""
    return {f"{ours}.{kind}": f"{theirs}.{kind}" for kind in ("weight", "bias") for ours, theirs in modules.items()}


def current_vit_name(name: str) -> str:
    """Translate the name of a tensor of transformers' ViT to the current one: older files have names of before."""
    match = re.fullmatch(r"encoder\.layer\.(\d+)\.(.+)\.(weight|bias)", name)
    if match is None:
        return name
    layer, module, kind = match.groups()
    modules = {
        "attention.attention.query": "attention.q_proj", "attention.attention.key": "attention.k_proj",
        "attention.attention.value": "attention.v_proj", "attention.output.dense": "attention.o_proj",
        "intermediate.dense": "mlp.fc1", "output.dense": "mlp.fc2",
    }  # fmt: skip
    return f"layers.{layer}.{modules.get(module, module)}.{kind}"


def current_norm_name(name: str) -> str:
    """Name of a BERT's tensor. Files of 2018, such as the hub's bert-base-uncased, have TensorFlow's names of norms."""
    return re.sub(r"\bLayerNorm\.gamma$", "LayerNorm.weight", re.sub(r"\bLayerNorm\.beta$", "LayerNorm.bias", name))


def bert_names(layers: int) -> dict[str, SourceName]:
    """Table of our names -> those of transformers' BERT and RoBERTa, for all tensors of the text encoder."""
    modules = {
        "attention.query": "attention.self.query", "attention.key": "attention.self.key",
        "attention.value": "attention.self.value", "attention.out": "attention.output.dense",
        "norm1": "attention.output.LayerNorm", "mlp.up": "intermediate.dense", "mlp.down": "output.dense",
        "norm2": "output.LayerNorm",
    }  # fmt: skip
    return {
        "words.weight": "embeddings.word_embeddings.weight",
        "position": "embeddings.position_embeddings.weight",
        **_of_modules({"norm": "embeddings.LayerNorm"}),
        **_of_modules({f"blocks.{i}.{a}": f"encoder.layer.{i}.{b}" for i in range(layers) for a, b in modules.items()}),
    }


def join_qkv_bias(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Join BEiT's and SimMIM's separate biases of queries and values into one, with zeros for keys.

    A bias of keys adds the same number to all scores of a query, so the softmax does not depend on it.
    """
    joined = dict(tensors)
    for name in tensors:
        if name.endswith(".attn.q_bias") and name.replace("q_bias", "v_bias") in joined:
            q, v = joined.pop(name), joined.pop(name.replace("q_bias", "v_bias"))
            joined[name.replace("q_bias", "qkv.bias")] = torch.cat([q, torch.zeros_like(q), v])
    return joined


def fold_layer_scale(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Fold LayerScale into the weights: x + gamma * f(x) is x + f'(x), with gamma in f's last layer.

    Tensors have timm's names.
    """
    folded = join_qkv_bias(tensors)
    for gamma, layer in (
        ("ls1.gamma", "attn.proj"),
        ("ls2.gamma", "mlp.fc2"),
        ("gamma_1", "attn.proj"),
        ("gamma_2", "mlp.fc2"),
    ):
        for name in [name for name in folded if re.fullmatch(rf"blocks\.\d+\.{re.escape(gamma)}", name)]:
            last = name.removesuffix(gamma) + layer
            if {f"{last}.weight", f"{last}.bias"} <= folded.keys():
                scale = wide(folded.pop(name))
                folded[f"{last}.weight"] = scale[:, None] * wide(folded[f"{last}.weight"])
                folded[f"{last}.bias"] = scale * wide(folded[f"{last}.bias"])
    return folded


def wide(tensor: Tensor) -> Tensor:
    """The tensor in at least float32, so that sums and products of weights are rounded once. RunError for integers."""
    if not tensor.is_floating_point():
        raise RunError(f"wanted weights as floats, found {tensor.dtype}; take another source")
    return tensor if tensor.dtype == torch.float64 else tensor.float()  # torch promotes no float8


@dataclass
class LoadReport:
    """Outcome of loading one encoder, by tensor names."""

    module: str
    """Name of the encoder in the model."""
    loaded: list[str] = field(default_factory=list)
    """The encoder's tensors that were loaded."""
    missing: list[str] = field(default_factory=list)
    """The encoder's tensors that the source lacks and that keep their values. Only a mask token may be missing."""
    resized: list[str] = field(default_factory=list)
    """The encoder's tensors that were resized, with the shapes before and after."""
    unexpected: list[str] = field(default_factory=list)
    """The source's tensors that belong to no encoder (heads, decoders, poolers). They are not used."""

    def __str__(self) -> str:
        parts = [f"{self.module}: {len(self.loaded)} loaded"]
        for title in ("missing", "resized", "unexpected"):
            names = getattr(self, title)
            parts.append(f"{len(names)} {title}" + (f" ({', '.join(names)})" if names else ""))
        return "; ".join(parts)


def load_timm_vit(model: MaskVLMNetwork, source: Source) -> LoadReport:
    """Load the image encoder from a VisionTransformer of timm, or from a checkpoint with its names (MAE, SimMIM).

    LayerScale is folded into the weights. SimMIM's mask token is loaded, MAE's is not. RunError, with all reasons, for
    a source of another architecture or an unreadable file; the model is then unchanged. Tensors do not show the number
    of heads: it is checked if the source's config.json lies beside the file.
    """
    tensors, _ = read_source(source, "image", model.config.heads)
    found, rest = split_prefix(tensors, "patch_embed.proj.weight")
    found = fold_layer_scale(found)
    if "decoder_pos_embed" in found:
        # MAE's mask token is an input of its decoder, so it is not the encoder's.
        rest |= {name: found.pop(name) for name in ("mask_token",) if name in found}
    names = timm_names(model.config.image_layers)
    encoder_prefixes = ("patch_embed.", "blocks.", "norm.", "norm_pre.", "reg_token", "rope.", "rel_pos_bias.")
    return _load_image_encoder(model, found, rest, names, encoder_prefixes)


def load_hf_vit(model: MaskVLMNetwork, source: Source) -> LoadReport:
    """Load the image encoder from transformers' ViTModel, or from a model that contains one.

    RunError as for `load_timm_vit`.
    """
    tensors, _ = read_source(source, "image", model.config.heads)
    found, rest = split_prefix(tensors, "embeddings.patch_embeddings.projection.weight")
    found = {current_vit_name(name): t for name, t in found.items()}
    names = hf_vit_names(model.config.image_layers)
    # A name under "encoder." is an older one of a tensor that ours does not have.
    return _load_image_encoder(model, found, rest, names, ("embeddings.", "layers.", "encoder.", "layernorm."))


def load_hf_roberta(model: MaskVLMNetwork, source: Source) -> LoadReport:
    """Load the text encoder from transformers' RobertaModel, or from a model that contains one.

    RunError as for `load_timm_vit`, and for a config.json beside the file that names a BERT.
    """
    return _load_text_encoder(model, source, ROBERTA)


def load_hf_bert(model: MaskVLMNetwork, source: Source) -> LoadReport:
    """Load the text encoder from transformers' BertModel, or from a model that contains one.

    RunError as for `load_timm_vit`, and for a config.json beside the file that names a RoBERTa.
    """
    return _load_text_encoder(model, source, BERT)


def load_image_weights(model: MaskVLMNetwork, source: Source) -> LoadReport:
    """Load the image encoder with `load_timm_vit` or `load_hf_vit`, chosen by the names in the source."""
    tensors, _ = read_source(source, "image", model.config.heads)
    hf = any(name.endswith("embeddings.patch_embeddings.projection.weight") for name in tensors)
    return (load_hf_vit if hf else load_timm_vit)(model, tensors)


def load_text_weights(model: MaskVLMNetwork, source: Source) -> LoadReport:
    """Load the text encoder with `load_hf_bert` or `load_hf_roberta`, as the source's config.json says.

    Without that file, two token types are BERT's and one is RoBERTa's. RunError for another number.
    """
    return _load_text_encoder(model, source, None)


def _load_image_encoder(
    model: MaskVLMNetwork,
    found: dict[str, Tensor],
    rest: dict[str, Tensor],
    names: dict[str, SourceName],
    encoder_prefixes: tuple[str, ...],
) -> LoadReport:
    if model.config.image_tower:
        raise RunError("image_encoder: wanted our ViT, found an image tower (image_tower); use load_image_tower")
    side = model.config.image_size // model.config.patch_size
    report = LoadReport("image_encoder")

    def position(tensor: Tensor) -> Tensor:
        resized = resize_positions(tensor.flatten(0, -2), side)
        if resized.shape[0] != tensor.shape[-2]:
            report.resized.append(f"position {tuple(tensor.flatten(0, -2).shape)} to {tuple(resized.shape)}")
        return resized

    convert = {
        "patch_projection.weight": lambda tensor: tensor.flatten(1),
        "mask_token": torch.flatten,
        "cls_token": torch.flatten,
        "position": position,
    }
    return copy_encoder(model.image_encoder, report, found, rest, names, encoder_prefixes, convert)


def _load_text_encoder(model: MaskVLMNetwork, source: Source, family: str | None) -> LoadReport:
    if model.config.text_tower:
        raise RunError(
            "text_encoder: wanted an own text encoder, found a text tower (text_tower); load a model without"
        )
    tensors, settings = read_source(source, "text", model.config.heads)
    length = model.config.text_length
    found, rest = split_prefix(tensors, "embeddings.word_embeddings.weight")
    found = {current_norm_name(name): tensor for name, tensor in found.items()}
    types = found.pop("embeddings.token_type_embeddings.weight", None)
    found.pop("embeddings.position_ids", None)  # 0, 1, 2, ..., which old files contain
    report = LoadReport("text_encoder")
    first_position = _first_position(settings, 0 if types is None else len(types), family)

    def position(tensor: Tensor) -> Tensor:
        used = tensor[first_position:]
        if len(used) > length:
            report.resized.append(f"position {tuple(used.shape)} to {(length, *used.shape[1:])}")
        # Captions have only the first token type, so its embedding is a constant that the positions absorb.
        return used[:length] if types is None else wide(used[:length]) + wide(types[0])

    encoder_prefixes = ("embeddings.", "encoder.layer.")
    names = bert_names(model.config.text_layers)
    return copy_encoder(model.text_encoder, report, found, rest, names, encoder_prefixes, {"position": position})


def _first_position(settings: Mapping[str, Any], types: int, family: str | None) -> int:
    """Row of the position embeddings that a text's first token gets: 0 for BERT, padding id + 1 for RoBERTa.

    Args:
        settings: the source's config.json; empty if there is none.
        types: number of token types, which tells BERT from RoBERTa without a config.json.
        family: the family that is wanted; None for any.
    """
    kind = settings.get("model_type")
    named = TEXT_FAMILIES.get(str(kind))
    if named and family and named != family:
        raise RunError(f"text_encoder: wanted a {family}, got model_type {kind}; load it with load_hf_{named}")
    family = named or family or {1: ROBERTA, 2: BERT}.get(types)
    if family is None:
        raise RunError(
            f"text_encoder: wanted 1 token type, as RoBERTa has, or 2, as BERT has, found {types}, and positions start "
            f"at another row in each; give the file with its config.json, or use load_hf_roberta or load_hf_bert"
        )
    if family == BERT:
        return 0
    return settings.get("pad_token_id", 1) + 1 if named else ROBERTA_FIRST_POSITION


def copy_encoder(
    module: nn.Module,
    report: LoadReport,
    tensors: dict[str, Tensor],
    rest: dict[str, Tensor],
    names: dict[str, SourceName],
    encoder_prefixes: tuple[str, ...],
    convert: Mapping[str, Convert],
) -> LoadReport:
    """Copy the tensors of a source into an encoder and complete the report.

    Args:
        module: the encoder.
        tensors: those of the source's model, by name.
        rest: tensors of the source outside that model.
        names: for each of the encoder's tensors, its name in the source.
        encoder_prefixes: name prefixes of tensors of the source's encoder. None of these may be left over: an encoder
            with more tensors than ours computes something else.
        convert: functions for tensors that have another form in the source.

    Raises:
        RunError: something does not fit, and it lists everything; or a value is not finite. The encoder is then
            unchanged.
    """
    parameters = dict(module.named_parameters())
    assert parameters.keys() == names.keys()
    ready: dict[str, Tensor] = {}
    wrong: list[str] = []
    for ours, theirs in names.items():
        name, third = theirs if isinstance(theirs, tuple) else (theirs, None)
        if name not in tensors:
            report.missing.append(ours)
            if ours != "mask_token":
                wrong.append(f"{name} missing")
            continue
        if not tensors[name].is_floating_point():
            wrong.append(f"{name} wanted floats, found {tensors[name].dtype}")
            continue
        try:
            tensor = tensors[name] if third is None else tensors[name].chunk(3)[third]
            tensor = convert[ours](tensor) if ours in convert else tensor
        except (ValueError, RuntimeError, IndexError) as error:
            wrong.append(f"{name} {tuple(tensors[name].shape)}: {error}")
            continue
        if tensor.shape != parameters[ours].shape:
            wrong.append(f"{name} wanted {tuple(parameters[ours].shape)}, got {tuple(tensor.shape)}")
        ready[ours] = tensor
    used = {theirs[0] if isinstance(theirs, tuple) else theirs for theirs in names.values()}
    unused = [name for name in tensors if name not in used]
    wrong += [f"{name} unexpected" for name in unused if name.startswith(encoder_prefixes)]
    report.unexpected = [*(name for name in unused if not name.startswith(encoder_prefixes)), *rest]
    if wrong:
        distinct = list(dict.fromkeys(wrong))  # the three thirds of one tensor have the same message
        more = f"; and {len(distinct) - 8} more" if len(distinct) > 8 else ""
        raise RunError(
            f"{report.module}: wanted weights of this architecture, found others, nothing was loaded: "
            f"{'; '.join(distinct[:8])}{more}; "
            f"set the model's sizes to the source's, or take another source"
        )
    for ours, tensor in ready.items():
        theirs = names[ours]
        name = theirs if isinstance(theirs, str) else theirs[0]
        if not is_finite(wide(tensor) if tensor.element_size() == 1 else tensor):
            raise RunError(
                f"{report.module}: wanted finite values, found NaN or infinity in {name}; take another source"
            )
    with torch.no_grad():
        for ours, tensor in ready.items():
            parameters[ours].copy_(tensor)
    report.loaded = list(ready)
    log.info("%s", report)
    return report
