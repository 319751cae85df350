"""Small text encoders of transformers with random weights, in folders as save_pretrained writes them."""

import json
from pathlib import Path
from typing import Any

import torch

from mvlm.config.model import MaskVLMConfig
from mvlm.model.maskvlm import MaskVLM
from mvlm.weights.text_tower import load_text_tower, read_text_tower, read_tower_tokenizer
from support.models import micro_config

BERT, ROBERTA = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"], ["<pad>", "<unk>", "<s>", "</s>", "<mask>"]
SPECIAL = {
    "bert": BERT, "distilbert": BERT, "modernbert": BERT, "roberta": ROBERTA, "xlm-roberta": ROBERTA, "mpnet": ROBERTA,
    "clip": ["<|startoftext|>", "<|endoftext|>", "<unk>"], "siglip": ["<unk>", "</s>"],
}  # fmt: skip
"""Special tokens by kind of model."""
WORDS = ["a", "the", "red", "green", "blue", "square", "circle", "cat", "of", "and", "two", "on", "left"]


def text_model(kind: str, vision: dict[str, Any] | None = None, **changes: Any) -> Any:
    """transformers' model of a kind, small, with random weights large enough to matter, in evaluation mode.

    `vision` has settings of the half for images of a CLIP or SigLIP.
    """
    import transformers

    names = SPECIAL[kind]
    values: dict[str, Any] = {
        "vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48,
        "max_position_embeddings": 20, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 1,
    }  # fmt: skip
    if kind == "distilbert":
        values |= {"dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 48}
        values = {name: x for name, x in values.items() if "_size" not in name[:12] or name == "vocab_size"}
    if kind == "modernbert":
        values |= {"cls_token_id": 2, "sep_token_id": 3, "local_attention": 32}
    if kind in ("clip", "siglip"):
        values |= {
            "vocab_size": len(names) + len(WORDS) + (kind == "siglip"),
            "pad_token_id": 7,
            "projection_dim": 24,
            "projection_size": 24,
        }
        images = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
        images |= {"image_size": 32, "patch_size": 8, "hidden_act": "gelu"} | (vision or {})
        values = {"text_config": values | changes, "vision_config": images, "projection_dim": 24}
        changes = {}
    torch.manual_seed(1)
    config = transformers.AutoConfig.for_model(kind, **(values | changes))
    model = transformers.AutoModel.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "logit" not in name:
                scale = 1.7 / parameter.shape[-1] ** 0.5
                parameter.copy_(scale * torch.randn(parameter.shape) + ("norm" in name.lower()))
    return model


def write_tokenizer(folder: Path, kind: str) -> None:
    """A tokenizer of whole words, with BERT's or RoBERTa's rule for special tokens. MPNet's has [CLS] as a
    piece, SigLIP's <pad>, which is not its padding."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    special = SPECIAL[kind]
    pieces = [*special, *WORDS, *{"mpnet": ["[CLS]"], "siglip": ["<pad>"]}.get(kind, [])]
    unknown = next(name for name in special if "unk" in name.lower())
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(pieces)}, unk_token=unknown))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.add_special_tokens(special)
    if len(special) == 5:
        ends = [(name, inner.token_to_id(name)) for name in special[2:4]]
        inner.post_processor = processors.TemplateProcessing(f"{special[2]} $A {special[3]}", special_tokens=ends)
    inner.save(str(folder / "tokenizer.json"))
    named = {"pad_token": {"content": special[1]}} if kind == "siglip" else {}
    (folder / "tokenizer_config.json").write_text(json.dumps(named))


def write_text_tower(folder: Path, kind: str, model: Any = None) -> Any:
    """Write a folder with a model and its tokenizer. Returns the model."""
    model = text_model(kind) if model is None else model
    model.save_pretrained(folder)
    write_tokenizer(folder, kind)
    return model


def model_with_tower(folder: Path, **changes: Any) -> MaskVLM:
    """A micro model with the loaded text tower of a folder, in evaluation mode."""
    settings = read_text_tower(folder)
    model = MaskVLM(tower_config(**(settings | {"mask_token_id": read_tower_tokenizer(folder).mask_id} | changes)))
    load_text_tower(model, folder)
    return model.eval()


def tower_config(**changes: Any) -> MaskVLMConfig:
    return micro_config(**({"width": 40, "heads": 2} | changes))
