"""Comparison of replayed rows and weights with a run's: bit for bit, or within bounds on another kind of machine.

docs/evidence/speedrun.md has the measurements that the bounds come from.
"""

import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mvlm.runs.checkpoint import EMA, MODEL
from mvlm.speedrun.claims import MEASURED

FIXED = ("step", "pairs_seen", "lr", "lr_encoder", "lr_pixels", "lr_muon", "skipped", "bad_steps")
"""Fields of a row that no rounding changes."""
ROUNDED = ("loss", "mlm", "mim", "itc", "itm", "grad_norm")
"""Fields of a row that are compared within bounds. Others are fractions of a batch or parts of these."""


COUNTS = ("n_images", "n_texts", "reranked")
FIGURE = re.compile(rf"(^|_)r\d+$|^(gain|masked)_|^({'|'.join(COUNTS)})$")
"""Names of figures of an evaluation, in eval/test.json and in rows."""


@dataclass(frozen=True, slots=True)
class Bounds:
    """Largest differences between a run and its replay on another kind of machine."""

    losses: float
    """Of a loss or the gradient norm, as a fraction of it."""
    weights: float
    """Norm of the difference of all weights, as a fraction of the norm of their change since the checkpoint."""
    figures: float
    """Of a figure of an evaluation: points of recall, per cent of pixel gain, hundredths of a nat."""


BOUNDS = {"fp32": Bounds(losses=1e-2, weights=0.1, figures=2.0), "bf16": Bounds(losses=5e-2, weights=0.5, figures=2.0)}
"""Bounds by precision."""


def compare_rows(claimed: dict[str, Any], replayed: dict[str, Any], precision: str | None) -> list[str]:
    """Differences of two rows: all with precision None, those beyond the precision's bounds otherwise."""
    step, names = replayed["step"], sorted({*claimed, *replayed} - {*MEASURED})
    if precision is None:
        return [
            f"step {step}: {name} is {claimed.get(name)}, replayed {replayed.get(name)}"
            for name in names
            if claimed.get(name) != replayed.get(name)
        ]
    bounds, found = BOUNDS[precision], []
    for name in names:
        a, b = claimed.get(name), replayed.get(name)
        bound = bounds.losses if name in ROUNDED else 1e-9 if name in FIXED else None
        if bound is not None and not _near(a, b, bound):
            found.append(f"step {step}: {name} is {a}, replayed {b}")
    return found + [f"step {step}: {text}" for text in compare_figures(claimed, replayed, bounds.figures)]


def largest_difference(pairs: Iterable[tuple[dict[str, Any], dict[str, Any]]]) -> float:
    """Largest difference of a loss or the gradient norm, as a fraction, over pairs of a row and its replay."""
    found = [
        abs(a[name] - b[name]) / max(abs(a[name]), 1e-9)
        for a, b in pairs
        for name in ROUNDED
        if isinstance(a.get(name), float) and isinstance(b.get(name), float)
    ]
    return max(found, default=0.0)


def compare_figures(claimed: dict[str, Any], found: dict[str, Any], bound: float) -> list[str]:
    """Figures of evaluations that differ by more than `bound`: points of recall or per cent, hundredths of a nat or L1.

    A bound of 0 stands for equal.
    """
    ours, theirs = dict(_flat(claimed)), dict(_flat(found))
    return [
        f"{name} is {ours.get(name)}, found {theirs.get(name)}"
        for name in sorted({*ours, *theirs})
        if not _within(ours.get(name), theirs.get(name), bound * _scale(name))
    ]


def _scale(name: str) -> float:
    """Factor of the bound for a figure. Counts have to be equal."""
    if name.split(".")[-1] in COUNTS:
        return 0.0
    return 0.01 if "nats" in name or "l1" in name else 1.0


def _flat(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Figures of an evaluation or of a row, by dotted name."""
    for name, value in values.items():
        if isinstance(value, dict) and name in ("tr", "ir", "tr_95", "ir_95", "itc", "itm", "unseen"):
            yield from _flat(value, f"{prefix}{name}.")
        elif FIGURE.search(name):
            many = value if isinstance(value, list) else [value]
            yield from ((f"{prefix}{name}{f'[{i}]' * (len(many) > 1)}", x) for i, x in enumerate(many))


def _figure(value: Any) -> Any:
    """A figure as a JSON file has it: None for one that is not finite."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _within(a: Any, b: Any, bound: float) -> bool:
    a, b = _figure(a), _figure(b)
    if a is None or b is None:
        return a is b
    return isinstance(a, int | float) and isinstance(b, int | float) and abs(a - b) <= bound


def _near(a: Any, b: Any, bound: float) -> bool:
    a, b = _figure(a), _figure(b)
    if a is None or b is None:
        return a is b
    return isinstance(a, int | float) and isinstance(b, int | float) and math.isclose(a, b, rel_tol=bound, abs_tol=1e-9)


def compare_weights(
    claimed: dict[str, dict[str, Tensor]],
    replayed: dict[str, dict[str, Tensor]],
    before: dict[str, Tensor],
    precision: str | None,
) -> list[str]:
    """Differences of the tensors of two checkpoints, by part: all with precision None, else those beyond the bounds.

    Args:
        before: weights at the checkpoint that the replay began with.
    """
    if precision is None:
        return [
            f"{part}/{name} is not the replayed one"
            for part, tensors in claimed.items()
            for name, tensor in tensors.items()
            if not torch.equal(tensor.cpu(), replayed[part][name].cpu())
        ]
    bound = BOUNDS[precision].weights
    off = {part: way_off(claimed[part], replayed[part], before, replayed[MODEL]) for part in {MODEL, EMA} & {*claimed}}
    return [
        f"{part} is {share:.2g} of the way since the checkpoint off, more than {bound:g}"
        for part, share in off.items()
        if not share <= bound
    ]


def way_off(
    claimed: dict[str, Tensor], replayed: dict[str, Tensor], before: dict[str, Tensor], after: dict[str, Tensor]
) -> float:
    """Norm of the difference of all weights, as a fraction of the norm of their way from `before` to `after`."""

    def distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
        return math.sqrt(sum(float((a[name].cpu().double() - b[name].cpu().double()).square().sum()) for name in b))

    return distance(claimed, replayed) / max(distance(before, after), 1e-30)
