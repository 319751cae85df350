"""Compile every kernel for six architectures without a GPU, and print the cost of the machine code.

    python -m mvlm_kernels.aot [--json FILE [--update]] [--arch sm_90] [--select REGEX] [--jobs N] [--against FILE]

Each op runs on meta tensors, forward and backward, while its launches are recorded.
Triton derives a signature from the recorded arguments and compiles the kernel for it. A row is one compiled kernel:

    op, pass             the op, and the pass (forward or backward) that launches the kernel
    kernel, case         name of the Triton function, and label of the op's case
    dtype, config, arch  dtype of the first floating argument ("int" without one), tile sizes, target such as sm_90
    registers            per thread
    spill_bytes, stack   bytes of spill stores and loads in the code, and bytes of stack per thread
    shared               bytes of shared memory per block
    blocks               blocks that one multiprocessor holds at once, by registers, threads and shared memory
    matrix_instruction   tensor-core instructions in the machine code, "" without one

Exits with 1 if a kernel spills registers or exceeds the target's shared memory, or if an attention kernel has no
tensor-core instruction. With --against it also exits with 1 if a kernel takes more registers than in that table.
"""

import argparse
import functools
import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from multiprocessing import get_context
from pathlib import Path
from typing import Any

# A kernel decorated in an interpreting process cannot be compiled, and torch may have imported Triton already, so the
# module starts again in a process that does not interpret.
if os.environ.pop("TRITON_INTERPRET", None) and __name__ == "__main__":
    os.execv(sys.executable, [sys.executable, "-m", "mvlm_kernels.aot", *sys.argv[1:]])

import torch

from mvlm_kernels import cases
from mvlm_kernels.case import Launch
from mvlm_kernels.hardware import MULTIPROCESSORS, blocks, multiprocessor
from mvlm_kernels.machine_code import spill_bytes, usage

ARCHS = {f"sm_{arch}": arch for arch in MULTIPROCESSORS}
"""NVIDIA targets, and their compute capability as an int."""
MULTIPLYING = ("cross_attention",)
# Kernels of attention without a matrix product: they sum partial results.
WITHOUT_PRODUCTS = ("sum_splits", "short_q_combine")
# Names of mma.sync, wgmma and tcgen05.mma in machine code.
_MATRIX_INSTRUCTIONS = re.compile(r"\b(UTC[A-Z]*MMA|[A-Z]GMMA|[HIDQ]MMA)\b")


def capability_of(arch: str) -> int:
    """Compute capability of an NVIDIA GPU as an int, such as 89 of "sm_89"."""
    return int(arch.removeprefix("sm_"))


@functools.cache
def _binder(kernel: Any, arch: str) -> tuple[Any, ...]:
    """(target, backend, function of arguments that specialises them as a launch on that GPU would)."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend
    from triton.runtime.jit import create_function_from_signature

    target = GPUTarget("cuda", capability_of(arch), 32)
    backend = make_backend(target)
    return target, backend, create_function_from_signature(kernel.signature, kernel.params, backend)


def signature(kernel: Any, args: tuple, meta: dict[str, Any], arch: str) -> str:
    """Key of a launch in Triton's cache of compiled kernels: two launches compile once if theirs are equal."""
    _, specialization, options = _binder(kernel, arch)[2](*args, debug=False, **meta)
    return f"{kernel.__name__} {specialization} {sorted(options.items())}"


def compile_launch(kernel: Any, args: tuple, meta: dict[str, Any], arch: str) -> Any:
    """Compile a kernel for these arguments, specialised as a launch on that GPU would specialise them.

    Raises AssertionError for a kernel that reads a global which is unequal to itself.
    """
    import triton
    from triton.compiler import ASTSource

    target, backend, bind = _binder(kernel, arch)
    bound, specialization, options = bind(*args, debug=False, **meta)
    options, signature, constexprs, attrs = kernel._pack_args(
        backend, {"debug": False, **meta}, bound, specialization, options
    )
    source = ASTSource(kernel, signature, constexprs, attrs)
    compiled = triton.compile(source, target=target, options=options.__dict__)
    # Triton refuses a second launch if a global of the kernel has changed, and NaN never equals itself.
    for (name, _), (value, _) in kernel.used_global_vals.items():
        if bool(value != value):
            raise AssertionError(f"{kernel.__name__} reads the global {name}, which is unequal to itself")
    return compiled


