"""``mvlm bench kernels``: every op, at every shape, against every peer that is installed."""

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from mvlm.device import choose_device
from mvlm.errors import ConfigError
from mvlm_benchmarks import machine, report
from mvlm_benchmarks.base import Worker, export
from mvlm_benchmarks.cases import Case, cases
from mvlm_benchmarks.clock import make_clock, settings
from mvlm_benchmarks.compare import Row, bench_case, rows_of
from mvlm_benchmarks.peers import EAGER, PEERS, Peer
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
    """Time, print a table for each case as it is done, write the CSV, the plot and (json) the JSON; returns the files.

    ops, peers: names; none means all. ConfigError on a name, a device, a type or a revision that there is not, and
    where Triton would interpret its kernels on a GPU.
    """
    chosen_ops = _chosen("ops", ops, list(EAGER))
    names = _chosen("peers", peers, [peer.name for peer in PEERS])
    chosen_peers = [peer for peer in PEERS if peer.name in names]
    kind = choose_device(device).type
    if dtype not in ("auto", *DTYPES):
        raise ConfigError(f"dtype: wanted auto, {', '.join(DTYPES)}, got {dtype!r}")
    if kind == "cuda" and os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        raise ConfigError("TRITON_INTERPRET: wanted unset on a GPU, got 1, which would time torch; unset it")
    # bfloat16 products are slow on most CPUs, and what is timed there is torch.
    element = DTYPES[("bf16" if kind == "cuda" else "fp32") if dtype == "auto" else dtype]
    batch = 256 if kind == "cuda" else 2 if quick else 4
    chosen_cases = [c for c in cases(batch, element) if c.op in chosen_ops and (c.core or not quick)]
    with tempfile.TemporaryDirectory() as folder:
        about = machine.describe(kind, [peer.distribution for peer in PEERS])
        worker = None
        if base is not None:
            about["base_commit"] = export(machine.source_root(), base, Path(folder))
            worker = Worker(Path(folder), kind, quick, batch)
        try:
            rows = _rows(chosen_cases, chosen_peers, about, kind, quick, worker)
        finally:
            if worker is not None:
                worker.close()
    return report.write(rows, about, out, json)


def _rows(
    chosen: list[Case], peers: list[Peer], about: dict, kind: str, quick: bool, worker: Worker | None
) -> list[Row]:
    gpu = peak_rates(about["device"]) if kind == "cuda" else None
    clock = make_clock(kind, quick)
    rows: list[Row] = []
    print(report.heading(about))
    with settings(kind):
        for case in chosen:
            entries = bench_case(case, kind, peers, clock, 1 if quick else 3, worker)
            found = rows_of(case, entries, gpu)
            del entries
            print(report.table(found), flush=True)
            rows += found
            # A compiled function is kept for its shape alone; the next case is another.
            torch.compiler.reset()
            if kind == "cuda":
                torch.cuda.empty_cache()
    print(report.closing(rows, about))
    return rows


def _chosen(what: str, wanted: Sequence[str], known: list[str]) -> list[str]:
    unknown = [name for name in wanted if name not in known]
    if unknown:
        raise ConfigError(f"{what}: wanted some of {', '.join(known)}, got {', '.join(map(repr, unknown))}")
    return list(wanted) or known
