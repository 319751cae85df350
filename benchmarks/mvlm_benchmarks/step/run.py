"""`mvlm bench step`: one pretraining step against the same model built from timm, transformers and torch.

All contenders have the same weights and get the same batch, masks and negatives. Their losses are compared before
anything is timed. They take turns in one process. A ratio is the median of the ratios within a round, because the
machine's speed changes little during a round.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from mvlm.config.model import MaskVLMConfig
from mvlm.device import autocast, choose_device, has_fast_bf16
from mvlm.errors import ConfigError
from mvlm.model.maskvlm import MaskVLM
from mvlm.model.packing import eager_buckets
from mvlm.objectives.losses import Losses
from mvlm_benchmarks import gpu_state, machine
from mvlm_benchmarks.budget import Budget
from mvlm_benchmarks.captions import caption_lengths
from mvlm_benchmarks.choices import choose
from mvlm_benchmarks.results import RowFile
from mvlm_benchmarks.step import flops, report
from mvlm_benchmarks.step.contenders import (
    COMPILED,
    CONTENDERS,
    IMPLEMENTATIONS,
    OTHER_METHODS,
    SEED,
    STEP,
    Contender,
    StepInputs,
    compute_losses,
    make_contenders,
    make_inputs,
)  # fmt: skip
from mvlm_benchmarks.step.timing import ROUND_COLUMNS, measure_rounds
from mvlm_benchmarks.unavailable import one_line
from mvlm_kernels.hardware import peak_rates

Row = dict[str, Any]
PRECISIONS = ("auto", "bf16", "fp32")
TOLERANCE = {"cpu": 1e-4, "cuda": 1e-3}
"""Maximum relative difference of a loss. On a CPU, in float32, only the order of summation differs. On a GPU, in TF32,
operands are rounded to 10 bits, which changes ITM's loss by 1e-4."""
TOLERANCE_COMPILED = {"fp32": 1e-3, "bf16": 3e-2}
"""Maximum relative difference between losses of compiled and eager code, by precision."""


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
    seconds: float | None = None,
) -> dict[str, Any]:
    """Check all losses, time steps, print tables and write files. Returns the content of the JSON file.

    `mvlm_benchmarks.cli.step` describes the arguments.

    Raises:
        ConfigError: an unknown preset, contender, device or precision, or a number that is too small.
        AssertionError: the losses of a contender differ from those of `plain`.
    """
    names = check_arguments(batch, rounds, threads, contenders, precision)
    if seconds is not None and not seconds > 0:
        raise ConfigError(f"seconds: wanted a number above 0, got {seconds:g}")
    budget = Budget(seconds)
    # Post-norm, as the cross-modality blocks of the baselines.
    config = MaskVLMConfig.preset(preset, cross_norm="post")
    chosen = choose_device(device)
    if precision == "auto":
        precision = "bf16" if has_fast_bf16(chosen) else "fp32"
    lengths = caption_lengths(batch, config.text_length, config.text_length / 3)
    with step_settings(chosen, threads):
        about = machine.describe(chosen.type, ["timm", "transformers", "numpy"])
        setup = {
            "preset": preset, "batch": batch, "precision": precision, "optimizer": optimizer, "rounds": rounds,
            "threads": torch.get_num_threads(), "caption_tokens": int(lengths.sum()), "longest": int(lengths.max()),
        }  # fmt: skip
        print(report.heading(about, setup), flush=True)
        torch.manual_seed(0)
        model = MaskVLM(config).to(chosen)
        inputs = make_inputs(model, lengths, chosen, eager_buckets(chosen, precision))
        ready = make_contenders(names, model, optimizer, functools.partial(autocast, chosen, precision))
        notes = check_losses(ready, model, inputs, precision)
        counted = (report.BASELINE, *IMPLEMENTATIONS)
        gflop = {name: flops.gflop_per_pair(config, lengths, name) for name in counted}
        print(report.flops_table(gflop), flush=True)
        runnable = [contender for contender in ready if contender.name not in notes]
        written = _round_writer(csv, about)
        rows = measure_rounds(runnable, inputs, rounds, budget, written)
        rows += [{"contender": name, "note": note} for name, note in notes.items()]
        report.add_figures(rows, gflop, batch, peak_rates(about["device"]))
        print(report.table(rows), flush=True)
    result = report.as_json(rows, about, setup, gflop)
    report.write(result, json_file=json, csv_file=csv, plot_file=plot)
    return result


