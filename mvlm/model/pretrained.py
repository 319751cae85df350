"""Models as portable folders of config.json and model.safetensors, on this machine or on the Hugging Face hub.

Only the hub needs huggingface_hub; folders work without it. Nothing is pickled or unpickled.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from mvlm.config.json_files import read_model_config
from mvlm.errors import ConfigError, RunError
from mvlm.files import load_weights, read_shapes, write_safetensors
from mvlm.model.shapes import check_sizes
from mvlm_dataloading.files import write_json

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
        return [Path(hf_hub_download(hub_id, name, **options)).parent for name in names][-1]
    except Exception as error:  # the network's, the hub's and the cache's own, which share no type
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        raise RunError(
            f"{hub_id}: wanted a local folder or a model on the hub, found neither ({reason}); check the name and the "
            f"network"
        ) from error
