"""Walks over other libraries' models: one row a case, compared by output and by the gradient of every parameter."""

import csv
import signal
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

OUTPUT_TOLERANCE, GRADIENT_TOLERANCE = 1e-4, 1e-3
"""Largest difference of equal models in float32, relative to the largest value of a tensor."""


class TooSlow(BaseException):
    """A case used more processor time than it may. No Exception, so that a case does not take it for one of its own."""


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Raise TooSlow when the block has used ``seconds`` of processor time. For the main thread."""

    def ring(*_: object) -> None:
        raise TooSlow(f"took more than {seconds:g} s of processor time")

    before = signal.signal(signal.SIGPROF, ring)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def tensors_in(value: Any, path: str = "") -> dict[str, Tensor]:
    """Floating tensors inside a model's output, by path. Caches and returned probabilities are left out."""
    if isinstance(value, Tensor):
        return {path: value} if value.is_floating_point() and value.numel() else {}
    if hasattr(value, "items"):
        pairs = [(str(key), x) for key, x in value.items()]
    elif isinstance(value, list | tuple):
        pairs = [(str(i), x) for i, x in enumerate(value)]
    else:
        return {}
    found: dict[str, Tensor] = {}
    for key, x in pairs:
        if key not in ("past_key_values", "cache") and "attentions" not in key:
            found |= tensors_in(x, f"{path}.{key}")
    return found


def outputs_and_gradients(model: nn.Module, inputs: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Outputs of a model, and gradients of its parameters for a fixed random weighting of all outputs."""
    model.zero_grad(set_to_none=True)
    torch.manual_seed(9)
    given = {name: x.clone() if isinstance(x, Tensor) else x for name, x in inputs.items()}
    outputs = tensors_in(model(**given))
    total: Any = 0
    for i, out in enumerate(outputs.values()):
        if out.requires_grad:
            weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(i)).to(out.dtype)
            total = total + (out.nan_to_num() * weights).sum() / out.numel() ** 0.5
    if isinstance(total, Tensor):
        total.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {name: x.detach() for name, x in outputs.items()}, gradients


def gap(wanted: dict[str, Tensor], got: dict[str, Tensor], *, rows: Tensor | None = None, floor: float = 1e-6) -> float:
    """Largest difference of two sets of tensors, relative to each tensor's largest value (at least ``floor``).

    rows: (batch, length), True = compare this row of (batch, length, ...) tensors. Infinite where names or shapes
    differ, NaN where the NaNs do.
    """
    if wanted.keys() != got.keys():
        return float("inf")
    worst = 0.0
    for name, x in wanted.items():
        y = got[name]
        if x.shape != y.shape:
            return float("inf")
        if rows is not None and x.dim() >= 3 and x.shape[:2] == rows.shape:
            x, y = x[rows.bool()], y[rows.bool()]
        if not torch.equal(x.isnan(), y.isnan()):
            return float("nan")
        if x.numel():
            scale = x.nan_to_num().abs().max().clamp(min=floor)
            worst = max(worst, float((x - y).nan_to_num().abs().max() / scale))
    return worst


def gradient_floor(gradients: dict[str, Tensor]) -> float:
    """1 % of the largest gradient: key biases have a gradient of exactly zero, and its rounding must not count."""
    return max([1e-6] + [1e-2 * float(x.nan_to_num().abs().max()) for x in gradients.values() if x.numel()])


def compare(model: nn.Module, reference: tuple[dict[str, Tensor], dict[str, Tensor]], inputs: dict[str, Any]) -> Any:
    """(output gap, gradient gap) of a model against outputs and gradients of another one with the same weights."""
    mask = inputs.get("attention_mask")
    rows = mask if isinstance(mask, Tensor) and mask.dim() == 2 else None
    outputs, gradients = outputs_and_gradients(model, inputs)
    return (gap(reference[0], outputs, rows=rows), gap(reference[1], gradients, floor=gradient_floor(reference[1])))


def equal(gaps: tuple[float, float]) -> bool:
    return gaps[0] < OUTPUT_TOLERANCE and gaps[1] < GRADIENT_TOLERANCE


def one_line(error: BaseException, most: int = 160) -> str:
    """Class and text of an error on one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:most]


def walk(
    path: Path,
    fields: list[str],
    cases: Iterator[tuple[str, Callable[[], list[dict[str, Any]]]]],
    *,
    seconds: float = 10,
) -> list[dict[str, str]]:
    """Write the rows of every case to a CSV file, and return the rows of the whole file.

    A case is a name and a function that makes its rows. The first field is the name. Cases that the file already has
    are not run again, so that an ended walk goes on.
    """
    with open(path, newline="") if path.exists() else open("/dev/null") as file:
        done = {row[fields[0]] for row in csv.DictReader(file)}
    is_new = not path.exists()
    with open(path, "a", newline="") as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        writer = csv.DictWriter(file, fields, lineterminator="\n")
        if is_new:
            writer.writeheader()
        for name, make in cases:
            if name in done:
                continue
            try:
                with at_most(seconds):
                    rows = make()
            except (Exception, SystemExit, TooSlow) as error:
                rows = [{"status": "not run", "note": one_line(error)}]
            writer.writerows({fields[0]: name} | row for row in rows)
            file.flush()
    with open(path, newline="") as file:
        return list(csv.DictReader(file))
