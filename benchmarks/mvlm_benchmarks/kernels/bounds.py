"""Two bounds of the time of each kernel of a training step: bytes over bandwidth, and instructions over their rate.

    python -m mvlm_benchmarks.kernels.bounds [--json FILE] [--arch sm_90] [--select REGEX] [--against FILE]

`mvlm_benchmarks.kernels.traffic` has counted the bytes. The instructions are those of the machine code that ptxas
makes for each GPU, without a GPU. A kernel has at most one loop: its body counts once for each tile that a program
takes, and all else counts once. A row is a pass of an op: the launches of the pass are added.

A *value* is one of the largest tensor that the pass reads or writes, images aside. The bounds leave out all waits, and
the rates of single units, such as the sixteen exponentials or reciprocals of a multiprocessor in a cycle.

Exits with 1 if a kernel spills, or with --against if a pass issues 3 % more instructions than in that table.
"""

import argparse
import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from math import ceil
from pathlib import Path
from typing import Any

# A kernel decorated in an interpreting process cannot be compiled, and torch may have imported Triton already.
if __name__ == "__main__" and os.environ.pop("TRITON_INTERPRET", None):
    os.execv(sys.executable, [sys.executable, "-m", "mvlm_benchmarks.kernels.bounds", *sys.argv[1:]])

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from mvlm_benchmarks.kernels.traffic import BATCH, counted
from mvlm_kernels import dispatch, use_backend
from mvlm_kernels.case import Case
from mvlm_kernels.hardware import GPUS
from mvlm_kernels.machine_code import instructions, spill_bytes, usage

TRAFFIC = Path("benchmarks/results/traffic.json")
STEP = (
    r"^add_layer_norm 100864|^gelu_linear|^split_linear|^cross_attention|all 196, uint8|"
    r"^place_tokens .*unmasked|^masked_pixel_loss .*l1"
)
"""Cases, as "op shape", whose kernels a step of `base` with 256 images launches."""
WALKS = "R", "BLOCK_R", 0
LOOPS = {
    "add_norm_kernel": WALKS, "add_norm_backward_kernel": WALKS, "gelu_kernel": WALKS, "gelu_backward_kernel": WALKS,
    "stack_rows_kernel": WALKS, "column_sum_kernel": ("N", "BLOCK_N", None), "sum_kernel": ("n", "BLOCK", None),
    "place_kernel": ("B", "BLOCK_B", None), "place_backward_kernel": ("B", "BLOCK_B", None),
    "short_kv_forward": ("q_rows", "BLOCK_M", 1), "short_kv_backward": ("q_rows", "BLOCK_M", 1),
    "short_q_forward": ("k_rows", "BLOCK_N", 1), "short_q_backward": ("k_rows", "BLOCK_N", 1),
}  # fmt: skip
"""Kernels with a loop: the argument over which it goes, its tile, and the axis of the grid whose programs share the
tiles (None: each takes all)."""
MORE = 1.03
"""Most instructions of a pass, over those of an earlier table."""


def trips(kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], meta: dict[str, Any]) -> float:
    """Tiles that a program takes in its loop, on average; 0 for a kernel without a loop."""
    if kernel.__name__ not in LOOPS:
        return 0
    size, tile, axis = LOOPS[kernel.__name__]
    tiles = ceil(dict(zip(kernel.arg_names, args, strict=False))[size] / meta[tile])
    return tiles if axis is None else tiles / grid[axis]


def launches(case: Case, arch: int) -> dict[str, list[tuple[Any, ...]]]:
    """Launches (kernel, grid, args, meta) of each pass on a GPU of this compute capability."""
    found: dict[str, list[tuple[Any, ...]]] = {"forward": [], "backward": []}
    inputs = case.make("meta")
    with use_backend("triton"):
        with dispatch.recording(lambda *launch: found["forward"].append(launch), arch):
            outs = case.forward(inputs)
        with dispatch.recording(lambda *launch: found["backward"].append(launch), arch):
            case.backward(inputs, outs)
    return found


def values_of(launched: list[tuple[Any, ...]]) -> int:
    """Values of the largest tensor of a pass, images aside."""
    tensors = [x for _, _, args, _ in launched for x in tree_leaves(args) if isinstance(x, Tensor)]
    return max(x.numel() for x in tensors if x.dtype != torch.uint8)


def machine(launched: list[tuple[Any, ...]], arch: str, compiler: Callable[..., Any]) -> dict[str, Any]:
    """Kernels of a pass compiled for a target: instructions of all warps, most registers of a thread, bytes spilled.

    compiler: `mvlm_kernels.aot.compile_launch`.
    """
    warps, registers, spilled = 0.0, 0, 0
    for kernel, grid, args, meta in launched:
        compiled = compiler(kernel, args, meta, arch)
        used = usage(compiled.asm["cubin"])
        registers = max(registers, used["REG"])
        spilled += spill_bytes(compiled.asm["ptx"], arch) if used["STACK"] else 0
        number = torch.Size(grid).numel() * meta["num_warps"]
        counts = instructions(compiled.asm["cubin"])
        if bool(counts.body) != (kernel.__name__ in LOOPS):
            raise AssertionError(f"{kernel.__name__} for {arch}: LOOPS says otherwise whether it has a loop")
        warps += number * counts.executed(trips(kernel, grid, args, meta))
    return {"instructions": round(warps), "registers": registers, "spilled": spilled}


