"""Encoders from pretrained weights: ViTs of timm and transformers, RoBERTa and BERT of transformers; and back.

A source is a state dict, a safetensors file or a folder with a model.safetensors. Everything or nothing is loaded: the
report says what was loaded, resized and not used, an error lists all that is missing, unexpected or of another shape,
and leaves the model as it was. Nothing is unpickled.

The encoders compute what these libraries' models compute, with LayerNorm's eps of a ViT (1e-6) and of RoBERTa (1e-5).
BERT's is 1e-12, which shows in the fifth digit at most.
"""

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mvlm.errors import RunError
from mvlm.model.maskvlm import MaskVLM
from mvlm.weights.names import Name, bert_names, current_vit_name, hf_vit_names, timm_names, without_layer_scale

log = logging.getLogger(__name__)

Tensors = Mapping[str, Tensor]
Source = Tensors | str | Path
SOURCE_FILE = "model.safetensors"
ROBERTA_OFFSET = 2
"""RoBERTa's positions begin behind its padding id, 1."""


@dataclass
class LoadReport:
    """What became of a source: names of the module's tensors, and of the source's."""

    module: str
    loaded: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    """Ours that the source does not have. Only a mask token may be: it then stays as it was."""
    resized: list[str] = field(default_factory=list)
    """With the shapes before and after."""
    unexpected: list[str] = field(default_factory=list)
    """The source's that belong to no encoder: heads, decoders, poolers. They are not used."""

    def __str__(self) -> str:
        parts = [f"{self.module}: {len(self.loaded)} loaded"]
        for title in ("missing", "resized", "unexpected"):
            names = getattr(self, title)
            parts.append(f"{len(names)} {title}" + (f" ({', '.join(names)})" if names else ""))
        return "; ".join(parts)


def load_timm_vit(model: MaskVLM, source: Source) -> LoadReport:
    """The image encoder from a VisionTransformer of timm, or from a checkpoint with its names (MAE; SimMIM's mask token
    is taken too). LayerScale is folded into the weights. RunError as the module says.
    """
    tensors = _read(source)
    found, rest = _within(tensors, "patch_embed.proj.weight")
    found = without_layer_scale(found)
    if "decoder_pos_embed" in found:  # MAE's mask token is its decoder's
        rest |= {name: found.pop(name) for name in ("mask_token",) if name in found}
    names = timm_names(model.config.image_layers)
    return _load_image(model, found, rest, names, ("patch_embed.", "blocks.", "norm.", "norm_pre.", "reg_token"))


def load_hf_vit(model: MaskVLM, source: Source) -> LoadReport:
    """The image encoder from a ViTModel of transformers, or from a model around one (masked image modelling, MAE)."""
    found, rest = _within(_read(source), "embeddings.patch_embeddings.projection.weight")
    found = {current_vit_name(name): t for name, t in found.items()}
    names = hf_vit_names(model.config.image_layers)
    return _load_image(model, found, rest, names, ("embeddings.", "layers.", "layernorm."))


def load_hf_roberta(model: MaskVLM, source: Source) -> LoadReport:
    """The text encoder from a RobertaModel of transformers, or from a model around one."""
    return _load_text(model, _read(source), ROBERTA_OFFSET)


def load_hf_bert(model: MaskVLM, source: Source) -> LoadReport:
    """The text encoder from a BertModel of transformers, or from a model around one."""
    return _load_text(model, _read(source), 0)


def load_image_weights(model: MaskVLM, source: Source) -> LoadReport:
    """`load_timm_vit` or `load_hf_vit`, by the names in the source."""
    tensors = _read(source)
    hf = any(name.endswith("embeddings.patch_embeddings.projection.weight") for name in tensors)
    return (load_hf_vit if hf else load_timm_vit)(model, tensors)


def load_text_weights(model: MaskVLM, source: Source) -> LoadReport:
    """`load_hf_roberta` or `load_hf_bert`: BERT has two token types, RoBERTa one."""
    tensors = _read(source)
    types = [t for name, t in tensors.items() if name.endswith("embeddings.token_type_embeddings.weight")]
    return (load_hf_bert if types and len(types[0]) == 2 else load_hf_roberta)(model, tensors)


