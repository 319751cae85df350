"""Load a trained model from a run, a checkpoint, an exported folder or the hub."""

import logging
import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mvlm.config.json_files import read_config, read_model_config
from mvlm.config.model import MaskVLMConfig
from mvlm.device import choose_device
from mvlm.errors import ConfigError, RunError, shown
from mvlm.files import check_finite, copy_into, load_weights, read_shapes
from mvlm.inference.trained_model import TrainedModel
from mvlm.model.adaptation import add_adapters, merge_adapters, unmerged
from mvlm.model.maskvlm import MaskVLM
from mvlm.model.pretrained import CONFIG_FILE, HUB_ID, TOKENIZER_FILE, WEIGHTS_FILE, check_sizes, download
from mvlm.runs.checkpoint import EMA, MANIFEST, MODEL, MODEL_CONFIG, read_folder_shapes, read_state, read_tensors
from mvlm.runs.folder import find_checkpoint, find_run, log_unfinished
from mvlm.untrusted import run_errors
from mvlm.weights.resize import resized_model, resized_tensors
from mvlm_dataloading import DataError, Dataset, Tokenizer, load_tokenizer, open_dataset
from mvlm_dataloading.files import sha256
from mvlm_dataloading.untrusted import resolve_inside
from mvlm_dataloading.urls import is_remote

log = logging.getLogger(__name__)


def load_without_head(
    path: Path | str,
    device: torch.device | str = "auto",
    precision: str = "auto",
    image_size: int | None = None,
    text_length: int | None = None,
) -> TrainedModel:
    """Load a trained model and its tokenizer, as `mvlm.load_model` does, without the head of a fine-tuned run."""
    return read_network(*find_model(path), path, device, precision, image_size, text_length)


def read_network(
    folder: Path,
    exported: bool,
    path: Path | str,
    device: torch.device | str,
    precision: str,
    image_size: int | None,
    text_length: int | None,
) -> TrainedModel:
    """Load the network in a folder that `find_model` found, and its tokenizer, without the head of a task.

    Args:
        folder: an exported folder if `exported`, else a checkpoint.
        path: the place that the user named, for messages.
        device, precision, image_size, text_length: as for `mvlm.load_model`.
    """
    chosen = device if isinstance(device, torch.device) else choose_device(device)
    if not exported:
        log_unfinished(Path(path), folder)
    config, tokenizer = read_architecture(folder, CONFIG_FILE if exported else MODEL_CONFIG)
    if exported:
        weights, prefix = folder / WEIGHTS_FILE, ""
    else:
        # A fine-tuned run keeps the network as the part `model` of its task.
        weights = folder / (EMA if (folder / EMA).is_dir() else MODEL)
        prefix = "model." if read_state(folder).get("task") else ""
    if exported:
        check_sizes(config, read_shapes(weights), folder / CONFIG_FILE, weights)
        network = MaskVLM(config)
        load_weights(network, weights)
    else:
        network = network_of(folder, config, weights, prefix)
        read_weights(network, folder, prefix)
        check_finite(network.state_dict(), weights)
    warn_without_itm(network, path)
    network = resized_model(network, image_size, text_length, trained=True)
    return TrainedModel(network.to(chosen), tokenizer, precision, folder)


def network_of(folder: Path, config: MaskVLMConfig, weights: Path, prefix: str) -> MaskVLM:
    """Build a network into which the weights of a checkpoint fit.

    A checkpoint with LoRA adapters may lack the frozen weights; they are then loaded from the model that the run
    started from. RunError if the configuration does not fit the weights, or if that model is missing or has changed.

    Args:
        weights: folder of the checkpoint's tensors.
        prefix: beginning of the names of the network's tensors there.
    """
    adapters = read_state(folder).get("adapters")
    start = adapters["start"] if adapters else None
    if start is None:
        shapes = read_folder_shapes(weights, prefix)
        check_sizes(config, unmerged(shapes), folder / MODEL_CONFIG, weights)
        return MaskVLM(config)
    try:
        check_start(identify(start["path"]), {"adapters": adapters}, folder)
    except RunError as error:
        raise RunError(
            f"{folder}: wanted the model that its adapters belong to at {start['path']} ({error}); put that back"
        ) from None
    trained, network = load_without_head(start["path"], "cpu").network, MaskVLM(config)
    copy_into(network.state_dict(), resized_tensors(trained, network), Path(start["path"]))
    return network


