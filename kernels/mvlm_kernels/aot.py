"""Compile every kernel for sm_80, sm_90 and sm_100 without a GPU, and print the cost of the machine code.

    python -m mvlm_kernels.aot [--json FILE [--update]] [--arch sm_90] [--select REGEX] [--jobs N] [--against FILE]

Each op's launchers run on meta tensors while :func:`mvlm_kernels.dispatch.recording` records their launches. Triton's
binder turns the recorded arguments into a signature, and its compiler makes machine code of it. A row is one kernel:
op, pass, dtype, config, arch, registers (per thread), spill_bytes, stack, shared (bytes of shared memory per block),
matrix_instruction (in the machine code; "" if none).

Exits with 1 if a kernel spills registers, exceeds the target's shared memory, or, in attention and linear kernels, has
no tensor-core instruction; with --against also if a kernel takes more registers than in that table.
"""

import argparse
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

# A kernel decorated in an interpreting process cannot be compiled, and torch may have imported Triton already.
if os.environ.pop("TRITON_INTERPRET", None) and __name__ == "__main__":
    os.execv(sys.executable, [sys.executable, "-m", "mvlm_kernels.aot", *sys.argv[1:]])

import torch

from mvlm_kernels import dispatch

MODULES = {
    "cross_attention": "mvlm_kernels.cross_attention.aot_cases",
    "gather_patches": "mvlm_kernels.gather_patches.triton",
    "masked_pixel_loss": "mvlm_kernels.pixel_loss.triton",
    "linear_pixel_loss": "mvlm_kernels.pixel_loss.linear_aot_cases",
    "place_tokens": "mvlm_kernels.place_tokens.triton",
}
ARCHS = {"sm_80": 80, "sm_90": 90, "sm_100": 100}
# Shared memory per block in bytes: CUDA C++ programming guide, technical specifications per compute capability.
SHARED_LIMIT = {"sm_80": 166_912, "sm_90": 232_448, "sm_100": 232_448}
# Kernels of the ops with matrix products that have none themselves: they add partial sums or take moments of pixels.
WITHOUT_PRODUCTS = ("sum_splits", "short_q_combine", "sum_kernel", "sum_partials_kernel", "moments_kernel")
# Names of mma.sync, wgmma and tcgen05.mma in machine code.
_MATRIX_INSTRUCTIONS = re.compile(r"\b(UTC[A-Z]*MMA|[A-Z]GMMA|[HIDQ]MMA)\b")


def recorded(op: str, arch: str, select: str = "") -> Iterator[tuple[str, Any, tuple, dict[str, Any]]]:
    """(label, kernel, arguments, meta) of each launch of the op's cases whose "op/label" matches the regex select."""
    for label, call in importlib.import_module(MODULES[op]).aot_cases():
        if not re.search(select, f"{op}/{label}"):
            continue
        launches: list[tuple[Any, tuple, dict[str, Any]]] = []
        with dispatch.recording(
            lambda kernel, grid, args, meta, to=launches: to.append((kernel, args, meta)), ARCHS[arch]
        ):
            call()
        for kernel, args, meta in launches:
            yield label, kernel, args, meta


