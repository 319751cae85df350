"""Stage `sanitizer`: one small call of each op under compute-sanitizer, which finds what values cannot show.

memcheck finds accesses out of bounds, racecheck races in shared memory, initcheck reads of memory that nobody wrote.
"""

import re
import shutil
import sys
import time

from mvlm_benchmarks.gpu.processes import run_and_keep
from mvlm_benchmarks.gpu.small_cases import small_cases
from mvlm_benchmarks.gpu.stage import Row, Stage, WrongValue

COLUMNS = ("tool", "op", "status", "errors", "note", "seconds")
TOOLS = ("memcheck", "racecheck", "initcheck")
FOUND = 9
"""Exit code with which a tool says that it found an error."""


def run(stage: Stage) -> None:
    """Run the stage. Writes sanitizer.csv, and sanitizer.txt with what the tools printed."""
    table = stage.table("sanitizer", COLUMNS)
    program = shutil.which("compute-sanitizer")
    ops = list(dict.fromkeys(case.op for case in small_cases(stage.dtype)))
    for tool in TOOLS:
        for op in ops:
            if not stage.allows(f"{tool} of {op}"):
                return
            row = check(stage, program, tool, op)
            table.append([{**row, **stage.state.read()}])
            stage.say(f"{tool}, {op}: {row['status']} {row['note']}")
            if row["status"] == "WRONG":
                raise WrongValue(f"{tool}, {op}: {row['note']}; see sanitizer.txt")
        stage.finished.append(tool)
        if program is None:  # one round without a tool has shown that the calls work
            return


def check(stage: Stage, program: str | None, tool: str, op: str, limit: float = 55.0) -> Row:
    """Row of one op under one tool. Without the tool the op is called all the same, and the row says so."""
    command = [sys.executable, "-m", "mvlm_benchmarks.gpu.small_calls", "--op", op]
    command += ["--rehearse"] if stage.rehearse else []
    if program is not None:
        command = [program, "--tool", tool, "--error-exitcode", str(FOUND), *command]
    started = time.perf_counter()
    row: Row = {"tool": tool, "op": op, "errors": None}
    # torch's allocator would hide accesses beyond a tensor's end.
    environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    limit = max(1.0, min(stage.budget.left, limit) if not stage.rehearse else 300.0)
    code, printed = run_and_keep(command, limit, stage.out / "sanitizer.txt", f"{tool} {op}", environment)
    row["seconds"] = round(time.perf_counter() - started, 1)
    if code is None:
        return row | {"status": "out of time", "note": f"after {limit:.0f} s"}
    return row | judge(program is not None, code, printed)


def judge(has_tool: bool, code: int, output: str) -> Row:
    """Status, number of errors and note from a tool's exit code and output."""
    found = re.search(r"(?:ERROR SUMMARY|RACECHECK SUMMARY): (\d+) (?:errors?|hazards?)", output)
    errors = int(found.group(1)) if found else None
    wrong = [line for line in output.splitlines() if re.search(r": (WRONG|error|REFUSED): ", line)]
    if wrong:
        return {"status": "WRONG", "errors": errors, "note": wrong[0][:300]}
    if errors or code == FOUND:
        return {"status": "WRONG", "errors": errors, "note": found.group(0) if found else f"exit code {code}"}
    if code:  # the tool does not know the device, or the program did not start: no kernel is wrong
        last = [line for line in output.splitlines() if line.strip("= ")][-1:]
        return {"status": "error", "errors": errors, "note": f"exit code {code}: {''.join(last)[:200]}"}
    if not has_tool:
        return {"status": "missing", "errors": None, "note": "compute-sanitizer is not installed; the calls are right"}
    if errors is None:
        return {"status": "error", "errors": None, "note": "the tool printed no summary"}
    return {"status": "ok", "errors": 0, "note": ""}
