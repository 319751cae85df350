"""Stage `kernels`: every op against every other implementation, the most important cases first."""

from mvlm_benchmarks import machine
from mvlm_benchmarks.clock import WrongValue
from mvlm_benchmarks.gpu.correct import is_of_the_step
from mvlm_benchmarks.gpu.stage import DISTRIBUTIONS, Row, Stage
from mvlm_benchmarks.kernels import report
from mvlm_benchmarks.kernels.cases import cases
from mvlm_benchmarks.kernels.peers import PEERS
from mvlm_benchmarks.kernels.run import time_cases

QUICK_OPS = ("add_layer_norm", "gelu_linear", "cross_attention")


def run(stage: Stage) -> None:
    """Run stage `kernels`. Writes kernels.csv, kernels.json and kernels.svg; the last one needs matplotlib."""
    distributions = [*DISTRIBUTIONS, *(peer.distribution for peer in PEERS)]
    stage.about = machine.describe(stage.device, distributions) | {"figures": stage.about["figures"]}
    table = stage.table("kernels", report.COLUMNS)
    peers = [peer for peer in PEERS if not stage.rehearse or peer.name in ("eager", "liger", "quack")]
    chosen = [case for case in cases(stage.batch, stage.dtype) if case.core or not stage.rehearse]
    if stage.quick:
        peers = [peer for peer in peers if peer.name not in ("sdpa-math", "sdpa-efficient", "flex", "gather-first")]
        chosen = [case for case in chosen if case.op in QUICK_OPS and (is_of_the_step(case) or case.left_to_torch)]
    rows: list[Row] = []
    done, wrong = 0, []
    try:
        quick = stage.rehearse or stage.quick
        timed = time_cases(chosen, peers, stage.device, stage.about["device"], quick, stage.budget)
        for case, found in zip(chosen, timed, strict=False):
            table.append(found)
            stage.say(report.table(found))
            rows += found
            done += 1
            own = [row for row in found if row["contender"] == "ours"]
            bad = [row for row in own if row["status"] in ("WRONG", "REFUSED")]
            wrong += [f"{row['op']} {row['shape']} {row['pass']}: {row['note']}" for row in bad[:1]]
            statuses = [row["status"] for row in own if not (case.left_to_torch and row["status"] == "torch")]
            stage.end_part(f"{case.op} {case.label}", *statuses)
    finally:
        if rows:
            report.write_figures(rows, stage.about, stage.out / "kernels.figures.json")
            _plot(stage, rows)
    if done < len(chosen):
        stage.leave_out(f"{chosen[done].op} {chosen[done].label}")
    stage.say(report.footer(rows))
    if wrong:
        raise WrongValue("; ".join(wrong))


def _plot(stage: Stage, rows: list[Row]) -> None:
    try:
        report.plot(rows, stage.about, stage.out / "kernels.svg")
    except ImportError as error:
        stage.say(f"no plot: {error}")