def compile_launch(kernel: Any, args: tuple, meta: dict[str, Any], arch: str) -> Any:
    """The kernel compiled for these arguments, specialised as a launch on that GPU would specialise them."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, make_backend
    from triton.runtime.jit import create_function_from_signature

    target = GPUTarget("cuda", ARCHS[arch], 32)
    backend = make_backend(target)
    kwargs = {"debug": False, **meta}
    bound, specialization, options = create_function_from_signature(kernel.signature, kernel.params, backend)(
        *args, **kwargs
    )
    options, signature, constexprs, attrs = kernel._pack_args(backend, kwargs, bound, specialization, options)
    source = ASTSource(kernel, signature, constexprs, attrs)
    compiled = triton.compile(source, target=target, options=options.__dict__)
    # Triton refuses a second launch if a global of the kernel has changed, and NaN never equals itself.
    for (name, _), (value, _) in kernel.used_global_vals.items():
        if bool(value != value):
            raise AssertionError(f"{kernel.__name__} reads the global {name}, which is unequal to itself")
    return compiled


def row(op: str, label: str, kernel: Any, args: tuple, meta: dict[str, Any], arch: str) -> dict[str, Any]:
    """Compile one launch and read its cost from the machine code."""
    compiled = compile_launch(kernel, args, meta, arch)
    usage = _usage(compiled.asm["cubin"])
    matrix = sorted(set(_MATRIX_INSTRUCTIONS.findall(compiled.asm["sass"])))
    floats = [a.dtype for a in args if isinstance(a, torch.Tensor) and a.dtype.is_floating_point]
    tiles = {k: v for k, v in meta.items() if k.startswith("BLOCK") or k in ("num_warps", "num_stages")}
    return {
        "op": op,
        "pass": "backward" if "backward" in kernel.__name__ else "forward",
        "kernel": kernel.__name__,
        "case": label,
        "dtype": str(floats[0]).removeprefix("torch.") if floats else "int",
        "config": " ".join(f"{k}={v}" for k, v in tiles.items()),
        "arch": arch,
        "registers": usage["REG"],
        "spill_bytes": _spill_bytes(compiled.asm["ptx"], arch) if usage["STACK"] else 0,
        "stack": usage["STACK"],
        "shared": compiled.metadata.shared,
        "matrix_instruction": "+".join(matrix),
    }


def _tool(name: str) -> str:
    import triton

    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def _usage(cubin: bytes) -> dict[str, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(cubin)
        text = subprocess.run(
            [_tool("cuobjdump"), "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    return {name: int(value) for name, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", text)}


def _spill_bytes(ptx: str, arch: str) -> int:
    """Bytes of spill stores and loads, from ptxas. It compiles once more, so ask only for kernels with a stack."""
    suffix = "" if arch == "sm_80" else "a"
    ptxas = _tool("ptxas-blackwell") if arch != "sm_80" and Path(_tool("ptxas-blackwell")).exists() else _tool("ptxas")
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        # Triton's own flags: with others ptxas finds other schedules, which spill other registers.
        flags = ["-lineinfo", "--regAllocOptLevel=2"] if "blackwell" in ptxas else ["-lineinfo"]
        log = subprocess.run(
            [ptxas, "-v", *flags, f"--gpu-name={arch}{suffix}", str(source), "-o", f"{folder}/kernel.cubin"],
            capture_output=True,
            text=True,
            check=True,
        ).stderr
    return sum(int(n) for n in re.findall(r"(\d+) bytes spill (?:stores|loads)", log))


def find_problems(rows: list[dict[str, Any]], table: list[dict[str, Any]] | None = None) -> list[str]:
    """Faults of compiled kernels, one text each. table: rows of an earlier run, whose registers are the limit."""
    identity = ("op", "kernel", "case", "dtype", "config", "arch")
    before = {tuple(r[k] for k in identity): r["registers"] for r in table or ()}
    found = []
    for r in rows:
        name = f"{r['op']} {r['kernel']} {r['case']} {r['arch']}"
        if r["spill_bytes"]:
            found.append(f"{name}: spills {r['spill_bytes']} bytes")
        if r["shared"] > SHARED_LIMIT[r["arch"]]:
            found.append(f"{name}: {r['shared']} bytes of shared memory, limit {SHARED_LIMIT[r['arch']]}")
        multiplies = r["op"] in ("cross_attention", "linear_pixel_loss") and r["kernel"] not in WITHOUT_PRODUCTS
        if multiplies and not r["matrix_instruction"]:
            found.append(f"{name}: no tensor-core instruction")
        allowed = before.get(tuple(r[k] for k in identity), r["registers"])
        if r["registers"] > allowed:
            found.append(f"{name}: {r['registers']} registers, {allowed} in the table")
    return found


def updated(before: list[dict[str, Any]], rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of ``before``, in which the newly compiled rows replace those of the same (op, case, target)."""
    places: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for r in before:
        places.setdefault((r["op"], r["case"], r["arch"]), []).append(r)
    compiled = {(r["op"], r["case"], r["arch"]) for r in rows}
    places.update({key: [] for key in compiled})
    for r in rows:
        places[r["op"], r["case"], r["arch"]].append(r)
    return [r for part in places.values() for r in part]


