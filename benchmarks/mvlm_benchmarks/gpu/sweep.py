"""Stage `sweep`: every kernel with other tiles, warps, stages and register limits, values checked, in turns.

Variants are compiled in other processes first, and each is timed in three turns, so that a drifting clock affects all.
The fastest of nine equal variants looks faster than the default by chance. So the fastest that is right and repeats to
the bit is timed again, in nine turns with the default, and wins if the interval of their ratio in these is below 1.
Winners are exceptions to the rules by which launchers choose tiles. Those of cross-attention go into a copy of its
table, which `MVLM_KERNELS_CONFIGS` reads.
"""

import json
import os
import sys
from collections import defaultdict
from collections.abc import Iterable

import torch

from mvlm_benchmarks.clock import CpuClock, CudaClock, WrongValue, torch_settings
from mvlm_benchmarks.gpu.processes import run_program
from mvlm_benchmarks.gpu.stage import Row, Stage
from mvlm_benchmarks.gpu.variants import Options, Target, chosen_cases, long_sides, targets_of, variants
from mvlm_benchmarks.intervals import FASTER, ratio
from mvlm_benchmarks.kernels.measure import LocalContender, Outcome
from mvlm_benchmarks.kernels.peers import ours
from mvlm_benchmarks.kernels.reference import CaseData
from mvlm_benchmarks.machine import gpu_arch
from mvlm_benchmarks.results import RowFile
from mvlm_benchmarks.unavailable import one_line
from mvlm_dataloading.files import write_json
from mvlm_kernels import dispatch, use_backend
from mvlm_kernels.cross_attention import tiles

COLUMNS = ("target", "kernel", "change", "turn", "us", "status", "note", "registers", "spill_bytes", "shared")
TURNS, TURNS_AGAIN = 3, 9
"""Number of timed turns of every variant; and of further turns of the default and the fastest one, which decide."""
Calls = defaultdict[int, list[tuple[float, ...]]]
"""Number of a variant -> the microseconds of all calls of each turn."""


def run(stage: Stage) -> None:
    """Run stage `sweep`.

    Writes sweep.csv, a row per turn of each variant, tile_exceptions.json and configs/cross_attention.json.
    """
    table = stage.table("sweep", COLUMNS)
    costs = compile_variants(stage)
    winners: list[tuple[Target, Row]] = []
    _write_exceptions(stage, winners)
    cases = chosen_cases(stage.batch, stage.dtype, stage.rehearse)
    with torch_settings(stage.device), use_backend("triton"):
        for case in cases:
            if not stage.allows(f"{case.op} {case.label}"):
                break
            try:
                data = CaseData.make(case, stage.device)
            except torch.OutOfMemoryError:
                stage.say(f"{case.op} {case.label}: out of memory")
                stage.end_part(f"{case.op} {case.label}", "out of memory")
                torch.cuda.empty_cache()
                continue
            targets = targets_of(case, data.sets[0], _arch(stage))
            if not targets and not case.left_to_torch:
                stage.end_part(f"{case.op} {case.label}", "no kernel")
            for target in targets:
                if winners and not stage.allows(target.name):
                    break
                best = sweep_target(stage, target, data, costs, table)
                winners.append((target, best))
                _write_exceptions(stage, winners)
                stage.say(f"{target.name}: {best['said']}")
                stage.finished.append(target.name)


def sweep_target(
    stage: Stage, target: Target, data: CaseData, costs: dict[tuple[str, str], Row], table: RowFile
) -> Row:
    """Check and time one kernel with other launch options. Returns `winner`, `ratio` and `said`.

    `winner` has the changed options, none if the default is best; `ratio` is its time over the default's; `said` is a
    sentence for the log. costs: registers and spills by (target, change as JSON).
    """
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

    def faster(number: int, calls: Calls) -> float | None:
        """Time of a variant over the default's, if the variant is right and faster by more than the noise."""
        if outcomes[number].status != "ok":
            return None
        found = ratio(calls[number], calls[0])
        return found.value if found.verdict == FASTER else None

    ratios = {number: over for number in range(1, len(changes)) if (over := faster(number, calls)) is not None}
    fastest, best = min(ratios, key=ratios.__getitem__, default=0), None
    if fastest:
        for turn in range(turns, turns + turns_again):
            take(turn, (0, fastest) if turn % 2 else (fastest, 0), calls_again)
        best = faster(fastest, calls_again)
    wrong = sum(outcome.status != "ok" for outcome in outcomes.values())
    said = "the default stays" if best is None else f"{_text(changes[fastest])} takes {best:.2f} of the default's time"
    if fastest and best is None:
        said += f", {_text(changes[fastest])} was faster by chance or failed later"
    said += f"; {len(changes)} variants, {wrong} of them failed"
    return {"winner": changes[fastest if best is not None else 0], "ratio": best or 1.0, "said": said}


def _turn(local: LocalContender, name: str, turn: int, calls: list[tuple[float, ...]]) -> tuple[float | None, Outcome]:
    """Time a pass once with the launch options in force. Returns (microseconds or None, outcome).

    Timed values are checked; before turn 0 also the results and their bitwise repeats. The times of the calls are
    appended to `calls`.
    """
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


def compile_variants(stage: Stage) -> dict[tuple[str, str], Row]:
    """Compile all variants in other processes. Returns (target, change as JSON) -> registers, spills, or an error."""
    jobs = 1 if stage.rehearse else max(1, (os.cpu_count() or 2) - 4)
    command = [sys.executable, "-m", "mvlm_benchmarks.gpu.variants", "--batch", str(stage.batch), "--jobs", str(jobs)]
    command += ["--arch", f"sm_{_arch(stage)}", *(["--small"] if stage.rehearse else [])]
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
    write_json(stage.out / "tile_exceptions.json", content)
    by_key: dict[str, list[Options]] = defaultdict(list)
    for target, best in swept:
        if target.key:
            by_key[target.key].append(best["winner"])
    agreed = {key: options[0] for key, options in by_key.items() if all(one == options[0] for one in options)}
    table = tiles.with_exceptions(_arch(stage), {k: v for k, v in agreed.items() if v})
    write_json(stage.out / "configs" / "cross_attention.json", table)


def _arch(stage: Stage) -> int:
    return 90 if stage.rehearse else gpu_arch()


def _text(change: Options) -> str:
    return " ".join(f"{key}={value}" for key, value in change.items()) or "default"
