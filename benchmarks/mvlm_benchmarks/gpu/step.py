"""Stage `step`: a training step of `base` against the baselines, its GPU time by category, and CUDA graphs.

A contender that runs out of memory is left out. The baselines need timm and transformers.
"""

import importlib.util
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
from mvlm_benchmarks.gpu.stage import Row, Stage, WrongValue
from mvlm_benchmarks.intervals import ratio
from mvlm_benchmarks.step.contenders import Contender, StepInputs, make_contenders, make_inputs
from mvlm_benchmarks.step.run import check_losses, step_settings
from mvlm_benchmarks.step.timing import ROUND_COLUMNS, measure_rounds
from mvlm_benchmarks.unavailable import one_line

COLUMNS = ("batch", *ROUND_COLUMNS)
CATEGORY_COLUMNS = ("batch", "category", "ms", "pct", "kernels", "longest")
GRAPH_COLUMNS = ("batch", "eager_ms", "graph_ms", "ratio", "ratio_low", "ratio_high", "verdict", "equal", "note")
ROUNDS = 5
BASELINE, OURS = "timm+roberta", ("plain", "fast")


def run(stage: Stage) -> None:
    """Run the stage. Writes step.csv, a row per timed step, categories.csv and graphs.csv."""
    batch = 4 if stage.rehearse else 128
    model = make_model(stage)
    with step_settings(model.log_scale.device, 0):
        _rounds(stage, model, batch)
        if stage.allows("the categories"):
            _categories(stage, model, 4 if stage.rehearse else 256)
        if stage.allows("CUDA graphs"):
            _graphs(stage, model)


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


def _rounds(stage: Stage, model: MaskVLM, batch: int) -> None:
    table = stage.table("step", COLUMNS)
    missing = [name for name in ("timm", "transformers") if importlib.util.find_spec(name) is None]
    problem, inputs = f"{', '.join(missing)} not installed" if missing else "", inputs_of(model, batch)
    ready: list[Contender] = []
    if not missing:
        try:
            ready = _checked(model, (BASELINE, *OURS), inputs)
        except WrongValue:
            raise
        except Exception as error:  # another version of transformers, for example; if it is ours, it comes again
            problem = one_line(error)
    if problem:
        table.append([{"contender": BASELINE, "note": f"missing: {problem}"}])
        stage.say(f"{BASELINE} is missing: {problem}")
        stage.end_part(BASELINE, "missing" if missing else "error")
        ready = _checked(model, OURS, inputs)

    def timed(row: Row) -> None:
        table.append([{**row, "batch": batch}])

    rows = measure_rounds(ready, inputs, 2 if stage.rehearse else ROUNDS, stage.budget, timed)
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
    stage.end_part("rounds", *("ok" if row.get("seconds") else "error" for row in rows))


def _checked(model: MaskVLM, names: tuple[str, ...], inputs: StepInputs) -> list[Contender]:
    """Contenders whose losses are right, else WrongValue."""
    ready = contenders_of(model, names)
    try:
        notes = check_losses(ready, model, inputs, precision_of(model.log_scale.device))
    except AssertionError as error:
        raise WrongValue(str(error)) from None
    assert not notes  # only compiled contenders have notes
    return ready


def _categories(stage: Stage, model: MaskVLM, batch: int) -> None:
    table = stage.table("categories", CATEGORY_COLUMNS)
    (fast,), inputs = contenders_of(model, ("fast",)), inputs_of(model, batch)

    def step() -> None:
        fast.backward(inputs)
        fast.update()

    try:
        rows = by_category(profile_call(step, stage.device))
    except torch.OutOfMemoryError as error:
        torch.cuda.empty_cache()
        rows = [{"category": one_line(error)}]
    table.append([{**row, "batch": batch, **stage.state.read()} for row in rows])
    for row in rows:
        stage.say(
            f"{row['category']:28}{row.get('ms', 0):9.2f} ms {row.get('pct', 0):5.1f} %  {row.get('longest', '')}"
        )
    stage.end_part("categories", "ok" if len(rows) > 1 else "error")


def _graphs(stage: Stage, model: MaskVLM) -> None:
    table = stage.table("graphs", GRAPH_COLUMNS)
    if stage.rehearse:
        table.append([{"note": "missing: a CPU has no CUDA graphs"}])
        stage.say("CUDA graphs are missing on a CPU")
        return
    statuses = []
    for batch in (32, 64, 128):
        if not stage.allows(f"the graph of a batch of {batch}"):
            return
        (fast,), inputs = contenders_of(model, ("fast",)), inputs_of(model, batch)
        try:
            row = _graph(fast, inputs)
        except Exception as error:
            row = {"note": one_line(error)}
            torch.cuda.empty_cache()
        statuses.append("ok" if "equal" in row else "error")
        table.append([{"batch": batch, **row, **stage.state.read()}])
        stage.say(f"batch {batch}: {row}")
        if row.get("equal") == "no":
            raise WrongValue(f"the loss of a captured step of {batch} pairs is not the eager step's")
    stage.end_part("graphs", *statuses)


def new_gradients(fast: Contender, inputs: StepInputs) -> torch.Tensor:
    """Forward and backward as in training, where backward writes gradients and does not add to them: the loss."""
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
