import errno
import json
import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest

from mvlm.config.json_files import read_config, run_config
from mvlm.errors import ConfigError, RunError
from mvlm.runs.folder import MetricsFile, RunLock, read_metrics, write_config
from mvlm.runs.resume import open_run
from support.folders import folder_hash
from support.models import micro_config, pretrain_config


@pytest.fixture
def config(tmp_path):
    """Configuration of a run that has not started."""
    return pretrain_config(tmp_path / "data", tmp_path / "run")


def begin(config) -> None:
    assert open_run(config) is None
    write_config(config)


def refuse(config, *words: str) -> None:
    """Assert that opening the run fails with a one-line error that has the words, and changes no file."""
    before = folder_hash(config.out)
    with pytest.raises(RunError) as caught:
        open_run(config)
    assert "\n" not in str(caught.value)
    for word in (str(config.out), *words):
        assert word in str(caught.value)
    assert folder_hash(config.out) == before


@pytest.mark.parametrize("there", [False, True])
@pytest.mark.parametrize("resume", [False, True])
def test_new_run_claims_a_missing_or_empty_folder(config, there, resume):
    """With --resume too, which starts a run that has not started."""
    if there:
        config.out.mkdir()
    config = pretrain_config(config.data, config.out, resume=resume)
    begin(config)
    written = json.loads((config.out / "config.json").read_text())
    assert written == {"format_version": 3, **json.loads(json.dumps(config.to_dict()))}
    assert written["model"]["width"] == 16


def test_a_folder_that_cannot_hold_the_run_is_refused_and_left_as_it_is(config, tmp_path):
    other, file = (pretrain_config(config.data, tmp_path / name) for name in ("other", "file"))
    other.out.mkdir()
    (other.out / "thesis.tex").write_text("ten years of work")
    file.out.write_text("a file")
    begin(config)
    for refused, words in ((other, "other files"), (file, "found a file"), (config, "--resume")):
        refuse(refused, words, "choose another --out")
    with pytest.raises(RunError, match="wanted an empty folder or a run, found other files"):
        RunLock(other.out)
    assert [path.name for path in other.out.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("resume", [False, True])
def test_different_run_is_refused_with_the_settings_that_differ(config, resume):
    begin(config)
    other = pretrain_config(
        config.data, config.out, resume=resume, seed=7, batch_size=16, model=micro_config(cross_norm="pre")
    )
    refuse(other, "batch_size: config.json has 8, this command 16", "model.cross_norm", "seed")


def test_configuration_is_written_atomically(config, monkeypatch):
    """A partial file, left by a full disk or a kill, does not matter; a resumed run writes no other configuration."""

    def fail(path):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("mvlm_dataloading.files.sync", fail)
        with pytest.raises(OSError, match="No space left"):
            begin(config)
    assert list(config.out.iterdir()) == []
    (config.out / ".config.json.partial").write_text('{"format_ver')
    begin(config)
    written = (config.out / "config.json").read_text()
    assert [path.name for path in config.out.iterdir()] == ["config.json"]
    write_config(replace(config, resume=True, log_every=7))
    assert (config.out / "config.json").read_text() == written


def test_run_folder_belongs_to_one_process(config):
    """A second lock is refused, by this process and by a forked one, until the first is released."""
    with RunLock(config.out):
        before = folder_hash(config.out)
        with pytest.raises(RunError, match="run: wanted a folder that no other process"):
            RunLock(config.out)
        process = os.fork()
        if process == 0:
            os._exit(1 if can_lock(config.out) else 0)
        assert os.waitpid(process, 0)[1] == 0
        assert folder_hash(config.out) == before
    assert can_lock(config.out)


def can_lock(folder: Path) -> bool:
    try:
        with RunLock(folder):
            return True
    except RunError:
        return False


def test_lock_of_a_killed_process_is_free_even_if_a_child_lives_on(config):
    """The child is forked while the lock is held, as the loader's processes are."""
    reading, writing = os.pipe()
    process = os.fork()
    if process == 0:
        with RunLock(config.out):
            child = os.fork()
            if child:
                os.write(writing, child.to_bytes(4, "little"))
            time.sleep(60)
        os._exit(0)
    child = int.from_bytes(os.read(reading, 4), "little")
    assert not can_lock(config.out)
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    try:
        assert can_lock(config.out)
    finally:
        os.kill(child, signal.SIGKILL)


@pytest.mark.slow
def test_resume_continues_from_the_newest_good_checkpoint(run_copy, caplog):
    config = pretrain_config(json.loads((run_copy / "config.json").read_text())["data"], run_copy, resume=True)
    newest, older = run_copy / "checkpoints/step_00000002", run_copy / "checkpoints/step_00000001"
    assert open_run(config) == newest
    (newest / "state.json").write_text("{}")
    assert open_run(config) == older
    assert "state.json: damaged" in caplog.text
    (older / "tokenizer.json").unlink()
    refuse(config, "wanted a good checkpoint, found all of them damaged; remove the folder to start again")


def test_a_run_resumes_if_its_config_lacks_settings_that_are_newer(run_copy):
    values = json.loads((run_copy / "config.json").read_text())
    for name in ("clip_norm", "ema_decay"):
        del values[name]
    for name in ("contrastive", "mask_partner"):
        del values["model"][name]
    (run_copy / "config.json").write_text(json.dumps(values))
    assert open_run(pretrain_config(values["data"], run_copy, resume=True)) is not None
    changed = pretrain_config(values["data"], run_copy, resume=True)
    changed = replace(changed, model=replace(changed.model, contrastive="sigmoid"))
    refuse(changed, "model.contrastive: config.json has softmax, this command sigmoid")


def test_line_of_metrics_is_written_completely_or_not_at_all(tmp_path, file_limit):
    """The next line, when there is room again, is a line of its own."""
    path = tmp_path / "metrics.jsonl"
    metrics = MetricsFile(path, 0)
    metrics.write({"step": 1})
    with file_limit(path.stat().st_size + 5), pytest.raises(OSError, match="File too large"):
        metrics.write({"step": 2})
    assert path.read_text() == '{"step": 1}\n'
    with pytest.raises(ValueError, match="not JSON compliant"):
        metrics.write({"step": 2, "loss": float("nan")})
    metrics.write({"step": 3})
    metrics.close()
    assert path.read_text() == '{"step": 1}\n{"step": 3}\n'


def test_metrics_file_drops_later_rows_and_a_broken_line_on_resume(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"step": step, "loss": 0.5 / step}) for step in (1, 2, 3, 4)]
    path.write_text("\n".join(lines) + '\n{"step": 5, "lo')
    assert [row["step"] for row in read_metrics(path)] == [1, 2, 3, 4]
    metrics = MetricsFile(path, 2)
    metrics.write({"step": 3, "loss": 9.0})
    metrics.close()
    assert path.read_text().splitlines() == [*lines[:2], '{"step": 3, "loss": 9.0}']


