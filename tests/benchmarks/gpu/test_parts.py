"""Parts of stages without a result: the summary names them, and does not say that the stage is complete."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from mvlm.model.maskvlm import MaskVLM
from mvlm_benchmarks.gpu import compiled, correct, kernels, step, sweep
from mvlm_benchmarks.gpu.small_cases import small_cases
from mvlm_benchmarks.intervals import Ratio
from mvlm_benchmarks.kernels.attention_cases import attention_cases
from support.benchmarks import micro_config, toy_case
from support.stages import run_stage


def raises(*_: Any, **__: Any) -> Any:
    raise RuntimeError("no kernel image is available")


def no_memory(*_: Any, **__: Any) -> Any:
    raise torch.OutOfMemoryError


@pytest.mark.slow
@pytest.mark.parametrize("by_design, missing", [(True, {}), (False, {"ops": "torch"})])
def test_correct_without_our_kernels_has_not_finished_the_ops(tmp_path, monkeypatch, by_design, missing) -> None:
    (case,) = [case for case in small_cases(torch.float32) if case.shape == "B2 H1 D64 37x19"]
    row = {"op": "toy", "shape": "", "check": "kernels", "status": "torch", "note": "no kernel for this GPU"}
    monkeypatch.setattr(correct, "small_cases", lambda _: [replace(case, left_to_torch=by_design)])
    monkeypatch.setattr(correct, "check_case", lambda *_: [row])
    monkeypatch.setattr(correct, "ceiling_rows", lambda *_, **__: [{"name": "copy", "shape": "", "gb_per_s": 1.0}])
    monkeypatch.setattr(correct, "run_tests", lambda _: {"status": "ok", "note": ""})
    code, summary = run_stage(correct, tmp_path)
    assert (code, summary["without_result"]) == (0, missing)
    assert ("ops" in summary["finished"]) == by_design


def test_attention_with_two_long_sides_alone_is_left_to_torch() -> None:
    left = [case.shape for case in attention_cases(2, torch.bfloat16) if case.left_to_torch]
    assert len(left) == 1
    assert "197x197" in left[0]


@pytest.mark.slow
def test_kernels_names_the_case_that_failed(tmp_path, monkeypatch) -> None:
    cases = [toy_case(shape="good", core=True, has_kernels=False),
             toy_case(shape="broken", core=True, has_kernels=False, ours=raises)]  # fmt: skip
    monkeypatch.setattr(kernels, "cases", lambda *_: cases)
    code, summary = run_stage(kernels, tmp_path)
    assert (code, summary["ended"]) == (0, "incomplete: toy broken error")
    assert summary["finished"] == ["toy good"]


@pytest.mark.slow
def test_step_without_a_round_of_ours_is_incomplete(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(step, "make_model", lambda _: MaskVLM(micro_config()))
    monkeypatch.setattr(step, "check_losses", lambda *_: [])
    monkeypatch.setattr(step, "measure_rounds", lambda *_: [{"contender": "fast", "note": "out of memory"}])
    code, summary = run_stage(step, tmp_path)
    assert code == 0
    assert summary["ended"].startswith("incomplete: rounds error")
    assert "rounds" not in summary["finished"]


@pytest.mark.parametrize(
    "make, targets, why", [(no_memory, None, "out of memory"), (lambda *_: toy_case(), [], "no kernel")]
)
def test_sweep_names_the_cases_that_it_could_not_sweep(
    tmp_path, monkeypatch, make: Callable[..., Any], targets, why
) -> None:
    monkeypatch.setattr(sweep, "compile_variants", lambda _: {})
    monkeypatch.setattr(sweep, "chosen_cases", lambda *_: [toy_case(shape="wide")])
    monkeypatch.setattr(sweep.CaseData, "make", make)
    monkeypatch.setattr(sweep, "targets_of", lambda *_: targets)
    if targets is not None:
        monkeypatch.setattr(sweep.CaseData, "make", lambda *_: type("Data", (), {"sets": [None]}))
    code, summary = run_stage(sweep, tmp_path)
    assert (code, summary["ended"]) == (0, f"incomplete: toy wide {why}")


@pytest.mark.slow
def test_a_compiled_step_of_half_the_time_is_faster(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(compiled, "make_model", lambda _: MaskVLM(micro_config()))
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    monkeypatch.setattr(compiled, "ratio", lambda eager, compiled: Ratio(2.0, 1.9, 2.1))
    run_stage(compiled, tmp_path)
    said = (tmp_path / "compiled.log").read_text()
    assert "2.00 x eager (1.90 to 2.10): faster" in said
    assert "slower" not in said