def compile_all(
    launches: Sequence["Launch"], arch: str, jobs: int, done: Callable[[int], None] = lambda _: None
) -> list[str]:
    """Compile into Triton's cache, in `jobs` forks of this process, which has used no GPU. Returns the failures.

    done: called with the number of compiled kernels after each.
    """
    global _waiting
    _waiting = launches, arch
    with ProcessPoolExecutor(max(1, min(jobs, len(launches))), mp_context=get_context("fork")) as pool:
        failures = []
        for number, failure in enumerate(pool.map(_compile_one, range(len(launches))), 1):
            failures += [failure] if failure else []
            done(number)
        return failures


_waiting: tuple[Sequence["Launch"], str] = (), ""


def _compile_one(number: int) -> str:
    launches, arch = _waiting
    _, kernel, args, meta, _ = launches[number]
    try:
        compile_launch(kernel, args, meta, arch)
    except Exception as error:
        return f"{kernel.__name__}: {type(error).__name__}: {error}".split("\n")[0]
    return ""


def recorded(op: str, arch: str, select: str = "") -> Iterator[Launch]:
    """Launches of the op's cases whose "op/label" matches the regex select."""
    for case in cases.compiled():
        if case.op == op and re.search(select, f"{op}/{case.label}") and case.runs_on(capability_of(arch)):
            yield from case.launches(capability_of(arch))


def row(op: str, launch: Launch, arch: str) -> dict[str, Any]:
    """Compile the kernel of one launch. Returns its row of the printed table, whose columns the module describes."""
    case, kernel, args, meta, pass_name = launch
    compiled = compile_launch(kernel, args, meta, arch)
    used = usage(compiled.asm["cubin"])
    floats = [a.dtype for a in _flat(args) if isinstance(a, torch.Tensor) and a.dtype.is_floating_point]
    tiles = {k: v for k, v in meta.items() if k.startswith("BLOCK") or k in ("num_warps", "num_stages", "maxnreg")}
    return {
        "op": op,
        "pass": pass_name,
        "kernel": kernel.__name__,
        "case": case,
        "dtype": str(floats[0]).removeprefix("torch.") if floats else "int",
        "config": " ".join(f"{k}={v}" for k, v in tiles.items()),
        "arch": arch,
        "registers": used["REG"],
        "spill_bytes": spill_bytes(compiled.asm["ptx"], arch) if used["STACK"] else 0,
        "stack": used["STACK"],
        "shared": compiled.metadata.shared,
        "blocks": blocks(used["REG"], meta["num_warps"], compiled.metadata.shared, capability_of(arch)),
        "matrix_instruction": "+".join(sorted(set(_MATRIX_INSTRUCTIONS.findall(compiled.asm["sass"])))),
    }


def _flat(args: tuple) -> Iterator[Any]:
    """Arguments of a launch, those inside tuples (a pointer and its strides) one by one."""
    for a in args:
        yield from _flat(a) if isinstance(a, tuple) else (a,)


def find_problems(rows: list[dict[str, Any]], table: list[dict[str, Any]] | None = None) -> list[str]:
    """Problems of the compiled kernels, one line each. table: rows of an earlier run, whose registers are the limit."""
    identity = ("op", "kernel", "case", "dtype", "config", "arch")
    limits: dict[tuple, int] = {}
    for r in table or ():
        # A case may launch a kernel several times with other sizes, which no column shows. The largest is the limit.
        key = tuple(r[k] for k in identity)
        limits[key] = max(limits.get(key, 0), r["registers"])
    found = []
    for r in rows:
        name = f"{r['op']} {r['kernel']} {r['case']} {r['arch']}"
        if r["spill_bytes"]:
            found.append(f"{name}: spills {r['spill_bytes']} bytes")
        most = 1024 * multiprocessor(capability_of(r["arch"])).shared_of_block
        if r["shared"] > most:
            found.append(f"{name}: {r['shared']} bytes of shared memory, limit {most}")
        multiplies = r["op"] in MULTIPLYING and r["kernel"] not in WITHOUT_PRODUCTS
        if multiplies and not r["matrix_instruction"]:
            found.append(f"{name}: no tensor-core instruction")
        allowed = limits.get(tuple(r[k] for k in identity), r["registers"])
        if r["registers"] > allowed:
            found.append(f"{name}: {r['registers']} registers, {allowed} in the table")
    return found


