"""Stage `sanitizer`: small calls of each op under compute-sanitizer, which finds what values cannot show.

memcheck finds accesses out of bounds, racecheck races in shared memory, initcheck reads of memory that nobody wrote.
"""

import re
import shutil
import sys
import time

import torch

from mvlm_benchmarks.gpu.processes import run_and_keep
from mvlm_benchmarks.gpu.small_cases import small_cases
from mvlm_benchmarks.gpu.stage import Row, Stage, WrongValue
from mvlm_benchmarks.gpu.variants import launches_of

COLUMNS = ("tool", "cases", "status", "errors", "note", "seconds")
TOOLS = ("memcheck", "racecheck", "initcheck")
FOUND = 9
"""Exit code with which a tool says that it found an error."""


def run(stage: Stage) -> None:
    """Run the stage. Writes sanitizer.csv, a row per tool, and sanitizer.txt with what the tools printed."""
    table = stage.table("sanitizer", COLUMNS)
    program = shutil.which("compute-sanitizer")
    for number, tool in enumerate(TOOLS):
        if not stage.budget.left:
            stage.leave_out(tool)
            return
        row = check(stage, program, tool, stage.budget.left / (len(TOOLS) - number))
        table.append([{**row, **stage.state.read()}])
        stage.say(f"{tool}: {row['status']} {row['note']}")
        if row["status"] == "WRONG":
            raise WrongValue(f"{tool}: {row['note']}; see sanitizer.txt")
        stage.end_part(tool, row["status"])
        if program is None:  # one round without a tool has shown that the calls work
            return


def check(stage: Stage, program: str | None, tool: str, limit: float) -> Row:
    """Row of one tool over all small cases, in one process: torch takes longer to start under a tool than a case.

    Without the tool the cases are called all the same, and the row says so. limit: seconds.
    """
    command = [sys.executable, "-m", "mvlm_benchmarks.gpu.small_calls", *(["--rehearse"] if stage.rehearse else [])]
    if program is not None:
        command = [program, "--tool", tool, "--error-exitcode", str(FOUND), *_options(tool), *command]
    started = time.perf_counter()
    row: Row = {"tool": tool, "cases": 0, "errors": None}
    # torch's allocator would hide accesses beyond a tensor's end.
    environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    code, printed = run_and_keep(command, max(1.0, limit), stage.out / "sanitizer.txt", tool, environment)
    row["seconds"] = round(time.perf_counter() - started, 1)
    row["cases"] = sum(line.endswith(": ok") for line in printed.splitlines())
    if code is None:
        return row | {"status": "out of time", "note": f"after {limit:.0f} s and {row['cases']} cases"}
    return row | judge(program is not None, code, printed)


def _options(tool: str) -> list[str]:
    """Options by which a tool looks at our kernels alone, which saves most of its time.

    initcheck looks at all kernels, because it has to know what those of torch wrote. CUDA 12.2 and older call the
    option --kernel-regex.
    """
    if tool == "initcheck":
        return []
    kernels = {x.kernel.__name__ for c in small_cases(torch.bfloat16) for x in launches_of(c, c.make("meta"), 90)}
    # Calls of the driver that fail are often torch's questions, and no errors.
    options = ["--report-api-errors", "no"] if tool == "memcheck" else []
    return options + [word for name in sorted(kernels) for word in ("--kernel-name", f"kernel_substring={name}")]


def judge(has_tool: bool, code: int, output: str) -> Row:
    """Status, number of errors and note from a tool's exit code and output."""
    found = re.search(r"(?:ERROR SUMMARY|RACECHECK SUMMARY): (\d+) (?:errors?|hazards?)", output)
    errors = int(found.group(1)) if found else None
    wrong = [line for line in output.splitlines() if re.search(r": (WRONG|error|REFUSED): ", line)]
    if wrong:
        return {"status": "WRONG", "errors": errors, "note": wrong[0][:300]}
    if errors or (code == FOUND and "Device not supported" not in output):
        return {"status": "WRONG", "errors": errors, "note": found.group(0) if found else f"exit code {code}"}
    if code:  # the tool does not know the device, or the program did not start: no kernel is wrong
        last = [line for line in output.splitlines() if line.strip("= ")][-1:]
        return {"status": "error", "errors": errors, "note": f"exit code {code}: {''.join(last)[:200]}"}
    if not has_tool:
        return {"status": "missing", "errors": None, "note": "compute-sanitizer is not installed; the calls are right"}
    if errors is None:
        return {"status": "error", "errors": None, "note": "the tool printed no summary"}
    return {"status": "ok", "errors": 0, "note": ""}