def rows(traffic: list[dict[str, Any]], archs: list[int], select: str = "") -> Iterator[dict[str, Any]]:
    """One row for each pass of each case of the step whose "op shape" matches the regex."""
    # Imported here: it takes TRITON_INTERPRET out of the environment.
    from mvlm_kernels.aot import compile_launch

    moved = {(row["op"], row["shape"], row["pass"]): row["bytes_moved"] for row in traffic}
    for case in counted(BATCH):
        name_of_case = f"{case.op} {case.label}"
        if not re.search(STEP, name_of_case) or not re.search(select, name_of_case):
            continue
        of_archs = {f"sm_{arch}": launches(case, arch) for arch in archs}
        for pass_name in ("forward", "backward"):
            recorded = {arch: found[pass_name] for arch, found in of_archs.items() if found[pass_name]}
            if not recorded:
                continue
            first = next(iter(recorded.values()))
            values, size = values_of(first), moved[case.op, case.label, pass_name]
            compiled = {arch: machine(launched, arch, compile_launch) for arch, launched in recorded.items()}
            for of_arch in compiled.values():
                of_arch["of_a_value"] = round(32 * of_arch["instructions"] / values, 2)
            bounds = {
                name: {
                    "issue_us": round(1e6 * 32 * compiled[f"sm_{gpu.arch}"]["instructions"] / gpu.issues, 1),
                    "memory_us": round(1e6 * size / gpu.bandwidth, 1),
                }
                for name, gpu in GPUS.items()
                if gpu.arch in archs
            }
            yield {
                "op": case.op, "pass": pass_name, "shape": case.label,
                "kernels": list(dict.fromkeys(kernel.__name__ for kernel, *_ in first)), "values": values,
                "bytes_of_a_value": round(size / values, 2), "machine": compiled, "bounds": bounds,
            }  # fmt: skip


def problems(found: list[dict[str, Any]], table: list[dict[str, Any]]) -> Iterator[str]:
    """Lines on passes that spill, or that issue more instructions than in the table of an earlier run."""
    before = {(row["op"], row["pass"], row["shape"]): row["machine"] for row in table}
    for row in found:
        for arch, now in row["machine"].items():
            name = f"{row['op']} {row['pass']} {row['shape']}, {arch}"
            if now["spilled"]:
                yield f"{name}: spills {now['spilled']} bytes"
            was = before.get((row["op"], row["pass"], row["shape"]), {}).get(arch, {}).get("of_a_value")
            if was and now["of_a_value"] > MORE * was:
                yield f"{name}: {now['of_a_value']} instructions a value, {was} in the table"


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m mvlm_benchmarks.kernels.bounds", description=(__doc__ or "").split("\n")[0]
    )
    archs = list(dict.fromkeys(gpu.arch for gpu in GPUS.values()))
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    parser.add_argument("--traffic", type=Path, default=TRAFFIC, help="table of mvlm_benchmarks.kernels.traffic")
    parser.add_argument("--arch", action="append", choices=[f"sm_{arch}" for arch in archs], help="may be repeated")
    parser.add_argument("--select", default="", help='regex on "op shape"')
    parser.add_argument("--against", type=Path, help="table of an earlier run with the same Triton")
    options = parser.parse_args()
    chosen = [arch for arch in archs if not options.arch or f"sm_{arch}" in options.arch]
    found = []
    print(f"{'op':18} {'pass':9} {'arch':7} {'regs':>4} {'instructions':>12} {'bytes':>6}  GPU: us of both bounds")
    for row in rows(json.loads(options.traffic.read_text())["rows"], chosen, options.select):
        found.append(row)
        for arch, code in row["machine"].items():
            bounds = [
                f"{gpu}: {bound['issue_us']} {bound['memory_us']}"
                for gpu, bound in row["bounds"].items()
                if f"sm_{GPUS[gpu].arch}" == arch
            ]
            print(
                f"{row['op']:18} {row['pass']:9} {arch:7} {code['registers']:4} {code['of_a_value']:12} "
                f"{row['bytes_of_a_value']:6.2f}  {', '.join(bounds)}, {row['shape']}",
                flush=True,
            )
    import triton

    versions = {"triton": triton.__version__}
    if options.json:
        options.json.write_text(json.dumps({"versions": versions, "rows": found}, indent=1) + "\n")
    table: list[dict[str, Any]] = []
    if options.against:
        earlier = json.loads(options.against.read_text())
        if earlier["versions"] != versions:
            parser.error(f"--against: wanted a table made with {versions}, got {earlier['versions']}")
        table = earlier["rows"]
    wrong = list(problems(found, table))
    print(*wrong, sep="\n" if wrong else "")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