def test_read_metrics_skips_lines_that_are_no_rows(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = ["[1]", "3", "null", '{"loss": 1.0}', '{"step": "3"}', "[" * 100_000, '{"step": 2}']
    path.write_bytes(b"\xff\xfe\n" + "\n".join(lines).encode())
    assert read_metrics(path) == read_metrics(path, 2) == [{"step": 2}]
    assert read_metrics(path, 1) == []


def test_run_with_a_configuration_of_version_2_continues(config):
    """`eval_pictures` was renamed `eval_images`, and the attention backend `products` was renamed `math`."""
    config = pretrain_config(config.data, config.out, eval_images=5, self_attention="math", cross_attention="math")
    begin(config)
    file = config.out / "config.json"
    old = json.loads(file.read_text()) | {"format_version": 2, "self_attention": "products"}
    old |= {"cross_attention": "products", "eval_pictures": old.pop("eval_images")}
    file.write_text(json.dumps(old))
    assert run_config(read_config(file), "config.json") == config
    with pytest.raises(RunError, match="holds this run already"):
        open_run(config)
    refuse(replace(config, eval_images=6), "eval_images: config.json has 5, this command 6")


def test_a_run_that_was_refused_leaves_nothing(config):
    with pytest.raises(ConfigError), RunLock(config.out / "new" / "run"):
        raise ConfigError("batch_size: wanted a multiple of 2, got 7")
    assert not config.out.exists()
    config.out.mkdir()
    with pytest.raises(ConfigError), RunLock(config.out):
        raise ConfigError("batch_size: wanted a multiple of 2, got 7")
    assert list(config.out.iterdir()) == []
