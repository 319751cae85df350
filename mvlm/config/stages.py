"""Stages of a run: from which step on it has images of which side, and how much of them is masked."""

import re
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import NamedTuple

from mvlm.config.model import MaskVLMConfig
from mvlm.errors import ConfigError

_FORM = re.compile(r"(\d{1,9}):(\d{1,5})(?::(0?\.\d{1,9}|1))?")


class Stage(NamedTuple):
    """Part of a run with one side of images and one share of masks."""

    start: int
    """Number of updates before its first one."""
    model: MaskVLMConfig
    """Settings of the run's model, with the side and the share of this stage."""


def parse_stages(texts: Sequence[str], model: MaskVLMConfig, end: int) -> tuple[Stage, ...]:
    """Parse stages such as ("0:96:0.75", "8000:224") of a run of `end` steps. Without texts there is one stage.

    ConfigError for another form, for steps that do not ascend from 0 to before the end, for a side that blocks of masks
    do not tile, and for a last side that is not the model's.
    """
    found = [_parse(text, model) for text in texts] or [Stage(0, model)]
    starts = [stage.start for stage in found]
    if starts[0] != 0 or any(later <= start for start, later in pairwise(starts)):
        raise ConfigError(f"stages: wanted steps that ascend from 0, got {', '.join(map(str, starts))}; correct them")
    if starts[-1] >= end:
        raise ConfigError(f"stages: wanted steps before the end of the run, {end}, got {starts[-1]}; correct it")
    if (last := found[-1].model.image_size) != model.image_size:
        raise ConfigError(
            f"stages: wanted model.image_size {model.image_size} in the last one, got {last}; give --model.image-size "
            f"{last}, or another last stage"
        )
    return tuple(found)


def _parse(text: str, model: MaskVLMConfig) -> Stage:
    match = _FORM.fullmatch(text)
    if match is None:
        raise ConfigError(f"stages: wanted STEP:SIDE or STEP:SIDE:MASKED, as in 0:96 8000:224:0.5, got {text!r}")
    side, block = int(match[2]), model.mask_block
    if side % block or not side:
        below = max(block, side // block * block)
        raise ConfigError(
            f"stages: {text}: wanted a multiple of the {block} px of a block of masks, such as {below} or "
            f"{below + block}, got {side}; take one, or a smaller --model.mask-block"
        )
    share = {} if match[3] is None else {"image_mask_ratio": float(match[3])}
    try:
        return Stage(int(match[1]), replace(model, image_size=side, **share))
    except ConfigError as error:
        raise ConfigError(f"stages: {text}: {error}") from None
