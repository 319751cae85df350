"""Two bounds of the time of each kernel: bytes over bandwidth, and instructions over their rate.

    python -m mvlm_benchmarks.kernels.bounds [--json FILE] [--arch sm_90] [--select REGEX] [--against FILE]

`mvlm_benchmarks.kernels.traffic` has counted the bytes. The instructions are those of the machine code that ptxas
makes for each GPU, without a GPU. A loop's body counts once for each of its trips, and all else counts once. A row is a
pass of an op: the launches of the pass are added.

A *value* is one of the largest tensor that the pass reads or writes, images aside, or a logit of a contrastive loss.
The bounds leave out all waits, and the rates of single units, such as the sixteen exponentials or reciprocals of a
multiprocessor in a cycle, or matrix products. Programs of `qk_norm_rope` that copy gradients of v count as if they
rotated them.

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

from mvlm_benchmarks.kernels.traffic import BATCH, every_case
from mvlm_kernels import dispatch, use_backend
from mvlm_kernels.case import Case
from mvlm_kernels.hardware import GPUS
from mvlm_kernels.machine_code import instructions, spill_bytes, usage

TRAFFIC = Path("benchmarks/results/traffic.json")
CHOSEN = (
    r"^add_layer_norm (100864|.*(RMSNorm|LayerScale|gate))|^gelu_linear|^split_linear|^cross_attention B256|"
    r"all 196, uint8|^place_tokens .*unmasked|^masked_pixel_loss .*l1|^qk_norm_rope|^contrastive_terms"
)
"""Cases of the table, as "op shape": those that a step of `base` with 256 images launches, and those of others."""
Trips = Callable[[dict[str, Any], tuple[int, ...], dict[str, Any]], tuple[float, ...]]
"""Function of a launch's arguments by name, grid and constants: how often a program goes through each loop in all, on
average. A loop stands before those that start later in the code."""


def _tiles(size: str, tile: str, axis: int | None = None) -> Trips:
    """Trips of a loop over an argument in tiles. axis: that of the grid whose programs share the tiles, if any do."""

    def of_program(numbers: dict[str, Any], grid: tuple[int, ...], meta: dict[str, Any]) -> tuple[float, ...]:
        tiles = ceil(numbers[size] / meta[tile])
        return (tiles if axis is None else tiles / grid[axis],)

    return of_program


def _rows_of_group(numbers: dict[str, Any], grid: tuple[int, ...], meta: dict[str, Any]) -> tuple[float, ...]:
    return (ceil(numbers["R"] / meta["BLOCK_R"]) / grid[meta["GROUPED"]],)


def _heads(numbers: dict[str, Any], grid: tuple[int, ...], meta: dict[str, Any]) -> tuple[float, ...]:
    """Trips over q and k, and over their groups of heads."""
    of_part, each = meta["H"] // meta["BLOCK_H"], numbers["each"]
    parts = (ceil((first + each) / of_part) - first // of_part for first in range(0, each * grid[1], each))
    return sum(parts) / grid[1], each


def _heads_of_tiles(numbers: dict[str, Any], grid: tuple[int, ...], meta: dict[str, Any]) -> tuple[float, ...]:
    """Trips over tiles of rows, and over their groups of heads."""
    tiles = ceil(numbers["R"] / meta["BLOCK_R"]) / grid[0]
    return tiles, tiles * numbers["each"]


WALK = _tiles("R", "BLOCK_R", 0)
LOOPS: dict[str, Trips] = {
    "add_norm_kernel": _rows_of_group, "add_norm_backward_kernel": _rows_of_group,
    "gelu_kernel": WALK, "gelu_backward_kernel": WALK, "stack_rows_kernel": WALK,
    "column_sum_kernel": _tiles("N", "BLOCK_N"), "sum_kernel": _tiles("n", "BLOCK"),
    "place_kernel": _tiles("B", "BLOCK_B"), "place_backward_kernel": _tiles("B", "BLOCK_B"),
    "short_kv_forward": _tiles("q_rows", "BLOCK_M", 1), "short_kv_backward": _tiles("q_rows", "BLOCK_M", 1),
    "short_q_forward": _tiles("k_rows", "BLOCK_N", 1), "short_q_backward": _tiles("k_rows", "BLOCK_N", 1),
    "norm_rope_kernel": _heads, "norm_rope_backward_kernel": _heads_of_tiles,
    "forward_kernel": _tiles("E", "BLOCK_K"), "gradient_kernel": _tiles("E", "BLOCK_K"),
    "combine_kernel": _tiles("T", "BLOCK_T"),
}  # fmt: skip
"""Kernels with loops, and their trips."""
MORE = 1.03
"""Most instructions of a pass, over those of an earlier table."""


def trips(
    kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], meta: dict[str, Any], loops: Trips | None = None
) -> tuple[float, ...]:
    """Times that a program goes through each loop in all, on average; none for a kernel without a loop."""
    of_kernel = loops or LOOPS.get(kernel.__name__)
    return of_kernel(dict(zip(kernel.arg_names, args, strict=False)), grid, meta) if of_kernel else ()


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


def values_of(case: Case, launched: list[tuple[Any, ...]]) -> int:
    """Values of the largest tensor of a pass, images aside; of a contrastive loss, its logits."""
    if case.op == "contrastive_terms" and case.product is not None:
        return case.product[0] * case.product[1]
    tensors = [x for _, _, args, _ in launched for x in tree_leaves(args) if isinstance(x, Tensor)]
    return max(x.numel() for x in tensors if x.dtype != torch.uint8)


def machine(
    launched: list[tuple[Any, ...]], arch: str, compiler: Callable[..., Any], loops: Trips | None = None
) -> dict[str, Any]:
    """Kernels of a pass compiled for a target: instructions of all warps, most registers of a thread, bytes spilled.

    compiler: `mvlm_kernels.aot.compile_launch`. loops: of kernels that are not ours.
    """
    warps, registers, spilled = 0.0, 0, 0
    for kernel, grid, args, meta in launched:
        compiled = compiler(kernel, args, meta, arch)
        used = usage(compiled.asm["cubin"])
        registers = max(registers, used["REG"])
        spilled += spill_bytes(compiled.asm["ptx"], arch) if used["STACK"] else 0
        number = torch.Size(grid).numel() * meta["num_warps"]
        counts, of_loops = instructions(compiled.asm["cubin"]), trips(kernel, grid, args, meta, loops)
        if len(counts.loops) != len(of_loops):
            raise AssertionError(f"{kernel.__name__} for {arch}: {len(counts.loops)} loops, {len(of_loops)} in LOOPS")
        warps += number * counts.executed(*of_loops)
    return {"instructions": round(warps), "registers": registers, "spilled": spilled}


def rows(traffic: list[dict[str, Any]], archs: list[int], select: str = "") -> Iterator[dict[str, Any]]:
    """One row for each pass of each chosen case whose "op shape" matches the regex."""
    # Imported here: it takes TRITON_INTERPRET out of the environment.
    from mvlm_kernels.aot import compile_launch

    moved = {(row["op"], row["shape"], row["pass"]): row["bytes_moved"] for row in traffic}
    for case in every_case(BATCH):
        name_of_case = f"{case.op} {case.label}"
        if not re.search(CHOSEN, name_of_case) or not re.search(select, name_of_case):
            continue
        of_archs = {f"sm_{arch}": launches(case, arch) for arch in archs}
        for pass_name in ("forward", "backward"):
            recorded = {arch: found[pass_name] for arch, found in of_archs.items() if found[pass_name]}
            if not recorded:
                continue
            first = next(iter(recorded.values()))
            values, size = values_of(case, first), moved[case.op, case.label, pass_name]
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