def export_timm_vit(model: MaskVLM) -> dict[str, Tensor]:
    """The image encoder as the state dict of timm's VisionTransformer with num_classes=0; without the mask token."""
    return _export_image(model, timm_names(model.config.image_layers))


def export_hf_vit(model: MaskVLM) -> dict[str, Tensor]:
    """The image encoder as the state dict of transformers' ViTModel without a pooler; without the mask token."""
    return _export_image(model, hf_vit_names(model.config.image_layers))


def export_hf_roberta(model: MaskVLM) -> dict[str, Tensor]:
    """The text encoder as the state dict of transformers' RobertaModel without a pooler, of text_length + 2 positions
    and one token type, which is zero."""
    return _export_text(model, ROBERTA_OFFSET, 1)


def export_hf_bert(model: MaskVLM) -> dict[str, Tensor]:
    """The same of a BertModel: text_length positions and two token types, which are zero."""
    return _export_text(model, 0, 2)


# ---- reading


def _read(source: Source) -> dict[str, Tensor]:
    if isinstance(source, Mapping):
        return dict(source)
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = Path(source) / SOURCE_FILE if Path(source).is_dir() else Path(source)
    if path.suffix != ".safetensors":
        raise RunError(
            f"{path}: wanted a .safetensors file; another kind may run code when it is read, so convert it first"
        )
    try:
        return load_file(path)
    except FileNotFoundError:
        raise RunError(f"{path}: wanted a safetensors file, found none") from None
    except (OSError, SafetensorError) as error:
        raise RunError(f"{path}: wanted a safetensors file, got one that cannot be read: {error}") from None


