"""Sinks for metrics and images. Modules that record their calls stand in for the services."""

import json
import os
import sys
import threading
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

from mvlm.config.pretrain import PretrainConfig
from mvlm.errors import ConfigError
from mvlm.progress import TrainingProgress
from mvlm.runs.checkpoint import verify_checkpoint
from mvlm.training.loggers import LogSinks, start_services, upload_report
from mvlm.training.run import pretrain
from mvlm.training.trainer import Trainer
from support.faults.forks import ended_well, in_ranks
from support.folders import rows_of
from support.models import pretrain_config

ROW = {"step": 3, "pairs_seen": 24, "loss": 1.5, "itc": None, "skipped": 0}


def started(tmp_path: Path, name: str) -> PretrainConfig:
    """Configuration of a run whose service has started."""
    config = pretrain_config(tmp_path / "data", tmp_path / "run", log_to=(name,))
    config.out.mkdir()
    start_services(config)
    return config


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_service_gets_the_configuration_and_the_rows(tmp_path, monkeypatch, without_tensorboard, name):
    begun, logged, finished = [], [], []
    service = SimpleNamespace(
        init=lambda **settings: begun.append(settings),
        log=lambda numbers, step: logged.append((numbers, step)),
        finish=lambda: finished.append(True),
    )
    monkeypatch.setitem(sys.modules, name, service)
    config = started(tmp_path, name)
    with LogSinks(config, 0) as sinks:
        sinks.log(ROW)
    assert (begun[0]["project"], begun[0]["name"]) == ("mvlm", "run")
    assert begun[0]["config"]["batch_size"] == 8
    assert logged == [({"loss": 1.5, "skipped": 0}, 3)]
    assert finished == [True]
    assert rows_of(config.out) == [ROW]


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_resumed_run_goes_on_in_the_services_run(tmp_path, monkeypatch, name):
    started = []
    service = SimpleNamespace(init=lambda **settings: started.append(settings))
    monkeypatch.setitem(sys.modules, name, service)
    for out in ("run", "other"):
        config = pretrain_config(tmp_path / "data", tmp_path / out, log_to=(name,))
        config.out.mkdir()
        start_services(config)
        (config.out / "config.json").touch()
        start_services(config)
    first, again, other, _ = started
    if name == "wandb":
        assert first["id"] == again["id"] != other["id"]
        assert again["resume"] == "allow"
    else:
        assert (first["resume"], again["resume"], other["resume"]) == ("never", "allow", "never")


def test_service_that_is_not_installed_is_refused_before_the_run(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "trackio", None)
    config = pretrain_config(tmp_path / "data", tmp_path / "run", log_to=("trackio",))
    with pytest.raises(ConfigError, match="log_to: wanted the package trackio, which is not installed; pip install"):
        pretrain(config)
    assert not config.out.exists()


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_service_that_fails_is_a_warning(tmp_path, monkeypatch, without_tensorboard, caplog, name):
    def fails(*_, **__):
        raise ConnectionAbortedError("the network is down") if name == "wandb" else RuntimeError("locked")

    service = SimpleNamespace(init=lambda **_: None, log=fails, finish=fails)
    monkeypatch.setitem(sys.modules, name, service)
    config = started(tmp_path, name)
    with LogSinks(config, 0) as sinks:
        for step in (3, 4):
            sinks.log(ROW | {"step": step})
    assert [record.getMessage().split(":")[0] for record in caplog.records] == [f"could not write {name}"]
    assert [row["step"] for row in rows_of(config.out)] == [3, 4]


