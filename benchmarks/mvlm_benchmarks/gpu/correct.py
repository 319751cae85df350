"""Stage `correct`: is every kernel right on this GPU, in every run? Then the rates that this GPU reaches.

For each case of each op: values against float64, results that are not kept from earlier calls, bitwise repeats, the
kernels that run, a capture in a CUDA graph, and no waiting for the device. Then the test suite's GPU tests, as a
process of their own. A wrong value ends the checks of its case, and the others go on; the stage says so at its end.
"""

import contextlib
import importlib.util
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from mvlm_benchmarks.ceilings import ceiling_rows
from mvlm_benchmarks.clock import CpuClock, CudaClock, Refused, WrongValue, torch_settings
from mvlm_benchmarks.gpu.processes import run_program
from mvlm_benchmarks.gpu.stage import Stage
from mvlm_benchmarks.kernels.attention_peers import cudnn_backend, flash_backend, sdpa
from mvlm_benchmarks.kernels.cases import cases
from mvlm_benchmarks.kernels.checks import torch_reasons
from mvlm_benchmarks.kernels.measure import LocalContender
from mvlm_benchmarks.kernels.peers import ours
from mvlm_benchmarks.kernels.reference import CaseData
from mvlm_benchmarks.machine import source_root
from mvlm_benchmarks.results import RowFile
from mvlm_benchmarks.unavailable import one_line
from mvlm_kernels import use_backend
from mvlm_kernels.case import Case
from mvlm_kernels.cases import small as small_cases

COLUMNS = ("op", "shape", "check", "status", "note", "seconds")
CEILING_COLUMNS = ("name", "shape", "dtype", "us", "gb_per_s", "tflops")
REPEATS, QUICK_REPEATS, SDPA_REPEATS = 1000, 30, 200
GPU_TESTS = ("tests/kernels/test_gpu.py", "tests/kernels/test_gpu_steps.py", "tests/promises/test_gpu.py",
             "tests/dataloading/loader/test_device.py", "tests/benchmarks/kernels/test_compare.py",
             "tests/benchmarks/test_clock.py")  # fmt: skip
LOADER_TESTS = ("tests/dataloading/loader/test_device.py",)


def run(stage: Stage) -> None:
    """Run stage `correct`. Writes correct.csv, ceilings.csv, nvidia-smi.txt and pytest.log."""
    if not stage.rehearse:
        write_output(stage, "nvidia-smi.txt", ["nvidia-smi", "-q"], 30)
    table = stage.table("correct", COLUMNS)
    chosen = small_cases(stage.dtype)
    if not stage.rehearse:
        more = [c for c in cases(stage.batch, stage.dtype) if c.has_kernels]
        chosen += [c for c in more if is_of_the_step(c)] if stage.quick else more
    failed: set[str] = set()
    wrong: list[str] = []
    with torch_settings(stage.device):
        for case in chosen:
            if not stage.allows(f"{case.op} {case.label}"):
                break
            for row in check_case(case, stage):
                table.append([{**row, **stage.state.read()}])
                stage.say(f"{row['op']}, {row['shape']}: {row['check']} {row['status']} {row['note']}")
                failed |= {row["status"]} & ({"error"} if case.left_to_torch else {"error", "torch"})
                if row["status"] in ("WRONG", "REFUSED"):
                    wrong.append(f"{row['op']} {row['shape']}: {row['check']}: {row['note']}")
    stage.end_part("ops", *failed)
    if not stage.quick and not stage.left_out:
        _further(stage, table)
    elif not stage.left_out and stage.allows("the loader's images"):
        _tests(stage, table, "the loader's images", LOADER_TESTS)
    if wrong:
        raise WrongValue("; ".join(wrong))


def is_of_the_step(case: Case) -> bool:
    """True if a training step makes the call of this case: a core case, or one with certain words in its label."""
    return case.core or any(word in case.label for word in ("packed", "drawn", "unmasked and"))


def _further(stage: Stage, table: RowFile) -> None:
    """Measure the rates that this GPU reaches, compare repeats of SDPA bitwise, and run the GPU tests, as time allows.

    table: file to which their rows are appended.
    """
    if stage.allows("ceilings"):
        measure_ceilings(stage)
    if stage.allows("SDPA's repeats"):
        statuses = set()
        for row in _sdpa_repeats(stage):
            statuses.add(row["status"])
            table.append([{**row, **stage.state.read()}])
            stage.say(f"{row['shape']}: {row['check']} {row['status']} {row['note']}")
        # One of its backends may be missing, and different repeats are a result.
        stage.end_part("SDPA's repeats", "error" if statuses == {"error"} else "ok")
    if stage.allows("the GPU tests"):
        _tests(stage, table, "the GPU tests", GPU_TESTS)


def _tests(stage: Stage, table: RowFile, part: str, names: Sequence[str]) -> None:
    row = run_tests(stage, names)
    table.append([row])
    stage.say(f"{part}, by pytest: {row['status']} {row['note']}")
    if row["status"] == "WRONG":
        raise WrongValue(f"{part} failed: {row['note']}; see pytest.log")
    stage.end_part(part, row["status"])