def _rows_of_case(task: tuple[str, str, str]) -> list[dict[str, Any]]:
    op, arch, select = task
    seen, rows = set(), []
    for label, kernel, args, meta in recorded(op, arch, select):
        # sum_splits is launched for dK and again for dV, with the same arguments.
        key = (kernel.__name__, label, str(meta), tuple(a.dtype if isinstance(a, torch.Tensor) else a for a in args))
        if key not in seen:
            seen.add(key)
            rows.append(row(op, label, kernel, args, meta, arch))
    return rows


def tasks(archs: list[str], select: str) -> list[tuple[str, str, str]]:
    """(op, arch, regex of one case) for each case, so that cases can be spread over processes."""
    found = []
    for op, module in MODULES.items():
        labels = [label for label, _ in importlib.import_module(module).aot_cases()]
        for label in labels:
            if re.search(select, f"{op}/{label}"):
                found += [(op, arch, f"^{re.escape(f'{op}/{label}')}$") for arch in archs]
    return found


def _print(rows: list[dict[str, Any]]) -> None:
    print(f"{'op':18} {'kernel':26} {'case':30} {'arch':7} {'regs':>4} {'spill':>5} {'stack':>5} {'shared':>7} matrix")
    for r in rows:
        print(
            f"{r['op']:18} {r['kernel']:26} {r['case']:30} {r['arch']:7} {r['registers']:4} {r['spill_bytes']:5} "
            f"{r['stack']:5} {r['shared']:7} {r['matrix_instruction']}"
        )


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m mvlm_kernels.aot", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--json", type=Path, help='write {"rows": [..]} here')
    parser.add_argument("--update", action="store_true", help="keep the rows of --json that this run does not compile")
    parser.add_argument("--arch", action="append", choices=list(ARCHS), help="only this target; may be repeated")
    parser.add_argument("--select", default="", help='regex over "op/case"')
    parser.add_argument("--jobs", type=int, default=1, help="processes that compile")
    parser.add_argument("--against", type=Path, help="table of an earlier run, whose registers are the limit")
    options = parser.parse_args()

    work = tasks(options.arch or list(ARCHS), options.select)
    if not work:
        parser.error(f"nothing matches --select {options.select!r}")
    if options.jobs > 1:
        with ProcessPoolExecutor(options.jobs) as pool:
            rows = [r for part in pool.map(_rows_of_case, work) for r in part]
    else:
        rows = [r for task in work for r in _rows_of_case(task)]
    _print(rows)
    import triton

    versions = {"triton": triton.__version__, "torch": torch.__version__.split("+")[0]}
    table = None
    if options.against:
        committed = json.loads(options.against.read_text())
        if committed["versions"]["triton"] == triton.__version__:
            table = committed["rows"]
        else:
            print(f"{options.against} is of triton {committed['versions']['triton']}: registers are not compared")
    if options.json:
        before = json.loads(options.json.read_text()) if options.update else {"versions": versions, "rows": []}
        if before["versions"] != versions:
            parser.error(f"--update: {options.json} is of {before['versions']}, and this is {versions}")
        everything = {"versions": versions, "rows": updated(before["rows"], rows)}
        options.json.write_text(json.dumps(everything, indent=1) + "\n")
    found = find_problems(rows, table)
    print("\n".join(found) if found else f"{len(rows)} kernels: no spills, shared memory within limits")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