def read_weights(module: nn.Module, folder: Path, prefix: str = "") -> None:
    """Read the weights of a checkpoint, averaged ones if it has them, into a network or a task. Adapters are merged.

    Only tensors whose name begins with `prefix` are read; the module has their names without it.
    """
    adapters = read_state(folder).get("adapters")
    if adapters is not None:
        add_adapters(module, read_folder_shapes(folder / MODEL, prefix), adapters["alpha"])
    wanted, parts = module.state_dict(), {MODEL: module.state_dict()}
    if (folder / EMA).is_dir():
        averages = {name: p.detach() for name, p in module.named_parameters()}
        # Buffers have no averages, tied weights one of one name.
        parts = ({} if averages.keys() == wanted.keys() else parts) | {EMA: averages}
    for part, tensors in parts.items():
        if adapters is not None:  # what the run froze is not there
            found = read_folder_shapes(folder / part, prefix)
            tensors = {name: tensor for name, tensor in tensors.items() if name in found}
        read_tensors(folder / part, tensors, prefix)
    merge_adapters(module)


@torch.no_grad()
def mix_with_start(network: MaskVLM, source: Path, mix: float) -> None:
    """Interpolate a run's weights with those of the trained model that it started from (WiSE-FT), in place.

    They become (1 - mix) x the initial ones + mix x the run's own.

    Args:
        source: the run, or one of its checkpoints.

    ConfigError if the run started from no trained model, or if `mix` is outside of [0, 1].
    """
    if not 0 <= mix <= 1:
        raise ConfigError(f"mix: wanted a number in [0, 1], got {mix}")
    run = find_run(source)
    config = {} if run is None else read_config(run.config)
    start = None if config.get("random_weights") else config.get("initial_model") or config.get("checkpoint")
    if start is None:
        raise ConfigError(
            f"mix: wanted a run that started from a trained model (--initial-model, or --checkpoint of mvlm finetune), "
            f"got {source}; leave --mix out"
        )
    before = resized_tensors(load_without_head(Path(start), network.log_scale.device).network, network)
    mixed = {name: (1 - mix) * before[name] + mix * tensor for name, tensor in network.state_dict().items()}
    copy_into(network.state_dict(), mixed, source)


def identify(source: Path | str) -> dict[str, str]:
    """Absolute path and hash of the weights of a trained model. `source` and errors as for `mvlm.load_model`."""
    folder, exported = find_model(source)
    return {"path": str(folder.resolve()), "sha256": sha256(folder / (WEIGHTS_FILE if exported else MANIFEST))}


def check_start(start: dict[str, str], state: dict[str, Any], checkpoint: Path) -> None:
    """Raise RunError unless a run's initial model has the hash of the one that its checkpoint was trained from.

    Args:
        start: path and hash of the initial model, from `identify`.
        state: content of the checkpoint's state.json.
    """
    if start["sha256"] != state["adapters"]["start"]["sha256"]:
        raise RunError(f"{start['path']}: wanted the model that {checkpoint} started from, found another; restore it")


