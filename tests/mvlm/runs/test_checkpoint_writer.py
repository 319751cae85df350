"""Asynchronous checkpoints: complete or absent, with the state of their step."""

import os
import shutil
import threading
import time
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

from mvlm.runs import checkpoint_writer as writer_module
from mvlm.runs.checkpoint import checkpoints, newest_good_checkpoint, optimizer_tensors, verify_checkpoint
from mvlm.runs.checkpoint_writer import CheckpointWriter, remove_old_checkpoints
from mvlm.runs.load import load_without_head
from mvlm.training.optimizer import make_optimizer
from support.models import ALONE, micro_model, pretrain_config


@pytest.fixture
def save(tokenizer, tmp_path):
    """Function that starts a checkpoint of a micro model; the writer; the model."""
    layers = dict.fromkeys(("image_layers", "text_layers", "cross_layers", "decoder_layers"), 1)
    model = micro_model(dtype=torch.float32, **layers)
    optimizer = make_optimizer(model, pretrain_config(Path(), Path()), ALONE.device)
    writer = CheckpointWriter(tmp_path, ALONE, keep=10)

    def begin(step: int, writer: CheckpointWriter = writer) -> None:
        parts = {"model": model.state_dict(), "optimizer": optimizer_tensors(model, optimizer)}
        parts["optimizer"]["log_scale/step"] = torch.tensor(float(step))
        writer.save(step, model, parts, {}, tokenizer)

    return begin, writer, model


@pytest.fixture
def gate(monkeypatch):
    """Event that the writing thread waits for."""
    opened, write = threading.Event(), writer_module.write_tensors

    def wait(*arguments):
        assert opened.wait(30)
        write(*arguments)

    monkeypatch.setattr(writer_module, "write_tensors", wait)
    return opened


def test_checkpoint_does_not_see_the_next_step(save, gate, tmp_path):
    """The weights change after the call and before a byte is written."""
    begin, writer, model = save
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    begin(1)
    assert not checkpoints(tmp_path)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    gate.set()
    writer.wait()
    found = load_without_head(tmp_path / "step_00000001").network
    assert all(torch.equal(tensor, before[name]) for name, tensor in found.state_dict().items())


@pytest.mark.slow
def test_writer_writes_one_checkpoint_at_a_time(save, gate, tmp_path):
    """The second call waits for the first checkpoint, whose copies it would overwrite."""
    begin, writer, _ = save
    begin(1)
    second = threading.Thread(target=begin, args=(2,))
    second.start()
    second.join(0.2)
    assert second.is_alive()
    gate.set()
    second.join(30)
    assert (tmp_path / "step_00000001").is_dir()
    writer.wait()
    for step in (1, 2):
        verify_checkpoint(tmp_path / f"step_{step:08d}")


@pytest.mark.slow
def test_save_that_the_system_refuses_is_a_warning(save, tmp_path, caplog, file_limit):
    """The system's own error: no file may be longer than 16 kB, and those of the weights are."""
    begin, writer, _ = save
    begin(1)
    writer.wait()
    with file_limit(1 << 14):
        begin(2)
        writer.wait()
    assert f"could not save {tmp_path / 'step_00000002'}" in caplog.text
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000001"]
    assert (writer.failed, writer.newest) == (1, tmp_path / "step_00000001")
    begin(3)
    writer.wait()
    assert newest_good_checkpoint(tmp_path) == writer.newest == tmp_path / "step_00000003"


OPERATIONS = ("write_tensors", "write_safetensors", "write_json", "sync", "sha256")


def die_after(operations: int) -> None:
    """Make this (forked) process end before the operation with this number on a checkpoint, as by kill -9."""
    left = [operations]

    def mortal(function):
        def call(*args, **kwargs):
            if left[0] == 0:
                os._exit(9)
            left[0] -= 1
            return function(*args, **kwargs)

        return call

    for name in OPERATIONS:
        setattr(writer_module, name, mortal(getattr(writer_module, name)))
    Path.rename = mortal(Path.rename)
    patch.object(writer_module, "threading", Immediate).start()


