"""Stage `step`: a training step of `base` against the baselines, its GPU time by category, and CUDA graphs.

A contender that runs out of memory is left out. The baselines need timm and transformers.
"""

import statistics
import time
from typing import Any

import torch

from mvlm.config.model import MaskVLMConfig
from mvlm.device import autocast
from mvlm.model.maskvlm import MaskVLM
from mvlm_benchmarks.captions import caption_lengths
from mvlm_benchmarks.clock import recording
from mvlm_benchmarks.gpu.categories import by_category, profile_call
from mvlm_benchmarks.gpu.stage import Row, Stage
from mvlm_benchmarks.intervals import ratio
from mvlm_benchmarks.results import RowFile
from mvlm_benchmarks.step.contenders import Contender, StepInputs, make_contenders, make_inputs
from mvlm_benchmarks.step.run import check_losses, step_settings
from mvlm_benchmarks.step.timing import ROUND_COLUMNS, measure_rounds
from mvlm_benchmarks.unavailable import one_line

COLUMNS = ("batch", *ROUND_COLUMNS)
CATEGORY_COLUMNS = ("batch", "contender", "category", "ms", "pct", "kernels", "longest")
GRAPH_COLUMNS = ("batch", "eager_ms", "graph_ms", "ratio", "ratio_low", "ratio_high", "verdict", "equal", "note")
ROUNDS = 5
BASELINE, OURS = "timm+roberta", ("plain", "fast")


def run(stage: Stage) -> None:
    """Run stage `step`. Writes step.csv, a row per timed step, graphs.csv and categories.csv."""
    model = make_model(stage)
    tables = [stage.table("step", COLUMNS), stage.table("graphs", GRAPH_COLUMNS)]
    with step_settings(model.log_scale.device, 0):
        for batch in (4,) if stage.rehearse else (128, 64, 32):
            if not stage.allows(f"rounds of {batch} pairs"):
                return
            _rounds(stage, model, batch, tables[0])
        _graphs(stage, model, tables[1])
        for batch in (4,) if stage.rehearse else (128,) if stage.quick else (128, 256):
            if stage.allows(f"the categories of {batch} pairs"):
                _categories(stage, model, batch)


def make_model(stage: Stage) -> MaskVLM:
    """`base` with post-norm blocks, as the baselines have; `tiny` in a rehearsal."""
    torch.manual_seed(0)
    preset = "tiny" if stage.rehearse else "base"
    return MaskVLM(MaskVLMConfig.preset(preset, cross_norm="post")).to(stage.device)


def inputs_of(model: MaskVLM, batch: int) -> StepInputs:
    length = model.config.text_length
    return make_inputs(model, caption_lengths(batch, length, length / 3), model.log_scale.device)


def contenders_of(model: MaskVLM, names: tuple[str, ...]) -> list[Contender]:
    device = model.log_scale.device
    return make_contenders(names, model, True, lambda: autocast(device, precision_of(device)))


def precision_of(device: torch.device) -> str:
    return "bf16" if device.type == "cuda" else "fp32"


def _rounds(stage: Stage, model: MaskVLM, batch: int, table: RowFile) -> None:
    part, inputs = f"rounds of {batch} pairs", inputs_of(model, batch)
    ready, statuses = contenders_of(model, OURS), []
    try:
        ready = contenders_of(model, (BASELINE, *OURS))
    except Exception as error:  # a library is missing, or another version
        status, problem = "missing" if isinstance(error, ImportError) else "error", one_line(error)
        table.append([{"contender": BASELINE, "batch": batch, "note": f"{status}: {problem}"}])
        stage.say(f"{BASELINE} is {status}: {problem}")
        statuses.append(status)
    try:
        check_losses(ready, model, inputs, precision_of(model.log_scale.device))
    except Exception as error:  # in TF32 a loss may be off by more than usual: noted, and timed all the same
        table.append([{"contender": "losses", "batch": batch, "note": f"error: {one_line(error)}"}])
        stage.say(f"losses: {one_line(error)}")
        statuses.append("error")

    def timed(row: Row) -> None:
        table.append([{**row, "batch": batch}])

    rounds = 2 if stage.rehearse else 3 if stage.quick else ROUNDS
    rows = measure_rounds(ready, inputs, rounds, stage.budget, timed)
    others = {row["contender"]: row for row in rows if row.get("seconds")}
    for row in rows:
        if not row.get("seconds"):
            stage.say(f"{row['contender']}: {row['note']}")
            continue
        text = (
            f"{row['contender']}: {batch / statistics.median(row['seconds']):.1f} pairs/s, peak {row['peak_mb']:.0f} MB"
        )
        first = next(iter(others.values()))
        if row is not first:
            found = ratio([[x] for x in first["seconds"]], [[x] for x in row["seconds"]])
            text += f", {found.value:.2f} x {first['contender']} ({found.low:.2f} to {found.high:.2f})"
        stage.say(text)
    stage.end_part(part, *statuses, *("ok" if row.get("seconds") else "error" for row in rows))


