"""``mvlm bench step``: one pretraining step of ours against what a user would put together from libraries.

All contenders hold the same weights and see the same batch, masks and negatives; their losses are compared before
anything is timed. They take turns in one process, and a ratio is the median over the rounds, within which the machine
has had little time to change.
"""

import contextlib
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from mvlm.config import MaskVLMConfig
from mvlm.device import autocast, choose_device, has_fast_bf16
from mvlm.errors import ConfigError
from mvlm.model import MaskVLM
from mvlm.objectives import Losses
from mvlm_benchmarks import flops, machine, step_report
from mvlm_benchmarks.activations import peak_mb
from mvlm_benchmarks.contenders import (
    BASELINES,
    COMPILED,
    CONTENDERS,
    OTHER_METHOD,
    PLANS,
    SEED,
    STEP,
    Contender,
    Inputs,
    losses_of,
    make_contenders,
    make_inputs,
)  # fmt: skip
from mvlm_benchmarks.reasons import one_line
from mvlm_benchmarks.step_inputs import caption_lengths
from mvlm_benchmarks.step_profile import profile_steps
from mvlm_kernels.hardware import peak_rates

Row = dict[str, Any]
PRECISIONS = ("auto", "bf16", "fp32")
WARM_UP = 2
"""Rounds that are not counted: the optimizer's state, threads, caches."""
TOLERANCE = {"cpu": 1e-4, "cuda": 1e-3}
"""Largest difference of a loss over its value: in float32 on a CPU, where only the order of sums differs, and in TF32
on a GPU, where operands are rounded to 10 bits (ITM's then moves by 1e-4)."""
TOLERANCE_COMPILED = {"fp32": 1e-3, "bf16": 3e-2}
"""The same of compiled code, held against its eager form in the precision that is timed."""


def run(
    preset: str,
    batch: int,
    rounds: int,
    contenders: Sequence[str] = (),
    *,
    device: str = "auto",
    precision: str = "auto",
    threads: int = 0,
    optimizer: bool = True,
    json: Path | None = None,
    csv: Path | None = None,
    plot: Path | None = None,
    profile: Path | None = None,
) -> dict[str, Any]:
    """Check, time, print the tables and write the files asked for; returns what the JSON holds.

    ConfigError on a preset, a contender, a device, a precision or a number that cannot be.
    """
    names = _names(batch, rounds, threads, contenders, precision)
    # The libraries' cross-modality blocks are post-norm.
    config = MaskVLMConfig.preset(preset, cross_norm="post")
    chosen = choose_device(device)
    if precision == "auto":
        precision = "bf16" if has_fast_bf16(chosen) else "fp32"
    lengths = caption_lengths(batch, config.text_length, config.text_length / 3)
    with settings(chosen, threads):
        about = machine.describe(chosen.type, ["timm", "transformers", "numpy"])
        setup = {
            "preset": preset, "batch": batch, "precision": precision, "optimizer": optimizer, "rounds": rounds,
            "threads": torch.get_num_threads(), "caption_tokens": int(lengths.sum()), "longest": int(lengths.max()),
        }  # fmt: skip
        print(step_report.heading(about, setup), flush=True)
        torch.manual_seed(0)
        model = MaskVLM(config).to(chosen)
        inputs = make_inputs(model, lengths, chosen)
        ready = make_contenders(names, model, optimizer, functools.partial(autocast, chosen, precision))
        notes = check(ready, model, inputs, precision)
        counts = {name: flops.gflop_per_pair(config, lengths, name) for name in (next(iter(BASELINES)), *PLANS)}
        print(step_report.parts_table(counts), flush=True)
        able = [contender for contender in ready if contender.name not in notes]
        rows = measure(able, inputs, rounds)
        if chosen.type == "cuda":
            _largest_batches(rows, able, model, batch)
        rows += [{"contender": name, "note": note} for name, note in notes.items()]
        step_report.compare(rows, counts, batch, peak_rates(about["device"]))
        print(step_report.table(rows), flush=True)
        if profile is not None:
            profile_steps(able, inputs, profile)
    result = step_report.as_json(rows, about, setup, counts)
    step_report.write(result, json_file=json, csv_file=csv, plot_file=plot)
    return result


def _names(batch: int, rounds: int, threads: int, contenders: Sequence[str], precision: str) -> tuple[str, ...]:
    for name, value, least in (("batch", batch, 2), ("rounds", rounds, 1), ("threads", threads, 0)):
        if value < least:
            raise ConfigError(f"{name}: wanted at least {least}, got {value}")
    unknown = [name for name in contenders if name not in CONTENDERS]
    if unknown:
        raise ConfigError(f"contenders: wanted some of {', '.join(CONTENDERS)}, got {', '.join(map(repr, unknown))}")
    if precision not in PRECISIONS:
        raise ConfigError(f"precision: wanted {', '.join(PRECISIONS)}, got {precision!r}")
    return tuple(dict.fromkeys(contenders)) or CONTENDERS