def updated(before: list[dict[str, Any]], rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The table ``before`` with the new ``rows``, which replace all earlier ones of the same (op, case, arch)."""
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for r in before:
        groups.setdefault((r["op"], r["case"], r["arch"]), []).append(r)
    compiled = {(r["op"], r["case"], r["arch"]) for r in rows}
    groups.update({key: [] for key in compiled})
    for r in rows:
        groups[r["op"], r["case"], r["arch"]].append(r)
    return [r for group in groups.values() for r in group]


def _rows_of_case(task: tuple[str, str, str]) -> list[dict[str, Any]]:
    op, arch, select = task
    seen, rows = set(), []
    for launch in recorded(op, arch, select):
        # sum_splits is launched for dK and again for dV, with the same arguments.
        kinds = tuple(a.dtype if isinstance(a, torch.Tensor) else a for a in _flat(launch.args))
        key = (launch.kernel.__name__, launch.case, str(launch.meta), kinds)
        if key not in seen:
            seen.add(key)
            rows.append(row(op, launch, arch))
    return rows


def tasks(archs: list[str], select: str) -> list[tuple[str, str, str]]:
    """(op, arch, regex of one case) for each case and target: units of work for a pool of processes."""
    names = dict.fromkeys((case.op, f"{case.op}/{case.label}") for case in cases.compiled())
    chosen = [(op, name) for op, name in names if re.search(select, name)]
    return [(op, arch, f"^{re.escape(name)}$") for op, name in chosen for arch in archs]


def _print(r: dict[str, Any]) -> None:
    print(
        f"{r['op']:18} {r['kernel']:26} {r['case']:30} {r['arch']:7} {r['registers']:4} {r['spill_bytes']:5} "
        f"{r['stack']:5} {r['shared']:7} {r['blocks']:6} {r['matrix_instruction']}",
        flush=True,
    )


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m mvlm_kernels.aot", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--json", type=Path, help='write {"rows": [..]} here')
    parser.add_argument("--update", action="store_true", help="keep the rows of --json that this run does not compile")
    parser.add_argument("--arch", action="append", choices=list(ARCHS), help="only this target; may be repeated")
    parser.add_argument("--select", default="", help='regex over "op/case"')
    parser.add_argument("--jobs", type=int, default=1, help="processes that compile")
    parser.add_argument(
        "--against", type=Path, help="table of an earlier run; a kernel with more registers than there is a problem"
    )
    options = parser.parse_args()

    work = tasks(options.arch or list(ARCHS), options.select)
    if not work:
        parser.error(f"nothing matches --select {options.select!r}")
    columns = ("op", 18), ("kernel", 26), ("case", 30), ("arch", 7)
    numbers = ("regs", 4), ("spill", 5), ("stack", 5), ("shared", 7), ("blocks", 6)
    print(*(f"{name:{n}}" for name, n in columns), *(f"{name:>{n}}" for name, n in numbers), "matrix")
    rows = []
    with ProcessPoolExecutor(options.jobs) if options.jobs > 1 else nullcontext() as pool:
        for part in (pool.map if pool else map)(_rows_of_case, work):
            rows += part
            for r in part:  # as they come: the whole table takes long
                _print(r)
    import triton

    versions = {"triton": triton.__version__, "torch": torch.__version__.split("+")[0]}
    table = None
    if options.against:
        committed = json.loads(options.against.read_text())
        if committed["versions"]["triton"] == triton.__version__:
            table = committed["rows"]
        else:
            print(
                f"{options.against} was made with triton {committed['versions']['triton']}: registers are not compared"
            )
    if options.json:
        before = json.loads(options.json.read_text()) if options.update else {"versions": versions, "rows": []}
        if before["versions"] != versions:
            parser.error(
                f"--update: wanted a table made with {versions}, got {options.json} made with {before['versions']}; "
                "compile every kernel without --update"
            )
        everything = {"versions": versions, "rows": updated(before["rows"], rows)}
        options.json.write_text(json.dumps(everything, indent=1) + "\n")
    found = find_problems(rows, table)
    print("\n".join(found) if found else f"{len(rows)} kernels: no spills, shared memory within limits")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
