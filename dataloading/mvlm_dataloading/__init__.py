"""Data sets of image-text pairs: building shards, and loading them with DALI."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .batch import Batch as Batch
    from .batch import Masks as Masks
    from .build.build import build_part as build_part
    from .build.build import build_shards as build_shards
    from .build.build import merge_parts as merge_parts
    from .build.shard_writer import ShardWriter as ShardWriter
    from .dataset.dataset import Dataset as Dataset
    from .dataset.open import open_dataset as open_dataset
    from .errors import DataError as DataError
    from .loader.augment import Augment as Augment
    from .loader.loader import Loader as Loader
    from .loader.loader import LoaderWork as LoaderWork
    from .masking import Masking as Masking
    from .options import BuildOptions as BuildOptions
    from .options import ViewOptions as ViewOptions
    from .sources.coco import coco as from_coco  # noqa: F401
    from .sources.flickr30k import flickr30k as from_flickr30k  # noqa: F401
    from .sources.folder import folder as from_folder  # noqa: F401
    from .sources.huggingface import huggingface as from_huggingface  # noqa: F401
    from .sources.visual_genome import visual_genome as from_visual_genome  # noqa: F401
    from .sources.webdataset import cc3m as from_cc3m  # noqa: F401
    from .sources.webdataset import webdataset as from_webdataset  # noqa: F401
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
    "build.shard_writer": ("ShardWriter",),
    "dataset.dataset": ("Dataset",),
    "dataset.open": ("open_dataset",),
    "errors": ("DataError",),
    "loader.augment": ("Augment",),
    "loader.loader": ("Loader", "LoaderWork"),
    "masking": ("Masking",),
    "options": ("ViewOptions", "BuildOptions"),
    "tokenizer": ("Tokenizer", "load_tokenizer", "tokenizer_for", "train_tokenizer"),
    "tools.check": ("check_shards",),
    "tools.reindex": ("rebuild_indices",),
    "tools.view": ("make_view",),
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f".{_HOME[name]}", __name__), name)
    if name.startswith("from_") and name in (sources := _sources()):
        return sources[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _sources() -> dict[str, Any]:
    """Functions from_NAME that return a `Source`, by their names: one for each data source of `mvlm data NAME`."""
    from .sources import all_sources

    return {f"from_{name.replace('-', '_')}": function for name, function in all_sources().items()}


def __dir__() -> list[str]:
    return sorted([*_HOME, *_sources()])
