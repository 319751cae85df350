"""Comparison of a saved loader state with the loader that resumes from it.

All randomness is a function of (seed, epoch, sample id), so seed and position in the sample order are enough to resume
on any number of ranks. DALI's own checkpoints are not needed, because its graph draws no random numbers.
"""

import contextlib
import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from mvlm_dataloading.errors import DataError
from mvlm_dataloading.masking import Masking

from .lanes import Lanes
from .segment import ReaderConfig

ORDERS = (1, 2)
"""Sample orders that a state may have: that of `mvlm_dataloading.loader.sampler`, and that of `lanes` beside it."""
_NEEDED = ("seed", "epoch", "position", "step", "fingerprint", "skipped", "met")


@dataclass(frozen=True, slots=True)
class ResumeReport:
    """Comparison of a resumed loader with an uninterrupted run of the loader that saved the state."""

    exact_pixels: bool
    """True if images equal those of an uninterrupted run, pixel for pixel."""
    exact_text: bool
    """True if captions, tokens and masks equal those of an uninterrupted run."""
    changed: tuple[str, ...]
    """Differences from the state, as text."""
    same_data: bool = True
    """True if the data are those of the state. Samples and their order then equal those of an uninterrupted run."""

    def __str__(self) -> str:
        kept = {
            (True, True): "same pixels, captions and masks",
            (True, False): "same pixels; captions or masks differ",
            (False, True): "same captions and masks; pixels differ",
            (False, False): "pixels and captions or masks differ",
        }[self.exact_pixels, self.exact_text]
        why = f" ({'; '.join(self.changed)})" if self.changed else ""
        if not self.same_data:
            return f"samples, pixels and captions differ{why}"
        return f"same samples in the same order, {kept}{why}"


def pixel_hash(config: ReaderConfig) -> str:
    """Hash of all settings of a loader that pixels depend on. Sample, seed and epoch are not part of it."""
    geometry, augment = asdict(config.geometry), config.augment
    if config.geometry.strip == 1:
        del geometry["strip"]  # states from before strips have the same hash
    return settings_hash(
        {
            "geometry": geometry,
            # By the names that states have had, with that of colour jitter, which is gone. The geometry has the rest.
            "augment": {name: getattr(augment, name) for name in ("flip", "operations", "magnitude")} | {"jitter": 0.0},
            "train": config.train,
            "decoding": config.decoding,
            "on_gpu": config.device_id is not None,
            **({} if config.images is None else {"of": "images"}),  # draws are of images, not of samples
        }
    )


def text_hash(tokenizer: str, length: int, masking: Masking, image_size: int, shared: bool) -> str:
    """Hash of all settings that captions, tokens and masks depend on. Sample, seed and epoch are not part of it.

    Args:
        tokenizer: its fingerprint.
        length: most tokens of a caption.
        shared: True if each image and caption of a batch comes once, so that masks are drawn for these, not for
            samples.
    """
    values = asdict(masking)
    ratio, patches = values.pop("text_mask_ratio"), {"image_size": image_size, "ratio": values.pop("image_mask_ratio")}
    patches |= {name: values.pop(name) for name in ("patch_size", "mask_block")}
    # At its default a newer setting is left out: the hash is then that of states from before it existed.
    defaults = {field.name: field.default for field in fields(masking)} | {"shared": False}
    newer = {name: value for name, value in (values | {"shared": shared}).items() if value != defaults[name]}
    if "whole_word_masking" in newer:  # the name that states have had
        newer["whole words"] = newer.pop("whole_word_masking")
    return settings_hash(
        {
            "tokenizer": tokenizer,
            "length": length,
            "ratio": "uniform" if ratio is None else ratio,
            "patches": patches,
            **newer,
        }
    )


def settings_hash(values: dict[str, Any]) -> str:
    """Short hash, 16 hexadecimal digits, of a dictionary of JSON values; equal for any order of its keys."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def package_versions() -> dict[str, str]:
    """Versions of the installed packages that pixels or tokens may depend on."""
    found = {}
    for name in (
        "torch",
        *(f"nvidia-dali-cuda{n}" for n in (130, 120)),
        *(f"nvidia-nvimgcodec-cu{n}" for n in (13, 12)),
    ):
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def lanes_of(state: dict[str, Any]) -> Lanes | None:
    """Lanes that a saved loader state of sample order 2 has; None for a state of order 1.

    DataError if they are not three integers above 0.
    """
    if state.get("order", 1) == 1:
        return None
    lanes = state.get("lanes")
    if not isinstance(lanes, list) or len(lanes) != 3 or not all(type(n) is int and 0 < n < 1 << 31 for n in lanes):
        raise DataError(f"state of a loader: wanted three numbers above 0 as its lanes, found {lanes}; use another one")
    return Lanes(*lanes)


def compare_states(state: dict[str, Any], now: dict[str, Any], *, folder: Any, other_data: bool) -> ResumeReport:
    """Compare a saved state with the state `now` of the loader that resumes from it.

    Raises:
        DataError: `state` is not a loader's state, has another sample order, or, unless `other_data`, other data.
    """
    missing = [name for name in _NEEDED if name not in state]
    if missing:
        raise DataError(f"{folder}: wanted the state of a loader, found one without {', '.join(missing)}")
    if state.get("order", 1) not in ORDERS:
        raise DataError(
            f"{folder}: wanted a state with sample order version 1 or 2, found {state['order']}; finish the run with "
            "the mvlm version that started it"
        )
    before, together = (one.get("per_image", 1) for one in (state, now))
    if before != together:
        raise DataError(
            f"{folder}: wanted a state of the same order, with {together} samples of an image together, found "
            f"{before}; resume with the run's own settings"
        )
    changed = []
    same_data = state["fingerprint"] == now["fingerprint"]
    if not same_data:
        if not other_data:
            raise DataError(
                f"{folder}: wanted the data of the state, fingerprint {state['fingerprint']}, "
                f"found {now['fingerprint']}; resume with that data or start a new run"
            )
        changed.append(f"the data, from fingerprint {state['fingerprint']} to {now['fingerprint']}")
    for name, words in (("batch_size", "batch size"), ("world_size", "number of ranks")):
        if state.get(name, now[name]) != now[name]:
            changed.append(f"the {words}, from {state[name]} to {now[name]}, which changes no sample")
    same = {name: state.get(name, now[name]) == now[name] for name in ("pictures", "text", "versions")}
    if not same["pictures"]:
        changed.append("crops or augmentations")
    if not same["text"]:
        changed.append("tokenizer, text length or masks")
    if not same["versions"]:
        changed.append("the version of torch, DALI or its decoders")
    return ResumeReport(
        exact_pixels=same_data and same["pictures"] and same["versions"],
        exact_text=same_data and same["text"],
        changed=tuple(changed),
        same_data=same_data,
    )


def merge_states(states: Sequence[dict[str, Any]], samples: int) -> dict[str, Any]:
    """Merge the states of all ranks after the same step into one, from which any number of ranks can continue.

    Each rank knows the undecodable images of its own batches only. The merged state has those of all ranks, and the
    number of samples among which they were found.

    Args:
        states: state of each rank, by rank, as `Loader.state_dict` returns it.
        samples: number of samples of the data set.
    """
    first = states[0]
    skipped = sorted(set().union(*(state["skipped"] for state in states)))
    return first | {"skipped": skipped, "met": first["epoch"] * samples + first["position"]}