def _round_writer(csv: Path | None, about: dict[str, Any]) -> Callable[[Row], Any]:
    """Function that appends the row of a timed step to NAME.rounds.csv beside the CSV; nothing without a CSV."""
    if csv is None:
        return lambda row: None
    columns = (*ROUND_COLUMNS, *gpu_state.COLUMNS)
    file = RowFile(csv.with_name(f"{csv.stem}.rounds.csv"), about, columns)
    return lambda row: file.append([row])


def check_arguments(
    batch: int, rounds: int, threads: int, contenders: Sequence[str], precision: str
) -> tuple[str, ...]:
    """Check arguments of `run`. Returns the contenders to run, each once. Raises ConfigError."""
    for name, value, least in (("batch", batch, 2), ("rounds", rounds, 1), ("threads", threads, 0)):
        if value < least:
            raise ConfigError(f"{name}: wanted at least {least}, got {value}")
    chosen = choose("contenders", contenders, CONTENDERS)
    if precision not in PRECISIONS:
        raise ConfigError(f"precision: wanted {', '.join(PRECISIONS)}, got {precision!r}")
    return tuple(dict.fromkeys(chosen))


@contextlib.contextmanager
def step_settings(device: torch.device, threads: int) -> Iterator[None]:
    """Set the number of threads (0 for torch's default), and TF32 on a GPU. Restores both on exit."""
    before, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
    torch.set_num_threads(threads or before)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_num_threads(before)
        torch.set_float32_matmul_precision(precision)


def check_losses(ready: list[Contender], model: MaskVLM, inputs: StepInputs, precision: str) -> dict[str, str]:
    """Assert that all contenders compute the same losses, but for those of `OTHER_METHODS`.

    Every contender of this method is compared with our plain implementation, in eager mode and float32. A compiled
    contender is also compared with its eager form, in the precision that is timed, so that it is compiled only once.

    Returns:
        A note for each compiled contender that fails to run. It is then not timed.
    """
    notes: dict[str, str] = {}
    tolerance = TOLERANCE[inputs.batch.images.device.type]
    with torch.no_grad():
        wanted = model(inputs.batch, inputs.masks, seed=SEED, step=STEP)
        for contender in ready:
            if contender.name not in OTHER_METHODS:
                assert_losses_equal(
                    contender.name, compute_losses(contender.name, contender.module, inputs), wanted, tolerance
                )
    for contender in ready:
        if contender.name not in COMPILED:
            continue
        with torch.no_grad(), contender.precision():
            wanted = compute_losses(contender.name, contender.module, inputs)
        try:
            losses = contender.backward(inputs)
        except Exception as error:
            notes[contender.name] = one_line(error)
            continue
        contender.module.zero_grad(set_to_none=True)
        assert_losses_equal(contender.name, losses, wanted, TOLERANCE_COMPILED[precision])
    return notes


def assert_losses_equal(name: str, losses: Losses, wanted: Losses, tolerance: float) -> None:
    """Assert that no loss differs by more than `tolerance` times its wanted value."""
    for term in ("mlm", "mim", "itc", "itm", "total"):
        got, want = getattr(losses, term).item(), getattr(wanted, term).item()
        assert abs(got - want) <= tolerance * abs(want), (
            f"{name}: {term} is {got:.7g}, wanted {want:.7g} to within {tolerance:.0e} of it; nothing was timed"
        )
