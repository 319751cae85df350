"""Folders of programs that another runtime can use without mvlm: programs, tokenizer.json and preprocess.json."""

import json
from pathlib import Path
from typing import Any

from mvlm.files import new_folder
from mvlm.inference.trained_model import TrainedModel
from mvlm.portable.modules import parts
from mvlm.portable.programs import OPSET, TOLERANCE, Format, check_onnx_packages, write_programs
from mvlm.runs.load import load_for_export
from mvlm_dataloading import Tokenizer
from mvlm_dataloading.files import sha256, write_json

PREPROCESS, TOKENIZER = "preprocess.json", "tokenizer.json"


def export_programs(source: Path, out: Path, format: Format) -> dict[str, float]:
    """Write a trained model's programs, its tokenizer, and how to prepare images and texts, to a new folder.

    Args:
        source: a run, one of its checkpoints, or an exported folder.
        out: new or empty folder. After an error there is none.
        format: pt2 (torch.export) or onnx.

    Returns:
        For each program's file, its largest difference from the network (`mvlm.portable.programs.difference`).

    Raises:
        RunError, ConfigError: as `load_model` and `write_programs`, and for a folder with files.
    """
    if format == "onnx":
        check_onnx_packages()
    with new_folder(out) as folder:
        model = load_for_export(source, "fp32")
        found = write_programs(model.network, folder, format)
        write_tokenizer(model.tokenizer, model.network.config.text_length, folder / TOKENIZER)
        write_json(folder / PREPROCESS, preprocessing(model, folder, format, found))
    return found


def write_tokenizer(tokenizer: Tokenizer, length: int, file: Path) -> None:
    """Write a tokenizer.json that adds [CLS] and [SEP], truncates to `length` tokens and pads to the longest text.

    With the package `tokenizers`, `Tokenizer.from_file(file).encode_batch(texts)` then has the model's ids and masks.
    For a text with the name of a special token in it, first set `encode_special_tokens = True`: no file can hold that.
    Where special tokens are ordinary pieces (SentencePiece without added_tokens), put the unknown token for such names.
    """
    from tokenizers import Tokenizer as Fast
    from tokenizers.processors import TemplateProcessing

    tokenizer.save(file)
    inner = Fast.from_file(str(file))
    cls, sep, pad = (tokenizer.token(i) for i in (tokenizer.cls_id, tokenizer.sep_id, tokenizer.pad_id))
    inner.post_processor = TemplateProcessing(
        single=f"{cls}:0 $A:0 {sep}:0", special_tokens=[(cls, tokenizer.cls_id), (sep, tokenizer.sep_id)]
    )
    inner.enable_truncation(length)
    inner.enable_padding(pad_id=tokenizer.pad_id, pad_token=pad)
    file.write_text(inner.to_str(pretty=True), encoding="utf-8")


def preprocessing(model: TrainedModel, folder: Path, format: Format, differences: dict[str, float]) -> dict[str, Any]:
    """The contents of preprocess.json (docs/guides/export.md)."""
    config, tokenizer = model.network.config, model.tokenizer
    programs = {}
    for part in parts(model.network):
        file = f"{part.name}.{format}"
        programs[part.name] = {
            "file": file,
            "sha256": sha256(folder / file),
            "inputs": list(part.inputs),
            "outputs": list(part.outputs),
            "largest_difference": differences[file],
        }
    return {
        "format": format,
        "opset": OPSET if format == "onnx" else None,
        "tolerance": TOLERANCE,
        "model_sha256": model.sha256,
        "model": json.loads(json.dumps(config.to_dict())),
        "image": {
            "size": config.image_size,
            "dtype": "uint8",
            "layout": "batch, channel (red, green, blue), row, column",
            "orientation": "turned as EXIF says",
            "depth": "of 16 bits the upper 8",
            "background": "white under transparent areas",
            "resize": "squeezed to a square, bilinear with antialiasing",
            "normalization": "inside the program",
        },
        "text": {
            "max_length": config.text_length,
            "cls_id": tokenizer.cls_id,
            "sep_id": tokenizer.sep_id,
            "pad_id": tokenizer.pad_id,
            "mask_id": tokenizer.mask_id,
        },
        "logit_scale": model.network.log_scale.exp().item(),
        "programs": programs,
    }
