"""Stage `profile`: hardware counters of the kernels that matter, by Nsight Compute (`ncu`).

Clocks are left as they are (`--clock-control none`): on a rented machine they may not be set.
"""

import csv
import io
import shutil
import sys
import time
from collections.abc import Iterator

from mvlm_benchmarks.gpu.processes import run_and_keep
from mvlm_benchmarks.gpu.stage import Row, Stage, WrongValue

COLUMNS = ("kernel", "op", "section", "metric", "unit", "value", "status", "note", "seconds")
KERNELS = {  # kernel -> op that launches it at the paper's sizes
    "short_kv_backward": "cross_attention",
    "short_q_backward": "cross_attention",
    "long_kv_backward": "cross_attention",
    "loss_kernel": "masked_pixel_loss",
    "gather_kernel": "gather_patches",
    "place_backward_kernel": "place_tokens",
}
LIMIT = 60.0
"""Most seconds of one kernel."""


def run(stage: Stage) -> None:
    """Run the stage. Writes profile.csv, a row per counter, and profile.txt with what ncu printed."""
    table = stage.table("profile", COLUMNS)
    program = shutil.which("ncu")
    for kernel, op in KERNELS.items():
        if not stage.allows(f"the profile of {kernel}"):
            return
        rows = list(profile_kernel(stage, program, kernel, op))
        state = stage.state.read()
        table.append([{**row, **state} for row in rows])
        stage.say(f"{kernel}: {rows[0]['status']} {rows[0]['note']}, {len(rows)} rows")
        if rows[0]["status"] == "WRONG":
            raise WrongValue(f"{op}, while {kernel} was profiled: {rows[0]['note']}")
        stage.end_part(kernel, rows[0]["status"])


def profile_kernel(stage: Stage, program: str | None, kernel: str, op: str) -> Iterator[Row]:
    """Rows of the first launch of a kernel. One row with a reason if there are no counters."""
    row: Row = {"kernel": kernel, "op": op, "status": "ok", "note": ""}
    command = [sys.executable, "-m", "mvlm_benchmarks.gpu.small_calls", "--op", op, "--kernel", kernel]
    command += ["--rehearse"] if stage.rehearse else ["--paper"]
    if program is not None:
        options = ["--set", "full", "--clock-control", "none", "-c", "1", "-k", f"regex:^{kernel}", "--csv"]
        command = [program, *options, "--page", "details", *command]
    started = time.perf_counter()
    limit = max(1.0, min(LIMIT, stage.budget.left))
    code, printed = run_and_keep(command, limit, stage.out / "profile.txt", kernel)
    row["seconds"] = round(time.perf_counter() - started, 1)
    if code is None:
        yield row | {"status": "out of time", "note": f"after {limit:.0f} s"}
        return
    wrong = [line for line in printed.splitlines() if line.startswith(f"{op}, ") and not line.endswith(": ok")]
    if wrong:
        yield row | {"status": "WRONG", "note": wrong[0][:300]}
        return
    if program is None:
        yield row | {"status": "missing", "note": "ncu is not installed; the call is right"}
        return
    counters = list(read_counters(printed))
    if not counters:
        note = f"exit code {code}: {printed.strip()[-200:]}"
        yield row | {"status": "error", "note": note}
    for counter in counters:
        yield row | counter


def read_counters(output: str) -> Iterator[Row]:
    """Section, metric, unit and value of each line of ncu's CSV, which follows other output."""
    lines = output.splitlines()
    start = next((n for n, line in enumerate(lines) if line.startswith('"ID"')), len(lines))
    for found in csv.DictReader(io.StringIO("\n".join(lines[start:]))):
        if found.get("Metric Name"):
            yield {
                "section": found["Section Name"], "metric": found["Metric Name"], "unit": found["Metric Unit"],
                "value": found["Metric Value"],
            }  # fmt: skip
