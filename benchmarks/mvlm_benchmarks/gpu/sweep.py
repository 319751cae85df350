"""Stage `sweep`: every kernel with other tiles, warps, stages and register limits, values checked, in turns.

Variants are compiled in other processes first, and each is timed in three turns, so that a drifting clock affects all.
The fastest of nine equal variants looks faster than the default by chance. So the fastest that is right and repeats to
the bit is timed again, in nine turns with the default, and wins if the interval of their ratio in these is below 1.
Winners are exceptions to the rules by which launchers choose tiles. Those of cross-attention go into a copy of its
table, which `MVLM_KERNELS_CONFIGS` reads.
"""

import contextlib
import json
import os
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator

import torch

from mvlm_benchmarks.clock import CpuClock, CudaClock, torch_settings
from mvlm_benchmarks.gpu.processes import run_program
from mvlm_benchmarks.gpu.stage import Row, Stage, WrongValue
from mvlm_benchmarks.gpu.variants import Options, Target, chosen_cases, long_sides, targets_of, variants
from mvlm_benchmarks.intervals import FASTER, ratio
from mvlm_benchmarks.kernels.measure import LocalContender, Outcome
from mvlm_benchmarks.kernels.peers import ours
from mvlm_benchmarks.kernels.reference import CaseData
from mvlm_benchmarks.results import RowFile, write_json
from mvlm_benchmarks.unavailable import one_line
from mvlm_kernels import dispatch, use_backend
from mvlm_kernels.cross_attention import tiles

COLUMNS = ("target", "kernel", "change", "turn", "us", "status", "note", "registers", "spill_bytes", "shared")
TURNS, TURNS_AGAIN = 3, 9
"""Turns of all variants, and further ones of the default and the fastest variant, from which alone it is judged."""
REHEARSED_ARCH = "sm_90"
Calls = defaultdict[int, list[tuple[float, ...]]]
"""Number of a variant -> the microseconds of all calls of each turn."""


def run(stage: Stage) -> None:
    """Run the stage.

    Writes sweep.csv, a row per turn of each variant, tile_exceptions.json, configs/cross_attention.json and sweep.svg.
    """
    table = stage.table("sweep", COLUMNS)
    costs = compile_variants(stage)
    winners: list[tuple[Target, Row]] = []
    summary: list[Row] = []
    cases = chosen_cases(stage.batch, stage.dtype, stage.rehearse)
    with _written(stage, winners, summary), torch_settings(stage.device), use_backend("triton"):
        for case in cases:
            if not stage.allows(f"{case.op} {case.shape}"):
                break
            try:
                data = CaseData.make(case, stage.device)
            except torch.OutOfMemoryError:
                stage.say(f"{case.op} {case.shape}: out of memory")
                stage.end_part(f"{case.op} {case.shape}", "out of memory")
                torch.cuda.empty_cache()
                continue
            targets = targets_of(case, data.sets[0], _arch(stage))
            if not targets and not case.left_to_torch:
                stage.end_part(f"{case.op} {case.shape}", "no kernel")
            for target in targets:
                if summary and not stage.allows(target.name):
                    break
                found = sweep_target(stage, target, data, costs, table)
                summary += found
                winners.append((target, found[0]))
                _write_exceptions(stage, winners)
                stage.say(f"{target.name}: {found[0]['said']}")
                stage.finished.append(target.name)


@contextlib.contextmanager
def _written(stage: Stage, winners: list[tuple[Target, Row]], summary: list[Row]) -> Iterator[None]:
    """Write the winners and the plot when the block ends, however it ends."""
    try:
        yield
    except BaseException:
        _write_exceptions(stage, winners)
        with contextlib.suppress(Exception):  # why the stage ended is what its log has to say
            _plot(stage, summary)
        raise
    _write_exceptions(stage, winners)
    _plot(stage, summary)


def sweep_target(
    stage: Stage, target: Target, data: CaseData, costs: dict[tuple[str, str], Row], table: RowFile
) -> list[Row]:
    """Check and time all variants of one kernel. Returns a row of each, with ratio and interval; the default first."""
    clock = CpuClock(0.0) if stage.rehearse else CudaClock(8)
    local = LocalContender(data, [ours(data.case, inputs) for inputs in data.sets], clock)
    changes = variants(target.kernel, target.options, few=stage.rehearse)
    outcomes = dict.fromkeys(range(len(changes)), Outcome("ok"))

    def take(turn: int, numbers: Iterable[int], calls: Calls) -> None:
        for number in numbers:
            if outcomes[number].status != "ok":
                continue
            change = changes[number]
            with dispatch.override_launch(target.kernel, **change), long_sides(target.case):
                us, outcomes[number] = _turn(local, target.pass_name, turn, calls[number])
            cost = costs.get((target.name, json.dumps(change)), {})
            row = {"target": target.name, "kernel": target.kernel, "change": _text(change), "turn": turn, "us": us}
            row |= {"status": outcomes[number].status, "note": outcomes[number].note or cost.get("error", "")}
            row |= {key: cost.get(key) for key in ("registers", "spill_bytes", "shared")}
            table.append([{**row, **stage.state.read()}])
            if number == 0 and outcomes[0].status != "ok":
                raise WrongValue(f"{target.name}, with its default options: {outcomes[0].note}")

    turns, turns_again = (1, 2) if stage.rehearse else (TURNS, TURNS_AGAIN)
    calls, calls_again = Calls(list), Calls(list)
    for turn in range(turns):
        take(turn, range(len(changes)), calls)
    rows = [_compared(target, changes[number], outcomes[number], calls, number) for number in range(len(changes))]
    fastest = min((n for n in range(1, len(rows)) if rows[n].get("verdict") == FASTER),
                  key=lambda n: rows[n]["ratio"], default=0)  # fmt: skip
    if fastest:
        for turn in range(turns, turns + turns_again):
            take(turn, (0, fastest) if turn % 2 else (fastest, 0), calls_again)
        rows[fastest] = _compared(target, changes[fastest], outcomes[fastest], calls_again, fastest)
    winner = fastest if rows[fastest].get("verdict") == FASTER else 0
    best = rows[winner]["ratio"] if winner else 1.0
    wrong = sum(row["status"] != "ok" for row in rows)
    said = f"{_text(changes[winner])} takes {best:.2f} of the default's time" if winner else "the default stays"
    if fastest and not winner:
        said += f", {_text(changes[fastest])} was faster by chance or failed later"
    rows[0] |= {"winner": changes[winner], "said": f"{said}; {len(rows)} variants, {wrong} of them failed"}
    rows[0]["ratio"] = best
    return rows