def open_named_data(file: Path, place: Any, split: str, fingerprint: Any) -> Dataset:
    """Open a split of the data set that a file of a run names. A run may come from others, and name any folder.

    Args:
        file: the file, for errors.
        place: folder that it names.
        fingerprint: of the split, as the file states it.

    RunError if the place is a URL, or holds other data. DataError if it is not there.
    """
    advice = "name the data with --data"
    if is_remote(str(place)):
        raise RunError(f"{file}: wanted data on this machine, found a URL; {advice}")
    dataset = open_dataset(Path(str(place)), split)
    if dataset.fingerprint != fingerprint:
        raise RunError(f"{file}: wanted the data that it was made with at {place}, found others; {advice}")
    return dataset


def warn_without_itm(network: MaskVLM, path: Path | str) -> None:
    """Log a warning if the network was trained without ITM."""
    if not network.matching_is_trained:
        log.warning("%s: trained without ITM, so its matches and re-rankings mean nothing", path)


def read_architecture(folder: Path, file: str = MODEL_CONFIG) -> tuple[MaskVLMConfig, Tokenizer]:
    """Read the configuration of a model and its tokenizer, which fit each other, and not its weights.

    Args:
        folder: a verified checkpoint, or an exported folder.
        file: name of the configuration in it.

    Raises:
        RunError: one of the files is missing or damaged, or the tokenizer has other tokens than the model.
    """
    config, tokenizer = read_model_config(folder / file), _read_tokenizer(folder)
    wrong = ""
    if tokenizer.vocab_size > config.vocab_size:
        wrong = f"of vocab_size {config.vocab_size} in {file}, found the token {tokenizer.vocab_size - 1}"
    elif tokenizer.mask_id != config.mask_token_id:
        wrong = f"of mask_token_id {config.mask_token_id} in {file}, found [MASK] as token {tokenizer.mask_id}"
    if wrong:
        raise RunError(f"{folder / TOKENIZER_FILE}: wanted the tokenizer of the model, {wrong}; restore the model's")
    return config, tokenizer


def read_architecture_of(path: Path | str) -> tuple[MaskVLMConfig, Tokenizer]:
    """Configuration and tokenizer of a trained model, whose weights are not read; `path` as in `mvlm.load_model`.

    RunError if there is no such model, or its configuration or its tokenizer is damaged.
    """
    folder, exported = find_model(path)
    return read_architecture(folder, CONFIG_FILE if exported else MODEL_CONFIG)


def _read_tokenizer(folder: Path) -> Tokenizer:
    """Read the tokenizer beside a model. RunError if there is none, as where `MaskVLM.save_pretrained` wrote alone."""
    if not (folder / TOKENIZER_FILE).exists():
        raise RunError(
            f"{folder}: wanted a {TOKENIZER_FILE} beside the weights, found none; write the one that the model was "
            f'trained with: `tokenizer.save(folder / "{TOKENIZER_FILE}")`'
        )
    try:
        return load_tokenizer(folder / TOKENIZER_FILE)
    except DataError as error:
        raise RunError(str(error)) from None


def find_model(source: Path | str) -> tuple[Path, bool]:
    """Folder of a trained model, and True if it is an exported folder, False if it is a checkpoint.

    source: a run, one of its checkpoints, an exported folder or a file in it, or an id on the Hugging Face hub.
    """
    if not isinstance(source, str | os.PathLike):
        raise ConfigError(f"path: wanted a path or an id of the hub as a text, got {shown(source)}")
    path = Path(source)
    if path.is_file() and path.name == WEIGHTS_FILE:
        path = path.parent
    if (path / WEIGHTS_FILE).exists() and (path / CONFIG_FILE).exists():
        with run_errors():
            for name in (WEIGHTS_FILE, CONFIG_FILE, TOKENIZER_FILE):
                resolve_inside(path / name, path)
        return path, True
    # A name in a folder that is here is a mistyped run, not a model on the hub.
    if isinstance(source, str) and HUB_ID.fullmatch(source) and not path.exists() and not path.parent.is_dir():
        return download(source, (CONFIG_FILE, WEIGHTS_FILE, TOKENIZER_FILE), {}), True
    return find_checkpoint(path), False
