"""Stages: how they end, that a wrong value stops each of them, and that they need nothing but torch and Triton."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import mvlm_kernels
from mvlm.model.maskvlm import MaskVLM
from mvlm_benchmarks import results
from mvlm_benchmarks.budget import Budget
from mvlm_benchmarks.clock import Timing
from mvlm_benchmarks.gpu import compiled, correct, kernels, profile, sanitizer, step, sweep
from mvlm_benchmarks.gpu.small_cases import small_cases
from mvlm_benchmarks.gpu.stage import Stage, running
from mvlm_benchmarks.gpu.stages import STAGES
from mvlm_benchmarks.gpu.variants import Target, targets_of
from mvlm_kernels.cross_attention import tiles
from support.benchmarks import FakeClock, micro_config, toy_case
from support.stages import run_stage

ROOT = Path(__file__).parents[3]


def rows_of(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.read_text().splitlines()))


def toy(name: str, **changes):
    return toy_case(shape=name, has_kernels=False, **changes)


GOOD, NEVER = toy("good"), toy("never")
BAD = toy("bad", ours=lambda x, factor: x * 2.01)


@pytest.fixture(autouse=True)
def quick(monkeypatch) -> None:
    """No measurement of ceilings or of SDPA, and no test suite inside the test suite."""
    monkeypatch.setattr(correct, "ceiling_rows", lambda *_, **__: [{"name": "copy", "shape": "", "gb_per_s": 1.0}])
    monkeypatch.setattr(correct, "GPU_TESTS", ())
    small = [case for case in correct.small_cases(torch.float32) if case.shape == "B2 H1 D64 37x19"]
    monkeypatch.setattr(correct, "small_cases", lambda dtype: small)


@pytest.mark.slow
def test_stage_with_a_missing_part_says_so(tmp_path, monkeypatch) -> None:
    code, summary = run_stage(correct, tmp_path)
    assert (code, summary["ended"], summary["rehearsal"]) == (0, "incomplete: the GPU tests missing", True)
    assert summary["finished"] == ["ops", "ceilings", "SDPA's repeats"]
    assert summary["without_result"] == {"the GPU tests": "missing"}
    rows = rows_of(tmp_path / "correct.csv")
    assert [row["check"] for row in rows[:3]] == ["values", "kept results", "repeats"]
    assert {row["status"] for row in rows[:3]} == {"ok"}
    assert rows[-1]["note"] == "there are no tests here"
    assert rows[0]["figures"].startswith("rehearsal on a CPU")
    assert "correct: incomplete" in (tmp_path / "correct.log").read_text()


@pytest.mark.slow
def test_complete_stage_says_so(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(correct, "run_tests", lambda stage: {"status": "ok", "note": "8 passed"})
    code, summary = run_stage(correct, tmp_path)
    assert (code, summary["ended"], summary["without_result"]) == (0, "complete", {})
    assert summary["finished"] == ["ops", "ceilings", "SDPA's repeats", "the GPU tests"]


@pytest.mark.parametrize("rehearse, status", [(True, "ok"), (False, "missing")])
def test_no_collected_test_is_no_success_on_a_gpu(tmp_path, monkeypatch, rehearse, status) -> None:
    (tmp_path / "python").write_text("#!/bin/sh\necho '5 deselected'; exit 5\n")
    (tmp_path / "python").chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setattr(correct, "GPU_TESTS", ("tests/kernels/test_gpu.py",))
    row = correct.run_tests(Stage("correct", tmp_path, Budget(60), rehearse))
    assert (row["status"], row["note"]) == (status, "5 deselected")


def test_profiles_without_a_result_are_named(tmp_path, monkeypatch) -> None:
    fake_tool(tmp_path / "bin", monkeypatch, "ncu", "echo ERR_NVGPUCTRPERM; exit 1")
    code, summary = run_stage(profile, tmp_path / "out")
    assert (code, summary["finished"]) == (0, [])
    assert summary["ended"].startswith("incomplete: short_kv_backward error, ")
    assert summary["without_result"] == dict.fromkeys(profile.KERNELS, "error")


@pytest.mark.slow
def test_spent_budget_names_what_was_left_out(tmp_path) -> None:
    code, summary = run_stage(correct, tmp_path, seconds=0.0)
    assert (code, summary["ended"]) == (0, "out of time, before cross_attention B2 H1 D64 37x19")
    assert rows_of(tmp_path / "correct.csv") == []


def test_stage_that_is_running_or_was_killed_says_so(tmp_path) -> None:
    with running("correct", tmp_path, 10, rehearse=True):
        assert json.loads((tmp_path / "correct.json").read_text())["ended"] == "running, or killed"


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_ends_a_stage_with_its_plots_written(tmp_path, monkeypatch, number) -> None:
    def kill(device, seed=0):
        os.kill(os.getpid(), number)

    cases = [toy("good", core=True), toy("killed", make=kill, core=True)]
    monkeypatch.setattr(kernels, "cases", lambda batch, dtype: cases)
    code, summary = run_stage(kernels, tmp_path)
    assert (code, summary["ended"]) == (3, f"stopped by {signal.Signals(number).name}")
    assert {row["shape"] for row in rows_of(tmp_path / "kernels.csv")} == {"good"}
    assert (tmp_path / "kernels.svg").stat().st_size > 0


def test_error_is_in_the_log_and_in_the_summary(tmp_path) -> None:
    with pytest.raises(SystemExit) as end, running("correct", tmp_path, 10, rehearse=True):
        raise RuntimeError("no driver")
    assert end.value.code == 1
    assert json.loads((tmp_path / "correct.json").read_text())["ended"] == "error: RuntimeError: no driver"
    assert "Traceback" in (tmp_path / "correct.log").read_text()


# A wrong value stops each stage.


def test_correct_stops_at_a_wrong_value(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(correct, "small_cases", lambda dtype: [GOOD, BAD, NEVER])
    code, summary = run_stage(correct, tmp_path)
    assert code == 1
    assert summary["ended"].startswith("wrong value: toy bad: values: forward: WRONG: output is off")
    rows = rows_of(tmp_path / "correct.csv")
    assert [row["shape"] for row in rows] == ["good"] * 3 + ["bad"]
    assert rows[-1]["status"] == "WRONG"


@pytest.mark.slow
def test_kernels_stops_at_a_wrong_value_of_ours_and_keeps_plot_and_figures(tmp_path, monkeypatch) -> None:
    cases = [toy(c.shape, ours=c.ours, core=True) for c in (GOOD, BAD, NEVER)]
    monkeypatch.setattr(kernels, "cases", lambda batch, dtype: cases)
    code, summary = run_stage(kernels, tmp_path)
    assert code == 1
    assert summary["ended"].startswith("wrong value: toy bad forward: output is off")
    assert {row["shape"] for row in rows_of(tmp_path / "kernels.csv")} == {"good", "bad"}
    assert (tmp_path / "kernels.svg").stat().st_size > 0
    figures = json.loads((tmp_path / "kernels.figures.json").read_text())
    assert {row["shape"] for row in figures["rows"]} == {"good"}


@pytest.fixture
def toy_sweep(monkeypatch):
    """A sweep of toy kernels: `slow` takes 10 us, and 5 us with num_warps=8. Other options of `slow` give zeros."""

    def make(cases) -> None:
        monkeypatch.setattr(sweep, "chosen_cases", lambda *_: cases)
        monkeypatch.setattr(sweep, "compile_variants", lambda stage: {})
        monkeypatch.setattr(
            sweep, "targets_of", lambda case, inputs, arch: [Target(case, "forward", "slow", {"num_warps": 4})]
        )
        monkeypatch.setattr(sweep, "variants", lambda *_, **__: [{}, {"num_warps": 8}, {"num_stages": 3}])

        class Clock(FakeClock):
            def __init__(self, *_) -> None:
                super().__init__()

            def time(self, steps, prepare):
                us = 5.0 if sweep.dispatch.overridden("slow", {}) else 10.0
                return Timing(us, us, us, (us, us)), super().time(steps, prepare)[1]

        monkeypatch.setattr(sweep, "CpuClock", Clock)

    return make


def test_sweep_writes_a_row_per_turn_and_the_exceptions(tmp_path, monkeypatch, toy_sweep) -> None:
    def ours(x, factor):
        return x * (0 if "num_stages" in sweep.dispatch.overridden("slow", {}) else factor)

    toy_sweep([toy("swept", ours=ours)])
    code, summary = run_stage(sweep, tmp_path)
    assert (code, summary["ended"]) == (0, "complete")
    rows = rows_of(tmp_path / "sweep.csv")
    assert [(row["change"], row["us"], row["status"]) for row in rows] == [
        ("default", "10.0", "ok"), ("num_warps=8", "5.0", "ok"), ("num_stages=3", "", "WRONG"),
        ("default", "10.0", "ok"), ("num_warps=8", "5.0", "ok"),
        ("num_warps=8", "5.0", "ok"), ("default", "10.0", "ok"),
    ]  # fmt: skip
    assert [row["turn"] for row in rows] == ["0"] * 3 + ["1"] * 2 + ["2"] * 2
    (exception,) = json.loads((tmp_path / "tile_exceptions.json").read_text())["sm_90"].values()
    assert exception == {"key": "", "options": {"num_warps": 8}, "over_default": 0.5}
    assert (tmp_path / "sweep.svg").stat().st_size > 0


def test_variant_that_is_faster_by_chance_does_not_win(tmp_path, monkeypatch, toy_sweep) -> None:
    """It is as fast as the default when both are timed again."""
    toy_sweep([toy("swept")])
    lucky = iter([10.0, 9.0, 11.0])

    class Clock(FakeClock):
        def __init__(self, *_) -> None:
            super().__init__()

        def time(self, steps, prepare):
            us = next(lucky, 10.0)
            return Timing(us, us, us, (us, us)), super().time(steps, prepare)[1]

    monkeypatch.setattr(sweep, "CpuClock", Clock)
    code, summary = run_stage(sweep, tmp_path)
    assert (code, summary["ended"]) == (0, "complete")
    assert json.loads((tmp_path / "tile_exceptions.json").read_text())["sm_90"] == {}
    assert "the default stays, num_warps=8 was faster by chance" in (tmp_path / "sweep.log").read_text()


def test_winner_is_judged_by_enough_turns_of_its_own() -> None:
    assert sweep.TURNS_AGAIN >= 7


@pytest.mark.slow
def test_winners_of_attention_are_a_table_that_launchers_read(tmp_path, monkeypatch) -> None:
    """A winner is in the table if it wins in all cases of its key. Other keys and architectures are unchanged."""
    case = next(case for case in small_cases(torch.bfloat16) if case.op == "cross_attention")
    targets = targets_of(case, case.make("meta"), 90)
    monkeypatch.setattr(sweep, "chosen_cases", lambda *_: [case])
    monkeypatch.setattr(sweep, "compile_variants", lambda stage: {})
    other = targets[1]._replace(key="short_q_forward/16bit/128/128")
    monkeypatch.setattr(sweep, "targets_of", lambda *_: [targets[0], targets[0], targets[1], other, other])
    won = iter([{"num_warps": 2}, {"num_warps": 2}, {"num_stages": 3}, {"num_warps": 2}, {}])

    def swept(stage, target, *_):
        return [{"target": target.name, "change": "", "winner": next(won), "ratio": 0.5, "said": ""}]

    monkeypatch.setattr(sweep, "sweep_target", swept)
    assert run_stage(sweep, tmp_path)[0] == 0
    before = json.loads((Path(mvlm_kernels.__file__).parent / "configs" / "cross_attention.json").read_text())
    table = json.loads((tmp_path / "configs" / "cross_attention.json").read_text())
    added = {targets[0].key: {"num_warps": 2}, targets[1].key: {"num_stages": 3}}
    assert table == before | {"sm_90": before["sm_90"] | added}
    monkeypatch.setenv("MVLM_KERNELS_CONFIGS", str(tmp_path / "configs"))
    tiles.meta.__wrapped__.cache_clear()
    try:
        now = {target.kernel: target.options for target in targets_of(case, case.make("meta"), 90)}
    finally:
        tiles.meta.__wrapped__.cache_clear()
    for target, winner in zip(targets, added.values(), strict=False):
        assert now[target.kernel] == target.options | winner != target.options


def test_sweep_stops_at_a_wrong_value_of_the_default(tmp_path, toy_sweep) -> None:
    toy_sweep([GOOD, BAD, NEVER])
    code, summary = run_stage(sweep, tmp_path)
    assert code == 1
    assert summary["ended"].startswith("wrong value: toy, bad, forward: slow, with its default options: output is off")
    assert "never" not in (tmp_path / "sweep.csv").read_text()
    assert "good" in (tmp_path / "tile_exceptions.json").read_text()


@pytest.fixture
def micro(monkeypatch) -> None:
    for module in (step, compiled):
        monkeypatch.setattr(module, "make_model", lambda stage: MaskVLM(micro_config()))


def test_step_stops_at_wrong_losses(tmp_path, monkeypatch, micro) -> None:
    def check_losses(*_):
        raise AssertionError("fast: mim is 2, wanted 1; nothing was timed")

    monkeypatch.setattr(step, "check_losses", check_losses)
    code, summary = run_stage(step, tmp_path)
    assert (code, summary["ended"]) == (1, "wrong value: fast: mim is 2, wanted 1; nothing was timed")
    assert rows_of(tmp_path / "step.csv") == []


@pytest.mark.slow
def test_step_times_ours_without_the_baselines_libraries(tmp_path, monkeypatch, micro) -> None:
    find = step.importlib.util.find_spec
    monkeypatch.setattr(step.importlib.util, "find_spec", lambda name: None if name == "timm" else find(name))
    code, summary = run_stage(step, tmp_path)
    assert (code, summary["finished"]) == (0, ["rounds", "categories"])
    assert summary["ended"].startswith("incomplete: timm+roberta missing")
    rows = rows_of(tmp_path / "step.csv")
    assert rows[0]["note"] == "missing: timm not installed"
    assert sorted(row["contender"] for row in rows[1:]) == ["fast", "fast", "plain", "plain"]
    shares = rows_of(tmp_path / "categories.csv")
    assert sum(float(row["pct"]) for row in shares) == pytest.approx(100)
    assert "matrix products" in {row["category"] for row in shares}


@pytest.mark.slow
def test_step_times_ours_if_the_baseline_cannot_be_built(tmp_path, monkeypatch, micro) -> None:
    """As with another version of transformers."""
    make = step.make_contenders

    def make_contenders(names, *arguments, **options):
        if step.BASELINE in names:
            raise TypeError("unexpected keyword\nargument 'position_ids'")
        return make(names, *arguments, **options)

    monkeypatch.setattr(step.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(step, "make_contenders", make_contenders)
    code, summary = run_stage(step, tmp_path)
    assert (code, summary["finished"]) == (0, ["rounds", "categories"])
    rows = rows_of(tmp_path / "step.csv")
    assert (rows[0]["contender"], rows[0]["note"]) == (
        "timm+roberta", "missing: TypeError: unexpected keyword argument 'position_ids'",
    )  # fmt: skip
    assert sorted(row["contender"] for row in rows[1:]) == ["fast", "fast", "plain", "plain"]


def test_eager_step_beside_a_graph_writes_new_gradients_as_training_does() -> None:
    model = MaskVLM(micro_config())
    (fast,), inputs = step.contenders_of(model, ("fast",)), step.inputs_of(model, 4)
    step.new_gradients(fast, inputs)
    before = [p.grad for p in model.parameters()]
    step.new_gradients(fast, inputs)
    after = [p.grad for p in model.parameters()]
    assert any(grad is not None for grad in before)
    for first, second in zip(before, after, strict=True):
        assert first is None or (second is not None and second is not first and torch.equal(first, second))


def test_compiled_stops_at_wrong_losses_and_keeps_the_eager_rows(tmp_path, monkeypatch, micro) -> None:
    def wrong(name, *_):
        raise AssertionError(f"{name}: itm is 2, wanted 1")

    monkeypatch.setattr(compiled, "assert_losses_equal", wrong)
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    code, summary = run_stage(compiled, tmp_path)
    assert code == 1
    assert "feed-forward compiled: itm is 2, wanted 1" in summary["ended"]
    rows = rows_of(tmp_path / "compiled.csv")
    assert [(row["contender"], row["round"], row["status"]) for row in rows[1:]] == [
        ("fast", "first", "ok"), ("fast", "0", "ok"), ("fast, feed-forward compiled", "first", "WRONG"),
    ]  # fmt: skip


def fake_tool(folder: Path, monkeypatch, name: str, script: str) -> None:
    folder.mkdir()
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")


def test_sanitizer_stops_at_an_error(tmp_path, monkeypatch) -> None:
    fake_tool(tmp_path / "bin", monkeypatch, "compute-sanitizer", "echo '========= ERROR SUMMARY: 2 errors'; exit 9")
    code, summary = run_stage(sanitizer, tmp_path / "out")
    assert (code, summary["ended"]) == (
        1, "wrong value: memcheck: ERROR SUMMARY: 2 errors; see sanitizer.txt",
    )  # fmt: skip
    (row,) = rows_of(tmp_path / "out" / "sanitizer.csv")
    assert (row["tool"], row["status"], row["errors"]) == ("memcheck", "WRONG", "2")
    assert "ERROR SUMMARY: 2 errors" in (tmp_path / "out" / "sanitizer.txt").read_text()


def test_each_sanitizer_is_one_process_over_all_cases(tmp_path, monkeypatch) -> None:
    """memcheck and racecheck look at our kernels alone. initcheck needs to see what those of torch write."""
    lines = "echo 'toy, a: ok'; echo 'toy, b: ok'; echo '========= ERROR SUMMARY: 0 errors'"
    fake_tool(tmp_path / "bin", monkeypatch, "compute-sanitizer", f'echo "$@" >> {tmp_path}/calls; {lines}')
    code, summary = run_stage(sanitizer, tmp_path / "out")
    assert (code, summary["finished"]) == (0, ["memcheck", "racecheck", "initcheck"])
    rows = rows_of(tmp_path / "out" / "sanitizer.csv")
    assert [(row["tool"], row["cases"], row["status"]) for row in rows] == [
        (tool, "2", "ok") for tool in sanitizer.TOOLS
    ]
    calls = (tmp_path / "calls").read_text().splitlines()
    assert ["--kernel-name kernel_substring=short_kv_backward " in call for call in calls] == [True, True, False]
    assert ["--report-api-errors no" in call for call in calls] == [True, False, False]
    assert all(call.endswith("-m mvlm_benchmarks.gpu.small_calls --rehearse") for call in calls)


def test_a_sanitizer_gets_its_share_of_the_time(tmp_path, monkeypatch) -> None:
    lines = "echo 'toy, a: ok'; exec sleep 50"
    fake_tool(tmp_path / "bin", monkeypatch, "compute-sanitizer", lines)
    code, summary = run_stage(sanitizer, tmp_path / "out", seconds=6.0)
    assert code == 0
    assert summary["seconds"] < 12
    rows = rows_of(tmp_path / "out" / "sanitizer.csv")
    assert [row["tool"] for row in rows[:2]] == ["memcheck", "racecheck"]
    assert {(row["status"], row["cases"]) for row in rows} == {("out of time", "1")}
    assert rows[0]["note"].endswith("and 1 cases")
    assert summary["finished"] == []


def test_profile_stops_at_a_wrong_value(tmp_path, monkeypatch) -> None:
    line = "cross_attention, B256 197x32: WRONG: output is off by 1"
    fake_tool(tmp_path / "bin", monkeypatch, "ncu", f"echo '{line}'; exit 1")
    code, summary = run_stage(profile, tmp_path / "out")
    assert code == 1
    assert summary["ended"] == f"wrong value: cross_attention, while short_kv_backward was profiled: {line}"


def test_profile_writes_a_row_per_counter(tmp_path, monkeypatch) -> None:
    (tmp_path / "table").write_text(
        "cross_attention, B256 197x32: ok\n==PROF== Connected\n"
        '"ID","Kernel Name","Section Name","Metric Name","Metric Unit","Metric Value"\n'
        '"0","short_kv_backward","Occupancy","Achieved Occupancy","%","18.7"\n'
        '"0","short_kv_backward","GPU Speed Of Light","DRAM Throughput","%","61.2"\n'
    )
    fake_tool(tmp_path / "bin", monkeypatch, "ncu", f"cat {tmp_path / 'table'}")
    stage = Stage("profile", tmp_path, SimpleNamespace(left=10.0), rehearse=True)  # pyright: ignore[reportArgumentType]
    rows = list(profile.profile_kernel(stage, str(tmp_path / "bin" / "ncu"), "short_kv_backward", "cross_attention"))
    assert [(row["metric"], row["value"], row["status"]) for row in rows] == [
        ("Achieved Occupancy", "18.7", "ok"), ("DRAM Throughput", "61.2", "ok"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    "has_tool, code, output, status",
    [
        (True, 0, "========= ERROR SUMMARY: 0 errors", "ok"),
        (True, 0, "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)", "ok"),
        (True, 0, "========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)", "WRONG"),
        (True, 9, "", "WRONG"),
        (True, 9, "========= Error: Device not supported. Please refer to the documentation", "error"),
        (True, 1, "gather_patches, small: WRONG: output is off", "WRONG"),
        (True, 0, "something else", "error"),
        (False, 0, "gather_patches, small: ok", "missing"),
        (True, 1, "========= Error: Device not supported. Please refer to the documentation", "error"),
        (True, 255, "========= Error: Target application terminated before first instrumented API call", "error"),
        (True, 1, "gather_patches, small: error: AcceleratorError: CUDA error", "WRONG"),
        (True, 9, "========= ERROR SUMMARY: 2 errors", "WRONG"),
        (False, 1, "Traceback", "error"),
    ],
)
def test_what_a_sanitizer_says_is_judged(has_tool, code, output, status) -> None:
    assert sanitizer.judge(has_tool, code, output)["status"] == status


BLOCKED = (
    "timm", "transformers", "tyro", "matplotlib", "safetensors", "tokenizers", "nvidia", "pynvml", "huggingface_hub",
    "pytest", "PIL", "tensorboard", "rich",
)  # fmt: skip


@pytest.mark.slow
def test_stages_need_nothing_but_torch_and_triton() -> None:
    program = f"""