# The thread of TensorBoard's writer raises, and pytest warns of it.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_full_disk_is_one_warning_a_sink_and_rows_continue(tmp_path, caplog, file_limit):
    """The system's own error: for 40 rows no file may grow. TensorBoard's writer ends meanwhile."""
    config = pretrain_config(tmp_path / "data", tmp_path)
    image = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    before = set(threading.enumerate())
    with LogSinks(config, 0) as sinks:
        sinks.log(ROW)
        with file_limit(max(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file())):
            for step in range(4, 44):
                sinks.log(ROW | {"step": step})
            sinks.log_image(image, 43)
        sinks.log(ROW | {"step": 44})
        sinks.log_image(image, 44)
    for thread in set(threading.enumerate()) - before:
        thread.join(10)  # TensorBoard's: its exception must be reported in this test, not in the next one
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert sorted(line.split(":")[0] for line in warnings) == [
        *(f"could not write {name}" for name in ("TensorBoard's files", "metrics.jsonl", "strips"))
    ]
    assert all("File too large; training continues" in line for line in warnings)
    steps = [row["step"] for row in rows_of(tmp_path)]
    assert (steps[0], steps[-1]) == (3, 44)
    assert len(steps) < 42
    assert all(json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert [path.name for path in (tmp_path / "strips").iterdir()] == ["step_00000044.png"]


class Artefact:
    """W&B's Artifact, which takes a whole checkpoint."""

    def __init__(self, name: str, type: str) -> None:
        self.name, self.type, self.path = name, type, ""

    def add_dir(self, path: str) -> None:
        verify_checkpoint(Path(path))
        self.path = path

    def add_file(self, path: str) -> None:
        self.path = path


@pytest.fixture
def wandb(monkeypatch) -> list[tuple[str, str, str, list[str]]]:
    """Artefacts that a stand-in for W&B has got: name, type, file and aliases of each."""
    got = []
    service = ModuleType("wandb")
    service.__spec__ = ModuleSpec("wandb", None)
    contents = {
        "init": lambda **_: None, "log": lambda *_, **__: None, "finish": lambda: None, "Artifact": Artefact,
        "log_artifact": lambda a, aliases: got.append((a.name, a.type, Path(a.path).name, aliases)),
    }  # fmt: skip
    vars(service).update(contents)
    monkeypatch.setitem(sys.modules, "wandb", service)
    return got


@pytest.mark.slow
@pytest.mark.parametrize("asked", [True, False])
def test_the_best_and_the_last_checkpoint_become_artefacts(
    scenes, tmp_path, monkeypatch, wandb, without_tensorboard, asked
):
    """Evaluations at steps 1 to 4 find 2, 1, 3 and 3. Checkpoints are otherwise saved at step 4 alone."""
    figures = iter([2.0, 1.0, 3.0, 3.0])
    monkeypatch.setattr(Trainer, "figures", lambda *_: ({"tr_r1": 0.0}, next(figures)))
    monkeypatch.setattr(TrainingProgress, "show", lambda *_: None)
    config = pretrain_config(
        scenes, tmp_path / "my run", max_steps=4, eval_every_steps=1, log_to=("wandb",), artefacts=asked
    )
    pretrain(config)
    steps = [("step_00000001", "best"), ("step_00000003", "best"), ("step_00000004", "last")]
    wanted = [("my_run-checkpoint", "model", step, [alias, step, "latest"]) for step, alias in steps]
    assert wandb == (wanted if asked else [])
    assert (config.out / "checkpoints/step_00000003").exists() == asked


@pytest.mark.slow
def test_the_first_rank_alone_sends_rows_and_artefacts(
    scenes, tmp_path, monkeypatch, wandb, without_tensorboard, ranks
):
    sent = tmp_path / "sent"

    def note(what: str) -> None:
        with sent.open("a") as file:
            file.write(f"{what} of rank {os.environ['RANK']}\n")

    service = sys.modules["wandb"]
    monkeypatch.setattr(service, "log", lambda *_, **__: note("row"))
    monkeypatch.setattr(service, "log_artifact", lambda *_, **__: note("artefact"))
    config = pretrain_config(scenes, tmp_path / "run", max_steps=1, log_to=("wandb",), artefacts=True)
    ends = [ended_well(pid) for pid in in_ranks(lambda: pretrain(config), ranks)]
    assert all(ends)
    assert sorted(sent.read_text().splitlines()) == ["artefact of rank 0", "row of rank 0"]


def test_an_artefact_that_cannot_be_sent_is_a_warning(
    trained, tmp_path, monkeypatch, wandb, without_tensorboard, caplog
):
    def fails(*_, **__):
        raise RuntimeError("no network")

    monkeypatch.setattr(sys.modules["wandb"], "log_artifact", fails, raising=False)
    config = pretrain_config(tmp_path / "data", tmp_path / "run", log_to=("wandb",), artefacts=True)
    config.out.mkdir()
    with LogSinks(config, 0) as sinks:
        sinks.log_checkpoint(trained / "checkpoints/step_00000002", "last")
    assert ["artefact of wandb: no network" in message for message in caplog.messages] == [True]


def test_a_report_is_uploaded_to_the_run(tmp_path, wandb, monkeypatch):
    (tmp_path / "run").mkdir()
    upload_report(tmp_path / "run", tmp_path / "run/report.html")
    assert wandb == [("run-report", "report", "report.html", ["latest"])]
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match="--upload"):
        upload_report(tmp_path / "run", tmp_path / "run/report.html")


def test_artefacts_without_wandb_are_refused(scenes, tmp_path):
    with pytest.raises(ConfigError, match="artefacts: wanted --log-to wandb"):
        pretrain_config(scenes, tmp_path / "run", artefacts=True, log_to=("trackio",))