def check_case(case: Case, stage: Stage) -> Iterator[dict[str, Any]]:
    """Rows of all checks of a case, in order. After a wrong value no more checks follow."""
    started = time.perf_counter()

    def row(check: str, status: str, note: str = "") -> dict[str, Any]:
        seconds = round(time.perf_counter() - started, 3)
        return {"op": case.op, "shape": case.label, "check": check, "status": status, "note": note, "seconds": seconds}

    cuda, repeats = stage.device == "cuda", QUICK_REPEATS if stage.quick else REPEATS
    try:
        data = CaseData.make(case, stage.device)
    except torch.OutOfMemoryError as error:
        torch.cuda.empty_cache()
        yield row("reference", "error", one_line(error))
        return
    if cuda and (reasons := torch_reasons(case, data.sets[0])):
        yield row("kernels", "torch", reasons)
        return
    with use_backend("triton"):
        clock = CudaClock(1) if cuda else CpuClock(0.0)
        local = LocalContender(data, [ours(case, inputs) for inputs in data.sets], clock)
        bad = [(name, outcome) for name, outcome in local.check().items() if outcome.status != "ok"]
        if bad:
            name, outcome = bad[0]
            yield row("values", "WRONG", f"{name}: {outcome.status}: {outcome.note}")
            return
        yield row("values", "ok")
        whole = local.passes[-1]
        checks: list[tuple[str, Callable[[], str]]] = [
            ("kept results", lambda: local.check_kept_results(whole) or ""),
            ("repeats", lambda: _all_equal(local.repeats(whole, repeats if cuda else 3))),
        ]
        if cuda:
            checks += [
                ("kernels", lambda: local.kernels(whole)),
                ("capture", lambda: f"{local.graph(whole):.1f} us"),
                ("no waiting", lambda: _never_waits(local, whole)),
            ]
        for name, check in checks:
            try:
                yield row(name, "ok", check())
            except Refused as error:
                yield row(name, "REFUSED", str(error))
                return
            except WrongValue as error:
                yield row(name, "WRONG", str(error))
                return
            except Exception as error:  # a blind profiler or a busy host says nothing about the kernel
                yield row(name, "error", one_line(error))


def _all_equal(repeats: str) -> str:
    if ", the first" in repeats:
        raise Refused(f"results differ between repeats: {repeats}")
    return repeats


def _never_waits(local: LocalContender, name: str) -> str:
    local.run(name)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        local.run(name)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return ""


def measure_ceilings(stage: Stage) -> None:
    table = stage.table("ceilings", CEILING_COLUMNS)
    for row in ceiling_rows(stage.device, stage.dtype, shrink=256 if stage.rehearse else 1):
        table.append([{**row, **stage.state.read()}])
        rate = f"{row['gb_per_s']:.0f} GB/s" if "gb_per_s" in row else f"{row['tflops']:.2f} TFLOP/s"
        stage.say(f"{row['name']} {row['shape']}: {rate}")
    stage.end_part("ceilings")


def _sdpa_repeats(stage: Stage) -> Iterator[dict[str, Any]]:
    """Rows of SDPA's bitwise repeats at the image encoder's shape: is a run that resumes equal to the bit?"""
    shape = "B2 H1 D64 37x19" if stage.rehearse else "B512 H12 D64 197x197"
    found = [c for c in [*small_cases(stage.dtype), *cases(stage.batch, stage.dtype)] if c.label == shape]
    data = CaseData.make(found[0], stage.device)
    contexts = {"default": contextlib.nullcontext, "flash": flash_backend, "cudnn": cudnn_backend}
    for name, context in contexts.items():
        row = {"op": "SDPA", "shape": shape, "check": f"repeats, {name}"}
        clock = CpuClock(0.0) if stage.rehearse else CudaClock(1)
        try:
            local = LocalContender(data, [sdpa(inputs) for inputs in data.sets], clock, context)
            note = local.repeats("both", 3 if stage.rehearse else SDPA_REPEATS)
            yield {**row, "status": "different" if ", the first" in note else "ok", "note": note}
        except Exception as error:
            yield {**row, "status": "error", "note": one_line(error)}


def run_tests(stage: Stage, names: Sequence[str]) -> dict[str, Any]:
    """Row of tests of the suite that need a GPU, run by pytest in processes of their own."""
    row = {"op": "all", "shape": "", "check": "pytest"}
    root = source_root()
    files = [file for file in names if (root / file).exists()]
    if importlib.util.find_spec("pytest") is None or not files:
        return {**row, "status": "missing", "note": "pytest is not installed" if files else "there are no tests here"}
    jobs = ["-n", "8"] if importlib.util.find_spec("xdist") is not None and not stage.rehearse else []
    words = ["-q", "-p", "no:cacheprovider", "-m", "gpu", "--maxfail=20", *jobs, *files]
    limit = min(300.0, stage.budget.left)
    started = time.perf_counter()
    code = write_output(stage, "pytest.log", [sys.executable, "-m", "pytest", *words], limit)
    last = (stage.out / "pytest.log").read_text().strip().splitlines()[-1:]
    # 5: no test was collected, on a CPU as it should be. 4: pytest could not begin.
    nothing = "ok" if stage.rehearse else "missing"
    status = {0: "ok", 5: nothing, None: "out of time", 4: "error", 127: "error"}.get(code, "WRONG")
    seconds = round(time.perf_counter() - started, 1)
    return {**row, "status": status, "note": last[0][:300] if last else "", "seconds": seconds}


def write_output(stage: Stage, name: str, command: list[str], limit: float) -> int | None:
    """Run a command, write its output to a file as it comes, and return its exit code; None if the limit ended it."""
    with (stage.out / name).open("w") as file:
        return run_program(command, limit, file, {"TRITON_INTERPRET": "1" if stage.rehearse else "0"})
