"""Search for the largest batch whose step fits on a GPU."""

from collections.abc import Callable
from typing import Any

import torch

from mvlm.model.maskvlm import MaskVLM
from mvlm_benchmarks.captions import caption_lengths
from mvlm_benchmarks.step.contenders import Contender, make_inputs
from mvlm_benchmarks.step.timing import time_step
from mvlm_benchmarks.unavailable import one_line

Row = dict[str, Any]


def find_largest_batches(rows: list[Row], ready: list[Contender], model: MaskVLM, batch: int) -> None:
    """Add `largest_batch` to each row of results: the largest batch whose step fits on this GPU."""
    length, device = model.config.text_length, model.log_scale.device
    for row, contender in zip(rows, ready, strict=True):
        if "seconds" not in row:  # it failed at this batch
            continue
        for other in ready:  # their moments take memory; a contender's own come back with its next step
            if other.optimizer is not None and other.optimizer is not contender.optimizer:
                other.optimizer.state.clear()

        def fits(number: int, row: Row = row, contender: Contender = contender) -> bool:
            try:
                time_step(contender, make_inputs(model, caption_lengths(number, length, length / 3), device))
            except torch.OutOfMemoryError:
                if contender.optimizer is not None:  # perhaps it had made the moments of some parameters
                    contender.optimizer.state.clear()
                return False
            except RuntimeError as error:  # another limit, such as the grid's size or a 32-bit index
                row["note"] = f"a batch of {number} ends with {one_line(error)}"
                return False
            finally:
                contender.module.zero_grad(set_to_none=True)
                torch.cuda.empty_cache()
            return True

        try:
            row["largest_batch"] = largest_that_fits(fits, batch)
        except RuntimeError as error:  # the GPU cannot be used any more, so keep the figures and stop
            row["note"] = f"the largest batch was not found: {one_line(error)}"
            return


def largest_that_fits(fits: Callable[[int], bool], start: int) -> int:
    """Find the largest batch that fits, to within an eighth. 0 if `start` does not fit.

    Doubles from `start`, then bisects.
    """
    if not fits(start):
        return 0
    low = start
    while fits(2 * low):
        low *= 2
    high = 2 * low
    while high - low > max(1, low // 8):
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
