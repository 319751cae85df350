"""Where a loader is, as plain JSON: enough to go on with the very next sample, on any number of ranks.

All randomness is a function of (seed, epoch, sample id), so the position in the stream is the whole state. Nothing of
DALI's own checkpoints is needed: its graph draws no number.
"""

import hashlib
import json
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from mvlm_dataloading.errors import DataError

from .sampler import ORDER_VERSION
from .segment import Settings

_NEEDED = ("seed", "epoch", "position", "step", "fingerprint", "skipped", "met")


@dataclass(frozen=True, slots=True)
class Resumed:
    """What a loader goes on with, after `load_state_dict`."""

    exact_pixels: bool
    """Whether pictures come out pixel for pixel as in a run that was not interrupted, not just the same samples."""
    exact_text: bool
    """The same of captions, tokens and masks."""
    changed: tuple[str, ...]
    """What is no longer as the state was made with, in words."""

    def __str__(self) -> str:
        kept = {
            (True, True): "pixels, captions and masks",
            (True, False): "pixels; captions or masks differ",
            (False, True): "captions and masks; pixels differ",
            (False, False): "no more; pixels and captions or masks differ",
        }[self.exact_pixels, self.exact_text]
        why = f" ({'; '.join(self.changed)})" if self.changed else ""
        return f"the same samples in the same order, and the same {kept}{why}"


def pictures_of(settings: Settings) -> str:
    """A hash of all that a picture's pixels depend on besides its sample, seed and epoch."""
    return _hash(
        {
            "geometry": asdict(settings.geometry),
            "augment": asdict(settings.augment),
            "train": settings.train,
            "decoding": settings.decoding,
            "on_gpu": settings.device_id is not None,
        }
    )


def hash_of(values: dict[str, Any]) -> str:
    """A short hash of plain values."""
    return _hash(values)


def versions() -> dict[str, str]:
    """Of the packages that a picture's or a token's value may depend on."""
    found = {}
    for name in (
        "torch",
        "nvidia-dali-cuda130",
        "nvidia-dali-cuda120",
        "nvidia-nvimgcodec-cu13",
        "nvidia-nvimgcodec-cu12",
    ):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def compare(state: dict[str, Any], now: dict[str, Any], *, folder: Any, other_data: bool) -> Resumed:
    """What going on from `state` gives a loader whose own state is `now`.

    Raises:
        DataError: the state is none, is of another order of samples, or, unless `other_data`, of other data.
    """
    missing = [name for name in _NEEDED if name not in state]
    if missing:
        raise DataError(f"{folder}: wanted the state of a loader, found one without {', '.join(missing)}")
    if state.get("order", ORDER_VERSION) != ORDER_VERSION:
        raise DataError(
            f"{folder}: wanted a state of order {ORDER_VERSION}, found {state['order']}: this version deals samples "
            "in another order; finish the run with the version that began it"
        )
    changed = []
    if state["fingerprint"] != now["fingerprint"]:
        if not other_data:
            raise DataError(
                f"{folder}: wanted the data of the state, fingerprint {state['fingerprint']}, "
                f"found {now['fingerprint']}; resume with that data or begin a new run"
            )
        changed.append("the data")
    for name, words in (("batch_size", "batch size"), ("world_size", "number of ranks")):
        if state.get(name, now[name]) != now[name]:
            changed.append(f"the {words}, {state[name]} then and {now[name]} now, which changes no sample")
    same = {name: state.get(name, now[name]) == now[name] for name in ("pictures", "text", "versions")}
    if not same["pictures"]:
        changed.append("windows or augmentations")
    if not same["text"]:
        changed.append("tokenizer, text length or masks")
    if not same["versions"]:
        changed.append("the version of torch, DALI or its decoders")
    same_data = "the data" not in changed
    return Resumed(
        exact_pixels=same_data and same["pictures"] and same["versions"],
        exact_text=same_data and same["text"],
        changed=tuple(changed),
    )


def _hash(values: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]
