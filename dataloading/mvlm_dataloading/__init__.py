"""Image-text shards, and the DALI loader that reads them."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .augment import Augment as Augment
    from .batch import Batch as Batch
    from .batch import Masks as Masks
    from .build import build_shards as build_shards
    from .check import check_shards as check_shards
    from .dataset import Dataset as Dataset
    from .errors import DataError as DataError
    from .index import rebuild_indices as rebuild_indices
    from .loader import Loader as Loader
    from .masking import draw_patch_masks as draw_patch_masks
    from .masking import draw_token_masks as draw_token_masks
    from .opening import open_dataset as open_dataset
    from .settings import Choice as Choice
    from .settings import Settings as Settings
    from .shards import ShardWriter as ShardWriter
    from .sources.emoji import build_emoji as build_emoji
    from .tokenizer import Tokenizer as Tokenizer
    from .tokenizer import load_tokenizer as load_tokenizer
    from .tokenizer import tokenizer_for as tokenizer_for
    from .tokenizer import train_tokenizer as train_tokenizer
    from .view import make_view as make_view

# Imported on first use: the processes that write shards start without torch, which takes seconds to load.
_MODULES = {
    "augment": ("Augment",),
    "batch": ("Batch", "Masks"),
    "build": ("build_shards",),
    "check": ("check_shards",),
    "dataset": ("Dataset",),
    "errors": ("DataError",),
    "index": ("rebuild_indices",),
    "loader": ("Loader",),
    "masking": ("draw_patch_masks", "draw_token_masks"),
    "opening": ("open_dataset",),
    "settings": ("Choice", "Settings"),
    "shards": ("ShardWriter",),
    "sources.emoji": ("build_emoji",),
    "tokenizer": ("Tokenizer", "load_tokenizer", "tokenizer_for", "train_tokenizer"),
    "view": ("make_view",),
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(_HOME)
