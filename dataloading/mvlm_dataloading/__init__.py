"""Data sets of image-text pairs: building shards, and loading them with DALI."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .batch import Batch as Batch
    from .batch import Masks as Masks
    from .build.build import build_part as build_part
    from .build.build import build_shards as build_shards
    from .build.build import merge_parts as merge_parts
    from .build.easy_vqa import build_easy_vqa as build_easy_vqa
    from .build.emoji import build_emoji as build_emoji
    from .build.shard_writer import ShardWriter as ShardWriter
    from .build.twemoji import build_twemoji as build_twemoji
    from .dataset.dataset import Dataset as Dataset
    from .dataset.open import open_dataset as open_dataset
    from .errors import DataError as DataError
    from .loader.augment import Augment as Augment
    from .loader.loader import Loader as Loader
    from .loader.masking import draw_patch_masks as draw_patch_masks
    from .loader.masking import draw_token_masks as draw_token_masks
    from .options import BuildOptions as BuildOptions
    from .options import ViewOptions as ViewOptions
    from .scenes.build import build_scenes as build_scenes
    from .tokenizer import Tokenizer as Tokenizer
    from .tokenizer import load_tokenizer as load_tokenizer
    from .tokenizer import tokenizer_for as tokenizer_for
    from .tokenizer import train_tokenizer as train_tokenizer
    from .tools.check import check_shards as check_shards
    from .tools.reindex import rebuild_indices as rebuild_indices
    from .tools.view import make_view as make_view

# Imported on first use, so that processes that write shards start without torch, which takes seconds to load.
_MODULES = {
    "batch": ("Batch", "Masks"),
    "build.build": ("build_part", "build_shards", "merge_parts"),
    "build.easy_vqa": ("build_easy_vqa",),
    "build.emoji": ("build_emoji",),
    "build.shard_writer": ("ShardWriter",),
    "build.twemoji": ("build_twemoji",),
    "dataset.dataset": ("Dataset",),
    "dataset.open": ("open_dataset",),
    "errors": ("DataError",),
    "loader.augment": ("Augment",),
    "loader.loader": ("Loader",),
    "loader.masking": ("draw_patch_masks", "draw_token_masks"),
    "options": ("ViewOptions", "BuildOptions"),
    "scenes.build": ("build_scenes",),
    "tokenizer": ("Tokenizer", "load_tokenizer", "tokenizer_for", "train_tokenizer"),
    "tools.check": ("check_shards",),
    "tools.reindex": ("rebuild_indices",),
    "tools.view": ("make_view",),
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(_HOME)