@contextlib.contextmanager
def settings(device: torch.device, threads: int) -> Iterator[None]:
    """What every contender is measured under: the number of threads (0: torch's own choice), and TF32 on a GPU."""
    before, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
    torch.set_num_threads(threads or before)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_num_threads(before)
        torch.set_float32_matmul_precision(precision)


def check(ready: list[Contender], model: MaskVLM, inputs: Inputs, precision: str) -> dict[str, str]:
    """Assert that all compute the same losses; a note for each compiled contender that cannot run here.

    Every implementation is held, uncompiled and in float32, against ours as the method is written; what is compiled is
    compiled once, for what is timed, and held against its uncompiled form there.
    """
    notes: dict[str, str] = {}
    tolerance = TOLERANCE[inputs.batch.images.device.type]
    with torch.no_grad():
        wanted = model(inputs.batch, inputs.masks, seed=SEED, step=STEP)
        for contender in ready:
            if contender.name != OTHER_METHOD:
                assert_equal(contender.name, losses_of(contender.name, contender.module, inputs), wanted, tolerance)
    for contender in ready:
        if contender.name not in COMPILED:
            continue
        with torch.no_grad(), contender.precision():
            wanted = losses_of(contender.name, contender.module, inputs)
        try:
            found = contender.backward(inputs)
        except Exception as error:
            notes[contender.name] = one_line(error)
            continue
        contender.module.zero_grad(set_to_none=True)
        assert_equal(contender.name, found, wanted, TOLERANCE_COMPILED[precision])
    return notes


def assert_equal(name: str, found: Losses, wanted: Losses, tolerance: float) -> None:
    """AssertionError with the figures where one of the losses differs by more than `tolerance` of its value."""
    for term in ("mlm", "mim", "itc", "itm", "total"):
        got, want = getattr(found, term).item(), getattr(wanted, term).item()
        assert abs(got - want) <= tolerance * abs(want), (
            f"{name}: {term} is {got:.7g}, wanted {want:.7g} to within {tolerance:.0e} of it; nothing was timed"
        )


def measure(ready: list[Contender], inputs: Inputs, rounds: int) -> list[Row]:
    """Memory of each, then the rounds; `seconds` and `cpu_seconds` of a row have a figure for each."""
    rows: list[Row] = []
    for contender in ready:
        step = functools.partial(contender.backward, inputs)
        peak = peak_mb(step, contender.module.parameters(), inputs.batch.images.device.type)
        contender.module.zero_grad(set_to_none=True)
        rows.append({"contender": contender.name, "note": "", "peak_mb": peak, "seconds": [], "cpu_seconds": []})
    for number in range(-WARM_UP, rounds):
        for place in range(len(ready)):
            which = (place + number) % len(ready)  # the order turns, so that no one always follows the same neighbour
            seconds, cpu_seconds, loss = time_step(ready[which], inputs)
            if number >= 0:
                rows[which]["seconds"].append(seconds)
                rows[which]["cpu_seconds"].append(cpu_seconds)
                rows[which]["loss"] = loss
    return rows


def time_step(contender: Contender, inputs: Inputs) -> tuple[float, float, float]:
    """Seconds, CPU seconds of all threads, and the loss, of a whole step: from uint8 images to the update."""
    _wait(inputs)
    start, cpu = time.perf_counter(), time.process_time()
    losses = contender.backward(inputs)
    contender.update()
    _wait(inputs)
    return time.perf_counter() - start, time.process_time() - cpu, losses.total.item()


def _wait(inputs: Inputs) -> None:
    if inputs.batch.images.is_cuda:
        torch.cuda.synchronize()


def _largest_batches(rows: list[Row], ready: list[Contender], model: MaskVLM, batch: int) -> None:
    """Add to each row the largest batch of which a step fits this GPU."""
    length, device = model.config.text_length, model.log_scale.device
    for row, contender in zip(rows, ready, strict=True):

        def fits(number: int, row: Row = row, contender: Contender = contender) -> bool:
            try:
                time_step(contender, make_inputs(model, caption_lengths(number, length, length / 3), device))
            except torch.OutOfMemoryError:
                return False
            except RuntimeError as error:  # another limit: a grid, a 32-bit index
                row["note"] = f"a batch of {number} ends with {one_line(error)}"
                return False
            finally:
                contender.module.zero_grad(set_to_none=True)
                torch.cuda.empty_cache()
            return True

        try:
            row["largest_batch"] = largest(fits, batch)
        except RuntimeError as error:  # the GPU can no longer be used: what was measured stays
            row["note"] = f"the largest batch was not found: {one_line(error)}"
            return


def largest(fits: Callable[[int], bool], start: int) -> int:
    """The largest batch that fits, to within an eighth: doubled from `start`, then halved in between. 0 where `start`
    does not fit.
    """
    if not fits(start):
        return 0
    low = start
    while fits(2 * low):
        low *= 2
    high = 2 * low
    while high - low > max(1, low // 8):
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
