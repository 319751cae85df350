"""Sinks for metrics and images. Modules that record their calls stand in for the services."""

import json
import sys
import threading
import time
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mvlm.config.pretrain import PretrainConfig
from mvlm.errors import ConfigError
from mvlm.runs.resume import open_run
from mvlm.training.loggers import LogSinks, start_services
from mvlm.training.run import pretrain
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


@pytest.mark.slow
@pytest.mark.parametrize("name, written", [("wandb", "run/wandb/offline-run-*/*.wandb"), ("trackio", "trackio/*.db")])
def test_service_writes_its_files_offline(tmp_path, monkeypatch, without_tensorboard, name, written):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # read at import
    pytest.importorskip(name, reason=f"pip install 'mvlm[track]' brings {name}")
    config = started(tmp_path, name)
    with LogSinks(config, 0) as sinks:
        sinks.log(ROW)
    assert all(file.stat().st_size > 1000 for file in tmp_path.glob(written))
    assert list(tmp_path.glob(written))


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


def test_services_that_started_are_ended_if_another_cannot(scenes, tmp_path, monkeypatch, without_tensorboard):
    """W&B writes into the run's folder before the run has a config.json."""
    finished = []

    def starts(dir, **_):
        (Path(dir) / "wandb").mkdir(exist_ok=True)

    def fails(**_):
        raise RuntimeError("no login")

    spec = find_spec("json")
    wandb = SimpleNamespace(init=starts, finish=lambda: finished.append(True), __spec__=spec)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setitem(sys.modules, "trackio", SimpleNamespace(init=fails, __spec__=spec))
    config = pretrain_config(scenes, tmp_path / "run", log_to=("wandb", "trackio"))
    with pytest.raises(ConfigError, match="--log-to trackio: could not start a run"):
        pretrain(config)
    assert finished == [True]
    assert open_run(replace(config, log_to=())) is None  # the folder is free


@pytest.mark.slow
def test_tensorboard_keeps_the_step_that_a_run_continues_from(tmp_path):
    config = pretrain_config(tmp_path / "data", tmp_path)
    for first, steps in ((0, (1, 2, 3, 4)), (3, (4, 5))):
        with LogSinks(config, first) as sinks:
            for step in steps:
                sinks.log(ROW | {"step": step, "loss": float(first)})
        time.sleep(1.1)  # TensorBoard names its files by the second
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 0), (2, 0), (3, 0), (4, 3), (5, 3)]


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
