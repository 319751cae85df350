"""`mvlm bench kernels`: every op at every shape against every installed peer."""

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from mvlm.device import choose_device
from mvlm.errors import ConfigError
from mvlm_benchmarks import machine
from mvlm_benchmarks.choices import choose
from mvlm_benchmarks.clock import make_clock, torch_settings
from mvlm_benchmarks.kernels import report
from mvlm_benchmarks.kernels.base_revision import BaseWorker, export_kernels
from mvlm_benchmarks.kernels.cases import Case, cases
from mvlm_benchmarks.kernels.compare import Row, bench_case, rows_of
from mvlm_benchmarks.kernels.peers import EAGER, PEERS, Peer
from mvlm_benchmarks.results import heading
from mvlm_kernels.hardware import peak_rates

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def run(
    ops: Sequence[str],
    peers: Sequence[str],
    out: Path,
    device: str = "auto",
    dtype: str = "auto",
    quick: bool = False,
    base: str | None = None,
    json: Path | None = None,
) -> list[Path]:
    """Time all cases, print a table of each, and write CSV, plot and JSON. Returns the files.

    Args:
        ops, peers: names; empty for all.
        out: folder of the CSV and the plot.
        base: git revision whose kernels are another contender.
        json: JSON file, or None.

    Raises:
        ConfigError: an unknown op, peer, device, dtype or revision, or TRITON_INTERPRET is set on a GPU.
    """
    chosen_ops = choose("ops", ops, list(EAGER))
    names = choose("peers", peers, [peer.name for peer in PEERS])
    chosen_peers = [peer for peer in PEERS if peer.name in names]
    device_type = choose_device(device).type
    if dtype not in ("auto", *DTYPES):
        raise ConfigError(f"dtype: wanted auto, {', '.join(DTYPES)}, got {dtype!r}")
    if device_type == "cuda" and os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        raise ConfigError("TRITON_INTERPRET: wanted unset on a GPU, got 1, with which the ops run torch; unset it")
    # bfloat16 products are slow on most CPUs.
    element = DTYPES[("bf16" if device_type == "cuda" else "fp32") if dtype == "auto" else dtype]
    batch = 256 if device_type == "cuda" else 2 if quick else 4
    chosen_cases = [c for c in cases(batch, element) if c.op in chosen_ops and (c.core or not quick)]
    with tempfile.TemporaryDirectory() as folder:
        about = machine.describe(device_type, [peer.distribution for peer in PEERS])
        worker = None
        if base is not None:
            about["base_commit"] = export_kernels(machine.source_root(), base, Path(folder))
            worker = BaseWorker(Path(folder), device_type, quick, batch)
        try:
            rows = _time_cases(chosen_cases, chosen_peers, about, device_type, quick, worker)
        finally:
            if worker is not None:
                worker.close()
    return report.write(rows, about, out, json)


def _time_cases(
    chosen: list[Case], peers: list[Peer], about: dict, device_type: str, quick: bool, worker: BaseWorker | None
) -> list[Row]:
    gpu = peak_rates(about["device"]) if device_type == "cuda" else None
    clock = make_clock(device_type, quick)
    rows: list[Row] = []
    print(heading(about))
    with torch_settings(device_type):
        for case in chosen:
            entries = bench_case(case, device_type, peers, clock, 1 if quick else 3, worker)
            case_rows = rows_of(case, entries, gpu)
            del entries
            print(report.table(case_rows), flush=True)
            rows += case_rows
            # Compiled functions are for one shape. Drop them before the next case.
            torch.compiler.reset()
            if device_type == "cuda":
                torch.cuda.empty_cache()
    print(report.footer(rows, about))
    return rows
