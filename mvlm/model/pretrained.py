"""Models as portable folders of config.json and model.safetensors, on this machine or on the Hugging Face hub.

Only the hub needs huggingface_hub; folders work without it. Nothing is pickled or unpickled.

A model's settings may come from others, and a network of the sizes that they name may be larger than the machine. So
`check_sizes` compares them with the header of the weights first: a network then takes about the memory of its file.
"""

import re
import threading
from collections.abc import Mapping, Sequence
from math import isqrt
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Self

import torch

from mvlm.config.json_files import read_model_config
from mvlm.config.model import MaskVLMConfig
from mvlm.errors import ConfigError, RunError
from mvlm.files import check_fit, load_weights, read_shapes, write_safetensors
from mvlm.model.network import MaskVLMNetwork
from mvlm.model.towers.text import tower_layers
from mvlm_dataloading.files import write_json
from mvlm_dataloading.urls import shown

if TYPE_CHECKING:
    from huggingface_hub import PyTorchModelHubMixin as Base
else:
    try:
        from huggingface_hub import PyTorchModelHubMixin as Base
    except ImportError:

        class Base:
            """Stand-in for huggingface_hub's mixin, which saves to local folders only."""

            def __init_subclass__(cls, **_: Any) -> None:
                super().__init_subclass__()

            def save_pretrained(self, save_directory: str | Path) -> None:
                Path(save_directory).mkdir(parents=True, exist_ok=True)
                self._save_pretrained(Path(save_directory))


CONFIG_FILE, WEIGHTS_FILE, TOKENIZER_FILE = "config.json", "model.safetensors", "tokenizer.json"
ANSWER_S = 4.0
"""Seconds that the hub has to answer a request."""
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*", re.ASCII)
"""Form of a model's id on the hub: owner/name."""


class HubMixin(Base, library_name="mvlm", tags=["masked-vision-and-language"]):
    """`from_pretrained` and `save_pretrained` (and `push_to_hub`, from huggingface_hub) for MaskVLM."""

    def _save_pretrained(self, save_directory: Path) -> None:
        """Write the two files. huggingface_hub's `save_pretrained` calls this and adds a model card."""
        write_model(self, save_directory)

    @classmethod
    def from_pretrained(  # pyright: ignore[reportIncompatibleMethodOverride]
        cls,
        source: str | Path,
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        force_download: bool = False,
    ) -> Self:
        """Load a model from a folder that `save_pretrained` wrote, or from the hub, in evaluation mode on the CPU.

        Args:
            source: a folder, or an id owner/name on the hub. A folder that exists is never looked up on the hub.
            revision, token, cache_dir, local_files_only, force_download: for `huggingface_hub.hf_hub_download`.

        Raises:
            RunError: there is no such model, or its files do not fit each other, or its weights are not finite.
            ConfigError: the hub is needed and huggingface_hub is not installed.
        """
        folder = Path(source)
        if not folder.is_dir():
            if not HUB_ID.fullmatch(str(source)):
                raise RunError(
                    f"{source}: wanted an existing model folder or a hub id owner/name, found neither; check the path"
                )
            options = {"revision": revision, "token": token, "cache_dir": cache_dir}
            options |= {"local_files_only": local_files_only, "force_download": force_download}
            folder = download(str(source), (CONFIG_FILE, WEIGHTS_FILE), options)
        for name in (CONFIG_FILE, WEIGHTS_FILE):
            if not (folder / name).is_file():
                raise RunError(
                    f"{folder / name}: wanted the file, found none; "
                    f"save_pretrained writes {CONFIG_FILE} and {WEIGHTS_FILE}"
                )
        config = read_model_config(folder / CONFIG_FILE)
        check_sizes(config, read_shapes(folder / WEIGHTS_FILE), folder / CONFIG_FILE, folder / WEIGHTS_FILE)
        make: Any = cls
        model = make(config)
        load_weights(model, folder / WEIGHTS_FILE)
        return model.eval()


def write_model(model: Any, folder: Path) -> None:
    """Write a MaskVLM's weights and configuration, the two files that `from_pretrained` reads."""
    write_safetensors(folder / WEIGHTS_FILE, model.state_dict())
    write_json(folder / CONFIG_FILE, model.config.to_dict())


def download(hub_id: str, names: Sequence[str], options: dict[str, Any]) -> Path:
    """Download files of a model from the hub. Returns their folder in the hub's cache.

    Args:
        options: for `huggingface_hub.hf_hub_download`.

    Raises:
        RunError: there is no such model, or one of the files is missing.
        ConfigError: huggingface_hub is not installed.
    """
    try:
        from huggingface_hub import hf_hub_download
    except ImportError:
        raise ConfigError(
            f"{hub_id}: wanted the package huggingface_hub, which is not installed; pip install 'mvlm[train]'"
        ) from None
    try:
        if not options.get("local_files_only") and not all(is_cached(hub_id, name, options) for name in names):
            ask_hub()
        return [Path(hf_hub_download(hub_id, name, **options)).parent for name in names][-1]
    except Exception as error:  # the network's, the hub's and the cache's own, which share no type
        reason = f"{type(error).__name__}: {shown(error)}"
        raise RunError(
            f"{hub_id}: wanted a local folder or a model on the hub, found neither ({reason}); check the name and the "
            f"network"
        ) from error


