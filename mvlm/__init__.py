"""mvlm: fast pretraining of masked vision-and-language models (MaskVLM).

    import mvlm

    model = mvlm.load_model("runs/demo")
    model.match("cat.png", "a cat").probability

Names are imported on first use, so `import mvlm` is quick and needs only the packages of the names that are used.
`mvlm.__version__` is the version of the installed distribution.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    __version__: str
    from mvlm.config.finetune import FinetuneConfig as FinetuneConfig
    from mvlm.config.model import MaskVLMConfig as MaskVLMConfig
    from mvlm.config.pretrain import PretrainConfig as PretrainConfig
    from mvlm.errors import ConfigError as ConfigError
    from mvlm.errors import RunError as RunError
    from mvlm.inference.trained_model import TrainedModel as TrainedModel
    from mvlm.model.maskvlm import MaskVLM as MaskVLM
    from mvlm.tasks.finetune import finetune as finetune
    from mvlm.tasks.load import load_model as load_model
    from mvlm.training.run import pretrain as pretrain
    from mvlm_dataloading.errors import DataError as DataError

_MODULES = {
    "ConfigError": "mvlm.errors",
    "DataError": "mvlm_dataloading.errors",
    "FinetuneConfig": "mvlm.config.finetune",
    "MaskVLM": "mvlm.model.maskvlm",
    "MaskVLMConfig": "mvlm.config.model",
    "PretrainConfig": "mvlm.config.pretrain",
    "RunError": "mvlm.errors",
    "TrainedModel": "mvlm.inference.trained_model",
    "finetune": "mvlm.tasks.finetune",
    "load_model": "mvlm.tasks.load",
    "pretrain": "mvlm.training.run",
}
__all__ = sorted(_MODULES)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return import_module("importlib.metadata").version("mvlm")
    if name not in _MODULES:
        raise AttributeError(f"module 'mvlm' has no attribute {name!r}; it has {', '.join(__all__)}")
    try:
        return getattr(import_module(_MODULES[name]), name)
    except ModuleNotFoundError as error:
        from mvlm.errors import advise_install

        message = advise_install(error)
        if message is None:
            raise
        raise ImportError(f"mvlm.{name}: {message}") from error


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "__version__"})
