"""Walk over the models of timm that have a part to swap: original against swapped, output and gradients.

    PYTHONPATH=tests python -m support.kernels.walk_timm --csv FILE [Model ...]

`make test-integrations` runs it. Patch embeddings and blocks are swapped, and the ops are forced to torch. Models are
built with one block where timm allows it, at most two of a kind. A row is "equal", "kept" (nothing was swapped; the
reason is in the note), "not run" (too large, or not built by rule), or a fault: "different" or "crash". Equal rows also
compare uint8 images with a mean and a std, two other image sizes, ``forward_intermediates`` and ``set_input_size``.
`ops` has the calls that kernels would compute on sm_90, by op. The exit code is 1 if there is a fault.
"""

import argparse
import copy
import inspect
import logging
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from mvlm_kernels import use_backend
from mvlm_kernels.integrations.blocks import swap_blocks
from mvlm_kernels.integrations.calls import explain_swapped
from mvlm_kernels.integrations.timm import swap
from support.kernels.walks import compare, equal, gap, one_line, outputs_and_gradients, tensors_in, walk

FIELDS = ["model", "family", "patch_embed", "status", "output_gap", "gradient_gap", "uint8_gap", "other_sizes"]
FIELDS += ["intermediates", "resized", "ops", "note"]
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
                for p in model.parameters():
                    if p.ndim < 2:  # biases start with 0, norms with 1, and LayerScale with almost 0
                        p.add_(0.1 * torch.randn_like(p))
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


def uint8_gap(model: Any, images: Tensor) -> float:
    """Gap of outputs for bytes of images, between normalised pixels and a swap that normalises."""
    pixels = (images * 255).byte()
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    normalising = copy.deepcopy(model)
    swap(normalising, mean=MEAN, std=STD)
    with torch.no_grad():
        return gap(tensors_in(model((pixels / 255 - mean) / std)), tensors_in(normalising(pixels)))


def rows_of(name: str, family: str) -> list[dict[str, Any]]:
    """The row of one model."""
    try:
        model, side = small(name)
    except Exception as error:
        return [{"family": family, "status": "not run", "note": one_line(error)}]
    embed = getattr(model, "patch_embed", None)
    row: dict[str, Any] = {"family": family, "patch_embed": "" if embed is None else type(embed).__name__}
    other = copy.deepcopy(model)
    report, of_blocks = swap(other), swap_blocks(other)
    if not report.swapped and not of_blocks.swapped:
        return [row | {"status": "kept", "note": (*report.kept, *of_blocks.kept)[0].reason}]
    images = torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(1))
    with use_backend("torch"):
        row |= compared(model, other, side, images, bool(report.swapped))
    if row["status"] == "equal":
        counts = Counter(call.op for call in explain_swapped(other, images, "sm_90").fused)
        row["ops"] = ", ".join(f"{number} {op}" for op, number in sorted(counts.items()))
    return [row]


def compared(model: Any, other: Any, side: int, images: Tensor, embeds: bool) -> dict[str, Any]:
    """Status of a swapped model, and its gaps. embeds: its patch embedding is swapped."""
    inputs = {next(iter(inspect.signature(model.forward).parameters)): images}
    note = ""
    try:
        gaps = compare(other, outputs_and_gradients(model, inputs), inputs)
        if not equal(gaps):  # a max pool may choose another value after rounding
            first, second = (copy.deepcopy(m).double() for m in (model, other))
            inputs = {name: x.double() for name, x in inputs.items()}
            gaps = compare(second, outputs_and_gradients(first, inputs), inputs)
            note = "compared in float64, as float32 differs"
    except Exception as error:
        return {"status": "crash", "note": one_line(error)}
    uint8 = uint8_gap(model, images) if embeds else 0.0
    sizes = [
        both(lambda x=x: model(x), lambda x=x: other(x))
        for x in (torch.rand(1, 3, n, n, generator=torch.Generator().manual_seed(2)) for n in (side + 32, side + 5))
    ]
    row = {
        "output_gap": f"{gaps[0]:.1e}",
        "gradient_gap": f"{gaps[1]:.1e}",
        "uint8_gap": f"{uint8:.1e}" if embeds else "",
    }
    row |= {"other_sizes": " | ".join(sizes), "intermediates": "", "resized": "", "note": note}
    if hasattr(model, "forward_intermediates"):
        calls = [lambda m=m: m.forward_intermediates(images, indices=1) for m in (model, other)]
        row["intermediates"] = both(*calls)
    if hasattr(model, "set_input_size"):
        row["resized"] = both(lambda: resized(model, side), lambda: resized(other, side))
    fine = equal(gaps) and uint8 < 1e-4 and "FAULT" not in row["other_sizes"] + row["intermediates"] + row["resized"]
    return row | {"status": "equal" if fine else "different"}


def cases(wanted: set[str]) -> Iterator[tuple[str, Callable[[], list[dict[str, Any]]]]]:
    """Models with a part to swap, at most two of the same class, embedding, options, and parts of blocks."""
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
        parts = {(part.kind, part.reason or part.fused) for part in swap_blocks(model).parts}
        if not isinstance(embed, nn.Module) and not parts:
            continue
        if sum(p.numel() for p in model.parameters()) > MOST_PARAMETERS:
            continue
        options = {key: x for key, x in vars(embed).items() if isinstance(x, bool | str)} if embed is not None else {}
        proj = getattr(embed, "proj", None)
        kind = (
            type(model).__name__, type(embed).__name__, type(getattr(embed, "norm", None)).__name__,
            type(proj).__name__, str(getattr(proj, "kernel_size", "")), str(sorted(options.items())),
            str(sorted(parts)),
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
    for op in ("gather_patches", "add_layer_norm", "gelu_linear", "qk_norm_rope"):
        of = [row for row in rows if row["status"] == "equal" and re.search(rf"\b{op}\b", row["ops"])]
        print(f"{op:14} {len(of):4} models of {len({row['family'] for row in of})} classes")
    faults = [row for row in rows if row["status"] in ("different", "crash")]
    for row in faults:
        print(f"{row['status']}: {row}")
    return int(bool(faults) or not any(row["status"] == "equal" for row in rows))


if __name__ == "__main__":
    sys.exit(main())
