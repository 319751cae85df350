"""Walk over the model classes of transformers: eager attention against the swapped one, output and gradients.

    PYTHONPATH=tests python -m support.kernels.walk_transformers --csv FILE [Class ...]

`make test-integrations` runs it. Every class is built tiny, with random weights, and run without a mask and with right
padding at batches of 2, 1 and 12 (the length). A row is "equal", "as sdpa" (not equal, and transformers' own SDPA is
not either), "kept" (nothing was swapped; the reason is in the note), "refused" (a ValueError of ours), "not run" (no
model or no inputs by rule), or a fault: "different" or "crash". The exit code is 1 if there is a fault.
"""

import argparse
import inspect
import logging
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers

from mvlm_kernels import use_backend
from mvlm_kernels.integrations.calls import recorded_calls
from mvlm_kernels.integrations.transformers import swap
from support.kernels.tiny_transformers import exported_classes, inputs_for, sharpen, tiny_config
from support.kernels.walks import compare, equal, one_line, outputs_and_gradients, walk

FIELDS = ["class", "architecture", "case", "status", "fused_calls", "sdpa_calls", "output_gap", "gradient_gap"]
FIELDS += ["sdpa_gap", "note"]
CASES = (("no mask", False, 2), ("padded", True, 2), ("padded, batch 1", True, 1), ("padded, batch 12", True, 12))
MOST_PARAMETERS = 40e6


def rows_of(model_class: Any) -> list[dict[str, Any]]:
    """Rows of one class."""
    shared = {"architecture": model_class.__module__.split(".")[2]}
    if "chunk_scan" in inspect.getsource(sys.modules[model_class.__module__]):
        return [shared | {"status": "not run", "note": "state-space layers, whose plain code takes minutes"}]

    def build(implementation: str | None) -> Any:
        torch.manual_seed(1)
        extra = {} if implementation is None else {"attn_implementation": implementation}
        return model_class._from_config(tiny_config(model_class.config_class), **extra).eval()

    try:
        with torch.device("meta"):
            parameters = sum(p.numel() for p in build("eager").parameters())
        if parameters > MOST_PARAMETERS:
            return [shared | {"status": "not run", "note": f"{parameters} parameters"}]
        reference = build("eager")
        sharpen(reference)
        plain, swapped = build(None), build(None)
        for other in (plain, swapped):
            other.load_state_dict(reference.state_dict())
    except Exception as error:
        return [shared | {"status": "not run", "note": one_line(error)}]
    report = swap(swapped)
    if not report.swapped:
        return [shared | {"status": "kept", "note": report.kept[0].reason}]
    rows = []
    for case, padded, batch in CASES:
        wanted = inputs = error = None
        for candidate in inputs_for(reference, padded=padded, batch=batch):
            try:
                wanted, inputs = outputs_and_gradients(reference, candidate), candidate
                break
            except Exception as found:
                error = error or found
        if wanted is None or inputs is None or not wanted[0]:
            rows.append(
                shared | {"case": case, "status": "not run", "note": one_line(error or ValueError("no output"))}
            )
            continue
        if padded and not any("mask" in name for name in inputs):
            break
        try:
            sdpa = compare(plain, wanted, inputs)
            sdpa_gap, sdpa_equal = f"{max(sdpa):.1e}", equal(sdpa)
        except Exception as found:
            sdpa_gap, sdpa_equal = one_line(found, 60), False
        row: dict[str, Any] = shared | {"case": case, "sdpa_gap": sdpa_gap, "note": "+".join(inputs)}
        with use_backend("torch"), recorded_calls() as calls:
            try:
                gaps = compare(swapped, wanted, inputs)
                status = "equal" if equal(gaps) else "different" if sdpa_equal else "as sdpa"
                row |= {"status": status, "output_gap": f"{gaps[0]:.1e}", "gradient_gap": f"{gaps[1]:.1e}"}
            except Exception as found:
                refused = isinstance(found, ValueError) and "sdpa_mvlm" in str(found)
                status = "refused" if refused else "crash" if sdpa_equal else "as sdpa"
                row |= {"status": status, "note": one_line(found)}
        fused = sum(not call.reasons for call in calls)
        rows.append(row | {"fused_calls": fused, "sdpa_calls": len(calls) - fused})
    return rows


def cases(wanted: set[str]) -> Iterator[tuple[str, Callable[[], list[dict[str, Any]]]]]:
    for model_class in exported_classes():
        if not wanted or model_class.__name__ in wanted:
            yield model_class.__name__, lambda model_class=model_class: rows_of(model_class)


def summary(rows: list[dict[str, str]]) -> str:
    """Counts of rows, classes and architectures by status."""
    kinds = sorted({row["status"] for row in rows})
    lines = [f"{'status':10} {'rows':>5} {'classes':>8} {'architectures':>14}"]
    for kind in kinds:
        of = [row for row in rows if row["status"] == kind]
        counts = len(of), len({row["class"] for row in of}), len({row["architecture"] for row in of})
        lines.append(f"{kind:10} {counts[0]:5} {counts[1]:8} {counts[2]:14}")
    fused = {row["class"] for row in rows if row["status"] == "equal" and row["fused_calls"] not in ("", "0")}
    lines.append(f"equal classes with fused calls: {len(fused)}")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description="Walk over the model classes of transformers.")
    parser.add_argument("--csv", type=Path, required=True)
    parser.add_argument("classes", nargs="*")
    options = parser.parse_args()
    logging.disable(logging.CRITICAL)
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    rows = walk(options.csv, FIELDS, cases(set(options.classes)))
    print(summary(rows))
    faults = [row for row in rows if row["status"] in ("different", "crash")]
    for row in faults:
        print(f"{row['status']}: {row['class']} ({row['case']}): {row['note']}")
    return int(Counter(row["status"] for row in rows)["equal"] == 0 or bool(faults))


if __name__ == "__main__":
    sys.exit(main())
