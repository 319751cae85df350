"""`mvlm bench kernels`: every op at every shape against every installed peer."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import torch._dynamo  # before --seconds can break off its import, which would leave half of it

from mvlm.device import choose_device
from mvlm.errors import ConfigError
from mvlm_benchmarks import machine
from mvlm_benchmarks.budget import Budget
from mvlm_benchmarks.ceilings import memory_rates
from mvlm_benchmarks.choices import choose
from mvlm_benchmarks.clock import make_clock, torch_settings
from mvlm_benchmarks.gpu_state import GpuState
from mvlm_benchmarks.kernels import report
from mvlm_benchmarks.kernels.cases import cases
from mvlm_benchmarks.kernels.compare import Row, bench_case, case_ceilings, rows_of
from mvlm_benchmarks.kernels.peers import PEERS, Peer
from mvlm_benchmarks.results import RowFile, heading
from mvlm_kernels.case import Case
from mvlm_kernels.hardware import peak_rates

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def run(
    ops: Sequence[str],
    peers: Sequence[str],
    out: Path | None,
    device: str = "auto",
    dtype: str = "auto",
    quick: bool = False,
    json: Path | None = None,
    seconds: float | None = None,
) -> list[Path]:
    """Time all cases, print a table of each, and write CSV and plot into `out`, and the JSON. Returns the files.

    Rows are in the CSV as soon as their case is timed. Plot and JSON follow at the end, also after an interruption.
    `mvlm_benchmarks.cli.kernels` describes the arguments.

    Raises:
        ConfigError: an unknown op, peer, device or dtype, a number of seconds that is not positive, or
            TRITON_INTERPRET is set on a GPU.
    """
    timed = dict.fromkeys(case.op for case in cases(1, torch.float32) if case.core or not quick)
    chosen_ops = choose("ops", ops, list(timed))
    names = choose("peers", peers, [peer.name for peer in PEERS])
    chosen_peers = [peer for peer in PEERS if peer.name in names]
    device_type = choose_device(device).type
    if dtype not in ("auto", *DTYPES):
        raise ConfigError(f"dtype: wanted auto, {', '.join(DTYPES)}, got {dtype!r}")
    if seconds is not None and not seconds > 0:
        raise ConfigError(f"seconds: wanted a number above 0, got {seconds:g}")
    if device_type == "cuda" and os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        raise ConfigError("TRITON_INTERPRET: wanted unset on a GPU, got 1, with which the ops run torch; unset it")
    # bfloat16 products are slow on most CPUs.
    element = DTYPES[("bf16" if device_type == "cuda" else "fp32") if dtype == "auto" else dtype]
    batch = 256 if device_type == "cuda" else 2 if quick else 4
    chosen_cases = [c for c in cases(batch, element) if c.op in chosen_ops and (c.core or not quick)]
    about = machine.describe(device_type, [peer.distribution for peer in PEERS])
    return _time_cases(chosen_cases, chosen_peers, about, out, json, device_type, quick, Budget(seconds))


def _time_cases(
    chosen: list[Case], peers: list[Peer], about: dict, out: Path | None, json: Path | None, device_type: str,
    quick: bool, budget: Budget,
) -> list[Path]:  # fmt: skip
    rows: list[Row] = []
    print(heading(about), flush=True)
    names = () if out is None else report.file_names(about, str(chosen[0].dtype).removeprefix("torch."), out)
    table = RowFile(names[0], about, report.COLUMNS) if names else None
    if device_type == "cpu":
        print(machine.load())
    try:
        for case_rows in time_cases(chosen, peers, device_type, about["device"], quick, budget):
            if table is not None:
                table.append(case_rows)
            print(report.table(case_rows), flush=True)
            rows += case_rows
    finally:
        if names:
            report.plot(rows, about, names[1])
        if json is not None:
            report.write_figures(rows, about, json)
    timed = len({(row["op"], row["shape"]) for row in rows})
    if timed < len(chosen):
        print(
            f"\n{timed} of {len(chosen)} cases were timed in {budget.used:.0f} s; the others did not fit into --seconds"
        )
    print(report.footer(rows))
    return [*names, *([json] if json is not None else [])]


def time_cases(
    chosen: Sequence[Case],
    peers: Sequence[Peer],
    device_type: str,
    device_name: str,
    quick: bool,
    budget: Budget,
) -> Iterator[list[Row]]:
    """Time cases one after the other, as long as the budget allows. Yields the rows of each.

    Args:
        device_name: name of the GPU, for the rates of its data sheet.
    """
    gpu = peak_rates(device_name) if device_type == "cuda" else None
    state, clock = GpuState(device_type), make_clock(device_type, quick)
    with torch_settings(device_type):
        rates = memory_rates(device_type)
        for case in chosen:
            if not budget.allows():
                return
            entries = bench_case(case, device_type, peers, clock, 1 if quick else 5, state, budget)
            rows = rows_of(case, entries, case_ceilings(case, device_type, gpu, rates))
            del entries
            yield rows
            # Compiled functions are for one shape. Drop them before the next case.
            torch.compiler.reset()
            if device_type == "cuda":
                torch.cuda.empty_cache()