def _turn(local: LocalContender, name: str, turn: int, calls: list[tuple[float, ...]]) -> tuple[float | None, Outcome]:
    """One turn of a variant: values are checked, before the first turn also the repeats."""
    try:
        if turn == 0:
            bad = [outcome for outcome in local.check().values() if outcome.status != "ok"]
            if bad:
                return None, bad[0]
            repeats = local.repeats(name, 5)
            if ", the first" in repeats:
                return None, Outcome("WRONG", f"repeats differ: {repeats}")
        timing = local.time(name)
    except Exception as error:
        return None, Outcome("error", one_line(error))
    calls.append(timing.calls or (timing.us,))
    return timing.us, Outcome("ok")


def _compared(target: Target, change: Options, outcome: Outcome, calls: Calls, number: int) -> Row:
    """Row of a variant: its time over the default's, with the interval, if it is right."""
    row: Row = {"target": target.name, "change": _text(change), "status": outcome.status}
    if outcome.status == "ok":
        found = ratio(calls[number], calls[0])
        row |= {"ratio": found.value, "low": found.low, "high": found.high, "verdict": found.verdict}
    return row


def compile_variants(stage: Stage) -> dict[tuple[str, str], Row]:
    """Compile all variants in other processes. Returns (target, change as JSON) -> registers, spills, or an error."""
    jobs = 1 if stage.rehearse else max(1, (os.cpu_count() or 2) - 4)
    command = [sys.executable, "-m", "mvlm_benchmarks.gpu.variants", "--batch", str(stage.batch), "--jobs", str(jobs)]
    command += ["--arch", REHEARSED_ARCH if stage.rehearse else f"sm_{_arch(stage)}"]
    command += ["--small"] if stage.rehearse else []
    found: dict[tuple[str, str], Row] = {}
    file = stage.out / "variants.jsonl"
    problems = stage.out / "variants.log"
    with file.open("w") as output, problems.open("w") as errors:
        code = run_program(command, max(1.0, 0.5 * stage.budget.left), output, {"TRITON_INTERPRET": "0"}, errors)
    if code is None:
        stage.say("not all variants were compiled in half of the time; the others are compiled when they run")
    elif code:
        said = problems.read_text().strip().splitlines() or ["no message"]
        stage.say(f"variants are compiled when they run: their process failed, {said[-1]}")
    for line in file.read_text().splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:  # the line at which the process was ended
            continue
        found[row["target"], json.dumps(row["change"])] = row
    stage.say(f"{len(found)} variants compiled, {sum('error' in row for row in found.values())} cannot be")
    return found


def _write_exceptions(stage: Stage, swept: list[tuple[Target, Row]]) -> None:
    """Write the winners of the swept targets, and the table of tiles with those on which all cases of a key agree."""
    found = {
        target.name: {"key": target.key, "options": best["winner"], "over_default": best["ratio"]}
        for target, best in swept
        if best["winner"]
    }
    content = {f"sm_{_arch(stage)}": found, "rehearsal": stage.rehearse, "machine": stage.about}
    write_json(content, stage.out / "tile_exceptions.json")
    by_key: dict[str, list[Options]] = defaultdict(list)
    for target, best in swept:
        if target.key:
            by_key[target.key].append(best["winner"])
    agreed = {key: options[0] for key, options in by_key.items() if all(one == options[0] for one in options)}
    table = tiles.with_exceptions(_arch(stage), {k: v for k, v in agreed.items() if v})
    write_json(table, stage.out / "configs" / "cross_attention.json")


def _arch(stage: Stage) -> int:
    if stage.rehearse:
        return 90
    major, minor = torch.cuda.get_device_capability()
    return 10 * major + minor


def _text(change: Options) -> str:
    return " ".join(f"{key}={value}" for key, value in change.items()) or "default"


def _plot(stage: Stage, rows: list[Row]) -> None:
    """Draw time over the default's of every variant, a line per kernel."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        stage.say(f"no plot: {error}")
        return
    from mvlm_benchmarks.results import save_figure

    names = list(dict.fromkeys(row["target"] for row in rows))
    figure = Figure(figsize=(11, 0.35 * len(names) + 1.5), layout="constrained")
    axes = figure.subplots()
    for row in rows:
        if row.get("low") is not None:
            place = names.index(row["target"])
            axes.plot([row["low"], row["high"]], [place, place], color="#4477aa", linewidth=1)
            axes.plot([row["high"] if row["change"] == "default" else row["low"]], [place], "|", color="#cc6677")
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_yticks(range(len(names)), names, fontsize=6)
    axes.set_xlabel("time of a variant over the default's, 95 % interval; left is faster")
    save_figure(figure, stage.out / "sweep.svg")