def _within(tensors: Tensors, anchor: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The tensors whose names begin as that of `anchor` does, without this beginning; and the rest.

    A model is found inside another one this way: `vit.`, `roberta.`, `encoder.`, `module.`.
    """
    prefixes = sorted((name.removesuffix(anchor) for name in tensors if name.endswith(anchor)), key=len)
    prefix = prefixes[0] if prefixes else ""
    inside = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
    return inside, {name: t for name, t in tensors.items() if not name.startswith(prefix)}


# ---- loading


def _load_image(
    model: MaskVLM, found: dict[str, Tensor], rest: Tensors, names: dict[str, Name], own: tuple[str, ...]
) -> LoadReport:
    side = model.config.image_size // model.config.patch_size
    report = LoadReport("image_encoder")

    def position(tensor: Tensor) -> Tensor:
        resized = resize_positions(tensor.flatten(0, -2), side)
        if resized.shape[0] != tensor.shape[-2]:
            report.resized.append(f"position {tuple(tensor.flatten(0, -2).shape)} to {tuple(resized.shape)}")
        return resized

    def flat(tensor: Tensor) -> Tensor:
        return tensor.flatten()

    convert = {
        "patch_projection.weight": lambda tensor: tensor.flatten(1),
        "mask_token": flat,
        "cls_token": flat,
        "position": position,
    }
    return _load(model.image_encoder, report, found, rest, names, own, convert)


def resize_positions(position: Tensor, side: int) -> Tensor:
    """Positions (1+N, C) or, without [CLS], (N, C) of a square grid -> (1 + side^2, C), bicubic with antialiasing as
    timm's. Without [CLS], its row is zero. ValueError where N is no square number.
    """
    rows = len(position)
    classes = 0 if round(rows**0.5) ** 2 == rows else 1
    before = round((rows - classes) ** 0.5)
    if before**2 != rows - classes:
        raise ValueError(f"wanted positions of a square grid, with or without [CLS], got {rows}")
    first = position[:1] if classes else torch.zeros_like(position[:1])
    grid = position[classes:]
    if before != side:
        square = grid.T.reshape(1, -1, before, before).to(torch.promote_types(grid.dtype, torch.float32))
        square = F.interpolate(square, size=(side, side), mode="bicubic", antialias=True, align_corners=False)
        grid = square.flatten(2)[0].T.to(position.dtype)
    return torch.cat([first, grid])


def _load_text(model: MaskVLM, tensors: dict[str, Tensor], offset: int) -> LoadReport:
    length = model.config.text_length
    found, rest = _within(tensors, "embeddings.word_embeddings.weight")
    types = found.pop("embeddings.token_type_embeddings.weight", None)
    found.pop("embeddings.position_ids", None)  # a count from 0, which old files hold
    report = LoadReport("text_encoder")

    def position(tensor: Tensor) -> Tensor:
        there = tensor[offset:]
        if len(there) > length:
            report.resized.append(f"position {tuple(there.shape)} to {(length, *there.shape[1:])}")
        return there[:length] if types is None else there[:length] + types[0]

    own = ("embeddings.", "encoder.layer.")
    names = bert_names(model.config.text_layers)
    return _load(model.text_encoder, report, found, rest, names, own, {"position": position})


def _load(
    module: nn.Module,
    report: LoadReport,
    found: dict[str, Tensor],
    rest: Tensors,
    names: dict[str, Name],
    own: tuple[str, ...],
    convert: Mapping[str, Callable[[Tensor], Tensor]],
) -> LoadReport:
    """Copy `found` into the module, or raise RunError with everything that is wrong and change nothing.

    names: the source's name of each of ours; own: how names begin that belong to an encoder, of which none may be left.
    """
    parameters = dict(module.named_parameters())
    assert parameters.keys() == names.keys()
    ready: dict[str, Tensor] = {}
    wrong: list[str] = []
    for ours, theirs in names.items():
        name, third = theirs if isinstance(theirs, tuple) else (theirs, None)
        if name not in found:
            report.missing.append(ours)
            if ours != "mask_token":
                wrong.append(f"{name} missing")
            continue
        try:
            tensor = found[name] if third is None else found[name].chunk(3)[third]
            tensor = convert[ours](tensor) if ours in convert else tensor
        except (ValueError, RuntimeError, IndexError) as error:
            wrong.append(f"{name} {tuple(found[name].shape)}: {error}")
            continue
        if tensor.shape != parameters[ours].shape:
            wrong.append(f"{name} wanted {tuple(parameters[ours].shape)}, got {tuple(tensor.shape)}")
        ready[ours] = tensor
    taken = {theirs[0] if isinstance(theirs, tuple) else theirs for theirs in names.values()}
    left = [name for name in found if name not in taken]
    wrong += [f"{name} unexpected" for name in left if name.startswith(own)]
    report.unexpected = [*(name for name in left if not name.startswith(own)), *rest]
    if wrong:
        raise RunError(
            f"{report.module}: weights of another architecture, nothing was loaded: {'; '.join(_unique(wrong))}; "
            f"set the model's sizes to the source's, or take another source"
        )
    with torch.no_grad():
        for ours, tensor in ready.items():
            parameters[ours].copy_(tensor)
    report.loaded = list(ready)
    log.info("%s", report)
    return report


def _unique(lines: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(lines))


# ---- writing


def _export(module: nn.Module, names: dict[str, Name]) -> dict[str, Tensor]:
    """Copies of the module's tensors under the other names; thirds are put together."""
    parts: dict[str, list[Tensor]] = {}
    tensors = {name: p.detach() for name, p in module.named_parameters()}
    for ours, theirs in names.items():
        parts.setdefault(theirs[0] if isinstance(theirs, tuple) else theirs, []).append(tensors[ours])
    return {name: torch.cat(found) if len(found) > 1 else found[0].clone() for name, found in parts.items()}


def _export_image(model: MaskVLM, names: dict[str, Name]) -> dict[str, Tensor]:
    side = model.config.patch_size
    found = _export(model.image_encoder, {ours: theirs for ours, theirs in names.items() if ours != "mask_token"})
    for ours, shape in (("patch_projection.weight", (-1, 3, side, side)), ("cls_token", (1, 1, -1))):
        name = str(names[ours])
        found[name] = found[name].reshape(shape)
    name = str(names["position"])
    found[name] = found[name].unsqueeze(0)
    return found


def _export_text(model: MaskVLM, offset: int, types: int) -> dict[str, Tensor]:
    found = _export(model.text_encoder, bert_names(model.config.text_layers))
    position = found["embeddings.position_embeddings.weight"]
    found["embeddings.position_embeddings.weight"] = F.pad(position, (0, 0, offset, 0))
    found["embeddings.token_type_embeddings.weight"] = position.new_zeros(types, position.shape[1])
    return found