def _categories(stage: Stage, model: MaskVLM, batch: int) -> None:
    """Measure the GPU time of a step by category, of the fast step and of the baseline."""
    table, inputs = stage.table(f"categories-{batch}", CATEGORY_COLUMNS), inputs_of(model, batch)
    for name in ("fast", BASELINE):
        try:
            (contender,) = contenders_of(model, (name,))

            def step(one: Contender = contender) -> None:
                one.backward(inputs)
                one.update()

            rows, status = by_category(profile_call(step, stage.device)), "ok"
        except Exception as error:  # no memory, or a blind profiler
            rows, status = [{"category": one_line(error)}], "error"
            model.zero_grad(set_to_none=True)
            torch.cuda.empty_cache()
        table.append([{**row, "batch": batch, "contender": name, **stage.state.read()} for row in rows])
        for row in rows:
            stage.say(f"{name:14}{row['category']:28}{row.get('ms', 0):9.2f} ms  {row.get('longest', '')}")
        stage.end_part(f"categories of {name}, {batch} pairs", status if rows else "error")


def _graphs(stage: Stage, model: MaskVLM, table: RowFile) -> None:
    if stage.rehearse:
        table.append([{"note": "missing: a CPU has no CUDA graphs"}])
        stage.say("CUDA graphs are missing on a CPU")
        return
    statuses = []
    for batch in (64,) if stage.quick else (32, 64, 128):
        if not stage.allows(f"the graph of a batch of {batch}"):
            return
        (fast,), inputs = contenders_of(model, ("fast",)), inputs_of(model, batch)
        try:
            row = _graph(fast, inputs)
        except Exception as error:
            row = {"note": one_line(error)}
            torch.cuda.empty_cache()
        statuses.append("ok" if row.get("equal", "no") != "no" else "error")
        table.append([{"batch": batch, **row, **stage.state.read()}])
        stage.say(f"batch {batch}: {row}")
    stage.end_part("graphs", *statuses)


def new_gradients(fast: Contender, inputs: StepInputs) -> torch.Tensor:
    """Run forward and backward with gradients cleared before, as in training. Returns the loss, a scalar."""
    fast.module.zero_grad(set_to_none=True)
    return fast.backward(inputs).total.detach()


def _graph(fast: Contender, inputs: StepInputs) -> Row:
    """Times of forward and backward, eager and replayed from one graph, in turns."""

    def step() -> Any:
        return new_gradients(fast, inputs)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            wanted = step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    fast.module.zero_grad(set_to_none=True)
    with recording(graph):
        found = step()
    found.fill_(float("nan"))
    graph.replay()
    equal = "to the bit" if torch.equal(found, wanted) else "no"
    if equal == "no" and abs(found.item() / wanted.item() - 1) < 1e-3:
        equal = "to 0.1 %"
    times: dict[Any, list[list[float]]] = {step: [], graph.replay: []}
    for _ in range(10):
        for call, rounds in times.items():
            torch.cuda.synchronize()
            start = time.perf_counter()
            call()
            torch.cuda.synchronize()
            rounds.append([1e3 * (time.perf_counter() - start)])
    fast.module.zero_grad(set_to_none=True)
    eager, replayed = times.values()
    over = ratio(replayed, eager)
    return {
        "eager_ms": statistics.median(x for (x,) in eager), "graph_ms": statistics.median(x for (x,) in replayed),
        "ratio": over.value, "ratio_low": over.low, "ratio_high": over.high, "verdict": over.verdict, "equal": equal,
        "note": "forward and backward, without the optimizer",
    }  # fmt: skip
