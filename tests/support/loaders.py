"""Loaders whose settings of masks and of work are given by name."""

from dataclasses import fields
from typing import Any

from mvlm_dataloading import Dataset, Loader, LoaderWork, Masking, Tokenizer


def make_loader(dataset: Dataset, tokenizer: Tokenizer, **settings: Any) -> Loader:
    """A loader; fields of `LoaderWork` and `Masking` may stand among its arguments."""
    for name, kind in (("work", LoaderWork), ("masking", Masking)):
        given = {field.name: settings.pop(field.name) for field in fields(kind) if field.name in settings}
        if given:
            settings[name] = kind(**given)
    return Loader(dataset, tokenizer, **settings)
