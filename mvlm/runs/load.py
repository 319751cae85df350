"""Load a trained model from a run, a checkpoint, an exported folder or the hub; export it."""

import json
import logging
from pathlib import Path

import torch

from mvlm.config.json_files import model_config
from mvlm.device import choose_device
from mvlm.errors import ConfigError, RunError
from mvlm.files import copy_into, new_folder, read_safetensors
from mvlm.inference.trained_model import TrainedModel
from mvlm.model.maskvlm import MaskVLM
from mvlm.model.pretrained import CONFIG_FILE, HUB_ID, WEIGHTS_FILE, download, write_model
from mvlm.runs.checkpoint import EMA, MODEL, MODEL_CONFIG, TOKENIZER, read_state, read_tensors
from mvlm.runs.folder import find_checkpoint, log_unfinished
from mvlm.weights.resize import resized_model
from mvlm_dataloading import DataError, Tokenizer, load_tokenizer

log = logging.getLogger(__name__)


def load_model(
    path: Path | str,
    device: torch.device | str = "auto",
    precision: str = "auto",
    image_size: int | None = None,
    text_length: int | None = None,
) -> TrainedModel:
    """Load a trained model and its tokenizer.

    The result has the questions that a model answers as methods, and unpacks into the network and the tokenizer. The
    weights are the averaged ones (EMA) if the run kept them. Of a fine-tuned run, the network without the task's head.
    A warning is logged if the model was trained without ITM.

    Args:
        path: a run, one of its checkpoints, an exported folder, the model.safetensors in one, or an id owner/name on
            the Hugging Face hub, if there is no folder `owner` here.
        device: auto (the GPU if there is one), cpu, cuda, or a `torch.device`.
        precision: auto, bf16 or fp32 (`mvlm.device.autocast`).
        image_size: side of images in pixels, for which position embeddings are resized. Default: as trained.
        text_length: longest text in tokens, at most the trained one. Default: as trained.

    Raises:
        RunError: there is no such model, or it is damaged or of another kind.
        PermissionError: a file of its checkpoint may not be read.
        ConfigError: there is no such device, precision or size.
    """
    chosen = device if isinstance(device, torch.device) else choose_device(device)
    folder, exported = _find_model(path)
    if not exported:
        log_unfinished(Path(path), folder)
    _check_tokenizer(folder)
    file = folder / (CONFIG_FILE if exported else MODEL_CONFIG)
    try:
        config = model_config(json.loads(file.read_text()), str(file))
        tokenizer = load_tokenizer(folder / TOKENIZER)
    except (ConfigError, DataError, ValueError, TypeError, RecursionError) as error:
        raise RunError(f"{folder}: {error}") from None
    network = MaskVLM(config)
    state = network.state_dict()
    if exported:
        copy_into(state, read_safetensors(folder / WEIGHTS_FILE), folder / WEIGHTS_FILE)
    else:
        # A fine-tuned run keeps the network as the part `model` of its task.
        prefix = "model." if read_state(folder).get("task") else ""
        read_tensors(folder / (EMA if (folder / EMA).is_dir() else MODEL), state, prefix)
    if not network.matching_is_trained:
        log.warning("%s: trained without ITM, so its matches and re-rankings mean nothing", path)
    network = resized_model(network, image_size, text_length, trained=True)
    return TrainedModel(network.to(chosen), tokenizer, precision)


def load_tokenizer_of(path: Path | str) -> Tokenizer:
    """Load the tokenizer of a trained model, and not its weights. `path` as in `load_model`.

    RunError if there is no such model, or its tokenizer is damaged.
    """
    folder, _ = _find_model(path)
    _check_tokenizer(folder)
    try:
        return load_tokenizer(folder / TOKENIZER)
    except DataError as error:
        raise RunError(f"{folder}: {error}") from None


def _check_tokenizer(folder: Path) -> None:
    """Raise RunError if there is none, as in a folder that only `MaskVLM.save_pretrained` wrote."""
    if not (folder / TOKENIZER).is_file():
        raise RunError(
            f"{folder}: wanted a {TOKENIZER} beside the weights, found none; write the one that the model was trained "
            f'with: `tokenizer.save(folder / "{TOKENIZER}")`'
        )


def _find_model(source: Path | str) -> tuple[Path, bool]:
    """Folder of the model that `source` names, and True if it is a portable one, False if it is a checkpoint."""
    path = Path(source)
    if path.is_file() and path.name == WEIGHTS_FILE:
        path = path.parent
    if (path / WEIGHTS_FILE).is_file() and (path / CONFIG_FILE).is_file():
        return path, True
    # A name in a folder that is here is a mistyped run, not a model on the hub.
    if isinstance(source, str) and HUB_ID.fullmatch(source) and not path.exists() and not path.parent.is_dir():
        return download(source, (CONFIG_FILE, WEIGHTS_FILE, TOKENIZER), {}), True
    return find_checkpoint(path), False


def load_for_export(path: Path | str, precision: str = "auto") -> TrainedModel:
    """Load a trained model on the CPU. Says so if the head of its task is left out.

    Arguments as in `load_model`.
    """
    model = load_model(path, "cpu", precision)
    source, exported = _find_model(path)
    if not exported and (task := read_state(source).get("task")):
        log.info("%s: the network without the head of the task %s", path, task["name"])
    return model


def export(path: Path, out: Path) -> None:
    """Write one portable folder: model.safetensors, config.json (the model's) and tokenizer.json.

    The weights are the averaged ones if the run kept them. RunError if `out` holds files or `path` has no good
    checkpoint.
    """
    with new_folder(out) as folder:
        model, tokenizer = load_for_export(path)
        write_model(model, folder)
        tokenizer.save(folder / TOKENIZER)