@pytest.mark.slow
def test_kill_during_a_save_leaves_no_partial_checkpoint(save, tmp_path):
    """A kill at each operation in turn, in a fork. The older checkpoint stays good; the new one is good or absent."""
    begin, writer, _ = save
    begin(1)
    writer.wait()
    survived, code = 0, 9
    while code:
        shutil.rmtree(tmp_path / "step_00000002", ignore_errors=True)
        process = os.fork()
        if process == 0:
            die_after(survived)
            begin(2)
            os._exit(0)
        code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        whole = (tmp_path / "step_00000002").is_dir()
        assert newest_good_checkpoint(tmp_path) == tmp_path / ("step_00000002" if whole else "step_00000001")
        assert code == 9 or whole
        survived += 1
    assert survived > 20
    begin(2)
    writer.wait()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00000001", "step_00000002"]


class Immediate:
    """Stand-in for `threading` whose threads run when they are started, in the forked process's only thread."""

    class Thread:
        def __init__(self, target, args, **_):
            self.target, self.args = target, args

        def start(self):
            self.target(*self.args)

        def join(self): ...


def test_the_newest_checkpoints_are_kept(tmp_path):
    def steps() -> list[int]:
        return [int(path.name.removeprefix("step_")) for path in checkpoints(tmp_path)]

    for step in (1, 2, 3, 4, 5, 6, 7, 10):
        (tmp_path / f"step_{step:08d}").mkdir()
    for keep in (0, 9):
        remove_old_checkpoints(tmp_path, keep)
        assert steps() == [1, 2, 3, 4, 5, 6, 7, 10]
    remove_old_checkpoints(tmp_path, 3)
    assert steps() == [6, 7, 10]
    remove_old_checkpoints(tmp_path, 1)
    assert steps() == [10]


@pytest.mark.slow
def test_a_checkpoint_that_is_being_copied_is_kept(tmp_path):
    for step in range(1, 5):
        (tmp_path / f"step_{step:08d}").mkdir()
    remove_old_checkpoints(tmp_path, 1, tmp_path / "step_00000002")
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["step_00000002", "step_00000004"]
    remove_old_checkpoints(tmp_path, 1)
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000004"]


@pytest.mark.parametrize("keep, kept", [(1, [13]), (2, [10, 13])])
def test_damaged_checkpoint_is_renamed_and_not_counted(save, tmp_path, caplog, keep, kept):
    """The run continues from 10, as 12 and 20 are damaged. No save removes a good checkpoint for them or loses one."""
    begin, writer, _ = save
    for step in (10, 12, 20):
        begin(step)
        writer.wait()
    for step in (12, 20):
        (tmp_path / f"step_{step:08d}/state.json").write_text(f"not that of {step}")
    assert newest_good_checkpoint(tmp_path) == tmp_path / "step_00000010"
    resumed = CheckpointWriter(tmp_path, ALONE, keep)
    resumed.resume_from(tmp_path / "step_00000010")
    begin(13, resumed)
    resumed.wait()
    assert (resumed.failed, resumed.newest) == (0, tmp_path / "step_00000013")
    assert newest_good_checkpoint(tmp_path) == resumed.newest
    assert [path.name for path in checkpoints(tmp_path)] == [f"step_{step:08d}" for step in kept]
    begin(20, resumed)
    begin(21, resumed)  # the run's own 20 is good
    resumed.wait()
    assert [path.name for path in checkpoints(tmp_path)][-keep:] == ["step_00000020", "step_00000021"][-keep:]
    for step in (12, 20):
        aside = tmp_path / f"step_{step:08d}.damaged1"
        assert f"the damaged checkpoint is now {aside}" in caplog.text
        assert (aside / "state.json").read_text() == f"not that of {step}"


def test_kill_during_a_removal_leaves_no_partial_checkpoint(tmp_path, monkeypatch):
    for step in (1, 2):
        (tmp_path / f"step_{step:08d}").mkdir()
        (tmp_path / f"step_{step:08d}" / "model.json").write_text("{}")

    def cut_short(path):
        (path / "model.json").unlink()
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", cut_short)
    with pytest.raises(KeyboardInterrupt):
        remove_old_checkpoints(tmp_path, 1)
    assert [path.name for path in checkpoints(tmp_path)] == ["step_00000002"]
    assert (tmp_path / "step_00000002" / "model.json").exists()


def test_a_second_ctrl_c_waits_for_no_save(save, gate):
    begin, writer, _ = save

    def interrupted() -> None:
        with writer:
            begin(1)
            raise KeyboardInterrupt

    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert time.monotonic() - started < 5
    gate.set()
    writer.wait()