import importlib, sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {BLOCKED!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Blocked())
from mvlm_benchmarks.gpu.stages import STAGES
for plan in STAGES.values():
    assert importlib.import_module(plan.module).run
import mvlm_benchmarks.gpu.small_calls
from mvlm.model.maskvlm import MaskVLM
"""
    folders = [ROOT / name for name in (".", "kernels", "dataloading", "benchmarks")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, folders))}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_every_stage_takes_less_than_ten_minutes() -> None:
    assert all(plan.seconds < 600 for plan in STAGES.values())
    assert list(STAGES) == ["correct", "sweep", "kernels", "profile", "step", "compiled", "sanitizer"]


def test_a_second_signal_does_not_disturb_what_is_written_after_the_first(tmp_path) -> None:
    """Ctrl-C in a terminal reaches a stage twice: from the terminal, and from gpu_run.py."""

    def interrupted(stage: Stage) -> None:
        try:
            os.kill(os.getpid(), signal.SIGINT)
        finally:
            os.kill(os.getpid(), signal.SIGINT)
            (stage.out / "figures").write_text("all")

    code, _ = run_stage(SimpleNamespace(__name__="gpu.correct", run=interrupted), tmp_path)
    assert code == 3
    assert (tmp_path / "figures").read_text() == "all"
    assert json.loads((tmp_path / "correct.json").read_text())["ended"] == "stopped by SIGINT"
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_second_signal_does_not_cut_the_summary(tmp_path, monkeypatch) -> None:
    def interrupted(stage: Stage) -> None:
        def say(text: str) -> None:
            os.kill(os.getpid(), signal.SIGINT)

        stage.say = say
        os.kill(os.getpid(), signal.SIGINT)

    code, summary = run_stage(SimpleNamespace(__name__="gpu.correct", run=interrupted), tmp_path)
    assert (code, summary["ended"]) == (3, "stopped by SIGINT")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_plot_that_fails_does_not_hide_why_a_sweep_stopped(tmp_path, monkeypatch) -> None:
    asked = []

    def fails(*_: Any) -> None:
        asked.append("a plot")
        raise ValueError("no plot")

    def stops(*_: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(results, "save_figure", fails)
    monkeypatch.setattr(sweep, "compile_variants", lambda _: {})
    monkeypatch.setattr(sweep, "sweep_target", stops)
    code, summary = run_stage(sweep, tmp_path)
    assert (code, summary["ended"]) == (3, "stopped by SIGTERM")
    assert asked == ["a plot"]


def test_a_compiler_that_fails_says_why(tmp_path, monkeypatch) -> None:
    (tmp_path / "python").write_text("#!/bin/sh\necho KeyError: sm_1 >&2; exit 1\n")
    (tmp_path / "python").chmod(0o755)
    monkeypatch.setattr(sweep.sys, "executable", str(tmp_path / "python"))
    with running("sweep", tmp_path, 60, rehearse=True) as stage:
        assert sweep.compile_variants(stage) == {}
    assert "their process failed, KeyError: sm_1" in (tmp_path / "sweep.log").read_text()


def test_processes_that_compile_end_with_the_budget(tmp_path, monkeypatch) -> None:
    (tmp_path / "python").write_text(f"#!/bin/sh\nsleep 50 & echo $! > {tmp_path}/child; wait\n")
    (tmp_path / "python").chmod(0o755)
    monkeypatch.setattr(sweep.sys, "executable", str(tmp_path / "python"))
    with running("sweep", tmp_path, 2, rehearse=True) as stage:
        sweep.compile_variants(stage)
    child = Path("/proc") / (tmp_path / "child").read_text().strip()
    deadline = time.monotonic() + 10
    while child.exists() and "State:\tZ" not in (child / "status").read_text():  # ended, and nobody has asked how
        assert time.monotonic() < deadline
        time.sleep(0.01)
