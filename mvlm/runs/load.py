"""A trained model from a run, a checkpoint or an exported folder, and its export."""

import json
from pathlib import Path

import torch

from mvlm.config.json_files import model_config
from mvlm.errors import ConfigError, RunError
from mvlm.files import copy_into, read_safetensors, write_json, write_safetensors
from mvlm.model.maskvlm import MaskVLM
from mvlm.runs.checkpoint import find_checkpoint, read_tensors
from mvlm_dataloading import DataError, Tokenizer, load_tokenizer


def load_model(path: Path | str, device: torch.device | str = "cpu") -> tuple[MaskVLM, Tokenizer]:
    """The model (in eval mode, on `device`) and the tokenizer of a run, a checkpoint or an exported folder.

    The averaged weights (EMA) where the run kept them. RunError for a folder that is none of these or is damaged.
    """
    path = Path(path)
    exported = (path / "model.safetensors").is_file() and (path / "config.json").is_file()
    folder = path if exported else find_checkpoint(path)
    file = folder / ("config.json" if exported else "model.json")
    try:
        config = model_config(json.loads(file.read_text()), str(file))
        tokenizer = load_tokenizer(folder / "tokenizer.json")
    except (ConfigError, DataError, ValueError, TypeError, RecursionError) as error:
        raise RunError(f"{folder}: {error}") from None
    model = MaskVLM(config)
    state = model.state_dict()
    if exported:
        copy_into(state, read_safetensors(folder / "model.safetensors"), folder / "model.safetensors")
    else:
        read_tensors(folder / ("ema" if (folder / "ema").is_dir() else "model"), state)
    return model.to(device).eval(), tokenizer


def export(path: Path, out: Path) -> None:
    """Write one portable folder: model.safetensors, config.json (the model's) and tokenizer.json.

    The averaged weights where the run kept them. RunError when `out` holds files, or `path` no good checkpoint.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise RunError(f"{out}: wanted a new or empty folder, found other files; choose another one")
    model, tokenizer = load_model(path)
    out.mkdir(parents=True, exist_ok=True)
    write_safetensors(out / "model.safetensors", model.state_dict())
    write_json(out / "config.json", model.config.to_dict())
    tokenizer.save(out / "tokenizer.json")
