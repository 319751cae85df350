"""Loaders whose settings of masks and of work are given by name, and the samples of their batches."""

import itertools
from dataclasses import fields
from typing import Any

from mvlm_dataloading import Dataset, Loader, LoaderWork, Masking, Tokenizer


def make_loader(dataset: Dataset, tokenizer: Tokenizer, **settings: Any) -> Loader:
    """A loader; fields of `LoaderWork` and `Masking` may stand among its arguments."""
    for name, kind in (("work", LoaderWork), ("masking", Masking)):
        given = {field.name: settings.pop(field.name) for field in fields(kind) if field.name in settings}
        if given:
            settings[name] = kind(**given)
    defaults: dict[str, Any] = {"batch_size": 8, "image_size": 64, "text_length": 12, "seed": 5}
    return Loader(dataset, tokenizer, **defaults | settings)


def take(loader: Loader, count: int) -> list:
    """The next `count` pairs (batch, masks) of a loader."""
    return list(itertools.islice(loader, count))


def rows(batches) -> list[dict[str, Any]]:
    """The samples of batches one by one, independent of the batch that they came in, with all that is theirs."""
    found = []
    for batch, masks in batches:
        cuts, (images, captions) = batch.cu_seqlens.tolist(), (part.tolist() for part in batch.pairs())
        for b, sample in enumerate(batch.sample_id.tolist()):
            begin, end = cuts[captions[b]], cuts[captions[b] + 1]
            found.append({
                "sample": sample,
                "pixels": batch.images[images[b]].numpy().tobytes(),
                "tokens": batch.tokens[begin:end].tolist(),
                "patches": masks.patch_ids[images[b]].tolist(),
                "masked": [i - begin for i in masks.token_ids.tolist() if begin <= i < end],
                "ids": (int(batch.image_id[b]), int(batch.text_id[b])),
            })  # fmt: skip
    return found
