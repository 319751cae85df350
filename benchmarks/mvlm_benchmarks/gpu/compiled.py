"""Stage `compiled`: the peer compiled in three ways, the fast step eagerly and in two compiled forms.

Blocks of one class and shape share their code, so they make a few graphs. A whole step is one large graph.
"""

import copy
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch

from mvlm.model.attention import FeedForward
from mvlm.model.maskvlm import MaskVLM
from mvlm_benchmarks.gpu.stage import Row, Stage
from mvlm_benchmarks.gpu.step import BASELINE, contenders_of, inputs_of, make_model, precision_of
from mvlm_benchmarks.intervals import ratio
from mvlm_benchmarks.step.contenders import Contender, raise_recompile_limit
from mvlm_benchmarks.step.run import TOLERANCE_COMPILED, assert_losses_equal, step_settings
from mvlm_benchmarks.step.timing import measure_rounds, time_step
from mvlm_benchmarks.unavailable import one_line

COLUMNS = ("contender", "batch", "round", "seconds", "loss", "status", "note")
ROUNDS = 5


def by_region(model: MaskVLM) -> Contender:
    """Contender of the fast implementation in which the feed-forward layers alone are compiled.

    Both their forward and their method `branch`, which post-norm blocks call in its place, are compiled.
    """
    raise_recompile_limit()  # a step has nine shapes of them
    for module in model.modules():
        if isinstance(module, FeedForward):
            module.compile(dynamic=False)
            module.branch = torch.compile(module.branch, dynamic=False)
    return contenders_of(model, ("fast",))[0]


def peer_by_block(model: MaskVLM) -> Contender:
    """timm and transformers compiled block by block, for static shapes: the fastest start."""
    raise_recompile_limit()
    contender = contenders_of(model, (BASELINE,))[0]
    for module in contender.module.modules():
        if type(module).__name__ in PEER_BLOCKS:
            module.compile(dynamic=False)
    return contender


def peer_whole(model: MaskVLM, mode: str | None = None) -> Contender:
    """timm and transformers compiled as one graph for static shapes, in a mode of torch.compile."""
    contender = contenders_of(model, (BASELINE,))[0]
    return replace(contender, call=torch.compile(contender.module, dynamic=False, mode=mode))


PEER_BLOCKS = ("Block", "RobertaLayer")
WAYS: dict[str, Callable[[MaskVLM], Contender]] = {
    "fast": lambda model: contenders_of(model, ("fast",))[0],
    "timm+roberta, blocks compiled": peer_by_block,
    "timm+roberta, compiled": peer_whole,
    "timm+roberta, max-autotune": partial(peer_whole, mode="max-autotune-no-cudagraphs"),
    "fast, feed-forward compiled": by_region,
    "fast, whole step compiled": lambda model: contenders_of(model, ("fast-compiled",))[0],
}


def run(stage: Stage) -> None:
    """Run stage `compiled`. Writes compiled.csv: a row for the first step of each way, and one per timed step."""
    table = stage.table("compiled", COLUMNS)
    model, batch = make_model(stage), 4 if stage.rehearse else 128
    names = list(WAYS)[:4] if stage.quick else list(WAYS)
    if stage.rehearse:  # a CPU compiles blocks in seconds, and whole steps in minutes
        names = [name for name in names if "blocks" in name or name == "fast"]
    ways = {name: WAYS[name] for name in names}
    seconds: dict[str, list[list[float]]] = {}
    ready: dict[str, Contender] = {}

    def append(row: Row) -> None:
        table.append([{**row, **stage.state.read()}])

    with step_settings(model.log_scale.device, 0):
        inputs = inputs_of(model, batch)
        for name, make in ways.items():
            if not stage.allows(name):
                break
            row, contender = _first_step(stage, name, make, model, inputs, ready)
            append(row)
            stage.say(f"{name}: {row['status']}, first step {row['seconds'] or 0:.1f} s {row['note']}")
            if contender is None:
                stage.end_part(name, row["status"])
                continue
            ready[name], seconds[name] = contender, []
            # Everything that is ready takes a turn now, so that there are figures if a later way never gets ready.
            for number in range(1 if stage.rehearse else ROUNDS):
                for other, ready_one in ready.items():
                    took, _, loss = time_step(ready_one, inputs)
                    row = {"contender": other, "batch": batch, "round": number, "seconds": took, "loss": loss}
                    append({**row, "status": "ok"})
                    seconds[other].append([took])
            _report(stage, seconds, batch)
            stage.end_part(name)
        for smaller in (64, 32) if stage.quick and not stage.rehearse else ():
            if stage.allows(f"{smaller} pairs"):
                note = partial(_noted, append, smaller)
                by_block = list(ready.values())[:2]  # a whole step would be compiled again
                measure_rounds(by_block, inputs_of(model, smaller), ROUNDS, stage.budget, note)
                stage.end_part(f"{smaller} pairs")


def _noted(append: Callable[[Row], None], batch: int, row: Row) -> None:
    append({**row, "batch": batch, "status": "error" if row["note"] else "ok"})


def _first_step(
    stage: Stage, name: str, make: Callable[[MaskVLM], Contender], model: MaskVLM, inputs, ready: dict[str, Contender]
) -> tuple[Row, Contender | None]:
    """Compile by running one step, and compare its losses with the eager ones."""
    start = time.perf_counter()
    row: Row = {"contender": name, "round": "first", "seconds": None, "status": "ok", "note": ""}
    try:
        contender = make(copy.deepcopy(model))
        losses = contender.backward(inputs)
        contender.update()
        if model.log_scale.is_cuda:
            torch.cuda.synchronize()
        row["seconds"] = time.perf_counter() - start
        if "fast" in ready:
            with torch.no_grad():
                wanted = ready["fast"].losses(inputs)
            assert_losses_equal(name, losses, wanted, TOLERANCE_COMPILED[precision_of(model.log_scale.device)])
    except AssertionError as error:
        return row | {"status": "WRONG", "note": str(error)}, None
    except Exception as error:
        return row | {"status": "error", "note": one_line(error)}, None
    return row, contender


def _report(stage: Stage, seconds: dict[str, list[list[float]]], batch: int) -> None:
    for name, rounds in seconds.items():
        text = f"{name}: {batch / statistics.median(x for (x,) in rounds):.1f} pairs/s"
        base = seconds.get("fast", rounds)
        count = min(len(base), len(rounds))
        if name != "fast" and count:
            found = ratio(base[-count:], rounds[-count:])
            text += f", {found.value:.2f} x eager ({found.low:.2f} to {found.high:.2f}): {found.speed_verdict}"
        stage.say(text)