def is_cached(hub_id: str, name: str, options: Mapping[str, Any] = MappingProxyType({})) -> bool:
    """True if the hub's cache has a file of a model, which then needs no network."""
    from huggingface_hub import try_to_load_from_cache

    found = {key: value for key, value in options.items() if key in ("cache_dir", "revision")}
    return isinstance(try_to_load_from_cache(hub_id, name, **found), str)


def ask_hub() -> None:
    """Raise the network's error if the hub does not answer one request within `ANSWER_S`.

    The hub's client tries six times for each file that is not cached, for 20 seconds or more, and logs all of them.
    """
    from huggingface_hub import constants, get_session

    failed: list[Exception] = [TimeoutError(f"{constants.ENDPOINT} did not answer in {ANSWER_S:g} s")]

    def ask() -> None:
        try:
            get_session().head(constants.ENDPOINT, timeout=ANSWER_S)
            failed.clear()
        except Exception as error:  # the session's own
            failed[:] = [error]

    asking = threading.Thread(target=ask, daemon=True)  # no time limit of a request holds for the look-up of its host
    asking.start()
    asking.join(ANSWER_S)
    if failed:
        raise failed[0]


Shape = tuple[int, ...]

BLOCKS = {
    "image_layers": "image_encoder",
    "text_layers": "text_encoder",
    "cross_layers": "image_cross",
    "decoder_layers": "image_decoder",
}
"""Settings of a model that count blocks -> a module that has so many."""
WORDS, TEXT, IMAGE = "text_encoder.words.weight", "text_encoder.position", "image_encoder.position"
PATCHES, EMBEDDING = "image_encoder.patch_projection.weight", "image_projection.weight"


def check_sizes(config: MaskVLMConfig, header: Mapping[str, Shape], file: Path, where: Path) -> None:
    """Raise RunError unless the tensors of a file of weights have the names and shapes of this configuration's network.

    Further tensors are allowed.

    Args:
        header: names and shapes of the tensors.
        file: the file of the settings, for the error, which names settings with another size than the weights have.
        where: the file or folder of the weights, for the error.
    """
    stored = stored_sizes(header)
    given = {name: getattr(config, name) for name in stored}
    if wrong := [f"{name} {stored[name]}, got {given[name]}" for name in stored if given[name] != stored[name]]:
        raise RunError(
            f"{file}: wanted the sizes of the weights in {where.name}: {'; '.join(wrong)}; restore the file, or use "
            f"another model"
        )
    layers = {match[1] for name in header if (match := re.match(r"text_encoder\.tower\.(.*\blayers?\.\d+)\.", name))}
    try:
        if config.text_tower and tower_layers(config.text_tower) != len(layers):
            raise ConfigError(f"text_tower: wanted the {len(layers)} layers of the weights in {where.name}")
        # The file has as many blocks, so the network has no more tensors than a file of its kind. On `meta` they take
        # no memory, whatever their shapes are.
        with torch.device("meta"):
            wanted = {name: tuple(tensor.shape) for name, tensor in MaskVLMNetwork(config).state_dict().items()}
    except ConfigError as error:
        raise RunError(f"{file}: {error}; restore the file, or use another model") from None
    check_fit(wanted, {name: shape for name, shape in header.items() if name in wanted}, where)


def stored_sizes(header: Mapping[str, Shape]) -> dict[str, Any]:
    """Settings of `MaskVLMConfig` that follow from names and shapes of a model's tensors: name -> value."""
    sizes: dict[str, Any] = {}
    if len(words := header.get(WORDS, ())) == 2:
        sizes |= {"vocab_size": words[0], "width": words[1]}
    if len(text := header.get(TEXT, ())) == 2:
        sizes["text_length"] = text[0]
    if len(embedding := header.get(EMBEDDING, ())) == 2:
        sizes["itc_width"] = embedding[0]
    if len(patch := header.get(PATCHES, ())) == 2:
        sizes["patch_size"] = isqrt(patch[1] // 3)
        if len(image := header.get(IMAGE, ())) == 2 and image[0] > 1:
            sizes["image_size"] = isqrt(image[0] - 1) * sizes["patch_size"]
    numbers: dict[str, set[str]] = {}
    for name in header:
        if block := re.match(r"(\w+)\.(?:module\.)?blocks\.(\d+)\.", name):
            numbers.setdefault(block[1], set()).add(block[2])
    sizes |= {name: len(numbers[module]) for name, module in BLOCKS.items() if module in numbers}
    if EMBEDDING in header:
        sizes |= {"contrastive": "sigmoid" if "logit_bias" in header else "softmax"}
        sizes |= {"cross_norm": "pre" if "image_cross.norm.weight" in header else "post"}
    return sizes
