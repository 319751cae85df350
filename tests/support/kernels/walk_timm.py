"""Walk over the models of timm that have a patch embedding: original against swapped, output and gradients.

    PYTHONPATH=tests python -m support.kernels.walk_timm --csv FILE [Model ...]

`make test-integrations` runs it. Models are built with one block where timm allows it, at most two of a kind. A row is
"equal", "kept" (nothing was swapped; the reason is in the note), "not run" (too large, or not built by rule), or a
fault: "different" or "crash". Equal rows also compare uint8 images with a mean and a std, two other image sizes,
``forward_intermediates`` and ``set_input_size``. The exit code is 1 if there is a fault.
"""

import argparse
import copy
import inspect
import logging
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from mvlm_kernels.integrations.timm import swap
from support.kernels.walks import compare, equal, gap, one_line, outputs_and_gradients, tensors_in, walk

FIELDS = ["model", "family", "patch_embed", "status", "output_gap", "gradient_gap", "uint8_gap", "other_sizes"]
FIELDS += ["intermediates", "resized", "note"]
MOST_PARAMETERS = 60e6
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def build(name: str, **options: Any) -> Any:
    """A model with one block or one block a stage, where it takes such an argument."""
    last: Exception = ValueError("no attempt")
    for size in ({"depth": 1}, {"depths": (1, 1, 1, 1)}, {"stages": (1, 1, 1, 1)}, {}):
        try:
            torch.manual_seed(0)
            return timm.create_model(name, num_classes=5, **size, **options).eval()
        except Exception as error:
            last = error
    raise last


def small(name: str) -> tuple[Any, int]:
    """A model at the smallest image side that it runs at, and the side."""
    patch = int((re.search(r"patch(\d+)", name) or ["", "16"])[1])
    last: Exception = ValueError("no attempt")
    for options in ({"img_size": 4 * patch if patch > 8 else 64}, {"img_size": 96}, {"img_size": 224}, {}):
        try:
            model = build(name, **options)
            side = options.get("img_size") or model.default_cfg["input_size"][-1]
            with torch.no_grad():
                model(torch.randn(1, 3, side, side))
            return model, side
        except Exception as error:
            last = error
    raise last


def both(first: Callable[[], Any], second: Callable[[], Any]) -> str:
    """ "equal", "both refuse", or what differs between the results of two calls."""
    results: list[dict[str, Tensor] | str] = []
    for call in (first, second):
        try:
            with torch.no_grad():
                results.append(tensors_in(call()))
        except Exception as error:
            results.append(type(error).__name__)
    wanted, got = results
    if isinstance(wanted, str) or isinstance(got, str):
        both_refuse = isinstance(wanted, str) and isinstance(got, str)
        return "both refuse" if both_refuse else f"FAULT: {str(wanted)[:40]} against {str(got)[:40]}"
    return "equal" if gap(wanted, got) < 1e-4 else "FAULT: different"


def resized(model: Any, side: int) -> Any:
    model = copy.deepcopy(model)
    model.set_input_size(img_size=2 * side)
    return model(torch.rand(1, 3, 2 * side, 2 * side, generator=torch.Generator().manual_seed(3)))


def rows_of(name: str, family: str) -> list[dict[str, Any]]:
    """The row of one model."""
    try:
        model, side = small(name)
    except Exception as error:
        return [{"family": family, "status": "not run", "note": one_line(error)}]
    row: dict[str, Any] = {"family": family, "patch_embed": type(model.patch_embed).__name__}
    other = copy.deepcopy(model)
    report = swap(other)
    if not report.swapped:
        return [row | {"status": "kept", "note": report.kept[0].reason}]
    images = torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(1))
    inputs = {next(iter(inspect.signature(model.forward).parameters)): images}
    wanted = outputs_and_gradients(model, inputs)
    try:
        gaps = compare(other, wanted, inputs)
    except Exception as error:
        return [row | {"status": "crash", "note": one_line(error)}]
    pixels = (images * 255).byte()
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    normalising = copy.deepcopy(model)
    swap(normalising, mean=MEAN, std=STD)
    with torch.no_grad():
        uint8 = gap(tensors_in(model((pixels / 255 - mean) / std)), tensors_in(normalising(pixels)))
    sizes = [
        both(lambda x=x: model(x), lambda x=x: other(x))
        for x in (torch.rand(1, 3, n, n, generator=torch.Generator().manual_seed(2)) for n in (side + 32, side + 5))
    ]
    row |= {"output_gap": f"{gaps[0]:.1e}", "gradient_gap": f"{gaps[1]:.1e}", "uint8_gap": f"{uint8:.1e}"}
    row |= {"other_sizes": " | ".join(sizes), "intermediates": "", "resized": ""}
    if hasattr(model, "forward_intermediates"):
        calls = [lambda m=m: m.forward_intermediates(images, indices=1) for m in (model, other)]
        row["intermediates"] = both(*calls)
    if hasattr(model, "set_input_size"):
        row["resized"] = both(lambda: resized(model, side), lambda: resized(other, side))
    fine = equal(gaps) and uint8 < 1e-4 and "FAULT" not in row["other_sizes"] + row["intermediates"] + row["resized"]
    return [row | {"status": "equal" if fine else "different"}]


def cases(wanted: set[str]) -> Iterator[tuple[str, Callable[[], list[dict[str, Any]]]]]:
    """Models with a ``patch_embed``, at most two of the same class, embedding and options."""
    seen: dict[tuple[object, ...], int] = {}
    for name in timm.list_models():
        if wanted and name not in wanted:
            continue
        try:
            with torch.device("meta"):
                model = build(name)
        except Exception:
            continue
        embed: Any = getattr(model, "patch_embed", None)
        if not isinstance(embed, nn.Module) or sum(p.numel() for p in model.parameters()) > MOST_PARAMETERS:
            continue
        options = {key: x for key, x in vars(embed).items() if isinstance(x, bool | str)}
        proj = getattr(embed, "proj", None)
        kind = (
            type(model).__name__, type(embed).__name__, type(getattr(embed, "norm", None)).__name__,
            type(proj).__name__, str(getattr(proj, "kernel_size", "")), str(sorted(options.items())),
        )  # fmt: skip
        seen[kind] = seen.get(kind, 0) + 1
        if seen[kind] <= 2:
            family = type(model).__name__
            yield name, lambda name=name, family=family: rows_of(name, family)


def main() -> int:
    parser = argparse.ArgumentParser(description="Walk over the models of timm that have a patch embedding.")
    parser.add_argument("--csv", type=Path, required=True)
    parser.add_argument("models", nargs="*")
    options = parser.parse_args()
    logging.disable(logging.CRITICAL)
    torch.set_num_threads(1)
    rows = walk(options.csv, FIELDS, cases(set(options.models)), seconds=60)
    for kind in sorted({row["status"] for row in rows}):
        of = [row for row in rows if row["status"] == kind]
        print(f"{kind:10} {len(of):4} models of {len({row['family'] for row in of})} classes")
    faults = [row for row in rows if row["status"] in ("different", "crash")]
    for row in faults:
        print(f"{row['status']}: {row}")
    return int(bool(faults) or not any(row["status"] == "equal" for row in rows))


if __name__ == "__main__":
    sys.exit(main())
