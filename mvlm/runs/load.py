"""Load a trained model from a run, a checkpoint or an exported folder; export it."""

import json
from pathlib import Path

import torch

from mvlm.config.json_files import model_config
from mvlm.errors import ConfigError, RunError
from mvlm.files import copy_into, read_safetensors
from mvlm.model.maskvlm import MaskVLM
from mvlm.model.pretrained import CONFIG_FILE, WEIGHTS_FILE, write_model
from mvlm.runs.checkpoint import EMA, MODEL, MODEL_CONFIG, TOKENIZER, read_tensors
from mvlm.runs.folder import find_checkpoint
from mvlm_dataloading import DataError, Tokenizer, load_tokenizer


def load_model(path: Path | str, device: torch.device | str = "cpu") -> tuple[MaskVLM, Tokenizer]:
    """Load the model, in eval mode on `device`, and the tokenizer of a run, a checkpoint or an exported folder.

    The weights are the averaged ones (EMA) if the run kept them. RunError for a damaged folder or one of another kind.
    """
    path = Path(path)
    exported = (path / WEIGHTS_FILE).is_file() and (path / CONFIG_FILE).is_file()
    folder = path if exported else find_checkpoint(path)
    file = folder / (CONFIG_FILE if exported else MODEL_CONFIG)
    try:
        config = model_config(json.loads(file.read_text()), str(file))
        tokenizer = load_tokenizer(folder / TOKENIZER)
    except (ConfigError, DataError, ValueError, TypeError, RecursionError) as error:
        raise RunError(f"{folder}: {error}") from None
    model = MaskVLM(config)
    state = model.state_dict()
    if exported:
        copy_into(state, read_safetensors(folder / WEIGHTS_FILE), folder / WEIGHTS_FILE)
    else:
        read_tensors(folder / (EMA if (folder / EMA).is_dir() else MODEL), state)
    return model.to(device).eval(), tokenizer


def export(path: Path, out: Path) -> None:
    """Write one portable folder: model.safetensors, config.json (the model's) and tokenizer.json.

    The weights are the averaged ones if the run kept them. RunError if `out` holds files or `path` has no good
    checkpoint.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise RunError(f"{out}: wanted a new or empty folder, found other files; choose another one")
    model, tokenizer = load_model(path)
    out.mkdir(parents=True, exist_ok=True)
    write_model(model, out)
    tokenizer.save(out / TOKENIZER)
