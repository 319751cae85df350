"""Checkpoints copied to an object store beside training, and runs restored from there. The store is SeaweedFS."""

import json
import logging
import shutil
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mvlm.errors import ConfigError, RunError
from mvlm.runs import mirror, object_store
from mvlm.runs.checkpoint import MANIFEST, checkpoint_name, verify_checkpoint
from mvlm.runs.folder import RunFolder
from mvlm.runs.mirror import MIRROR, Mirror, open_mirror
from mvlm.runs.object_store import StoreFolder
from mvlm.training.run import pretrain
from support.folders import losses_of
from support.gate import Gate, gate_of
from support.models import pretrain_config
from support.seaweed import BUCKET, KEYS, reading_from

pytestmark = pytest.mark.slow


@pytest.fixture
def gate(seaweed, monkeypatch) -> Iterator[Gate]:
    """The way to the store, which tests close. What is tried again is tried soon."""
    monkeypatch.setattr(mirror, "FIRST_PAUSE_S", 0.05)
    monkeypatch.setattr(mirror, "LONGEST_PAUSE_S", 0.2)
    monkeypatch.setattr(mirror, "PATIENCE_S", 1.0)
    with gate_of(seaweed.s3) as found, reading_from(found.address):
        yield found


@pytest.fixture
def place(request) -> Path:
    """A place of this test alone."""
    return Path(f"s3://{BUCKET}/{zlib.crc32(request.node.nodeid.encode()):x}/runs/one")


def copy(place: Path, run: Path, *steps: int, keep: int = 0) -> None:
    """Copy checkpoints of a run to the store, one after another."""
    for step in steps:
        with Mirror(StoreFolder(place), RunFolder(run), keep) as copied:
            copied.add(run / "checkpoints" / checkpoint_name(step))


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_an_empty_folder_gets_the_newest_checkpoint_and_its_run(trained, tmp_path, gate, place):
    copy(place, trained, 1, 2)
    (tmp_path / "run/.restored/model").mkdir(parents=True)  # a kill left it
    open_mirror(place, tmp_path / "run", resume=True)
    ours, theirs = (content(folder) for folder in (tmp_path / "run", trained))
    ours.pop(".lock", None)
    wanted = {n: c for n, c in theirs.items() if n.startswith("checkpoints/step_00000002/")}
    assert ours == wanted | {name: theirs[name] for name in ("config.json", "history.jsonl", "metrics.jsonl")}


def test_a_link_in_the_place_of_the_restored_folder_is_not_followed(trained, tmp_path, gate, place):
    copy(place, trained, 1)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "run/.restored").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(RunError, match="leads elsewhere"):
        open_mirror(place, tmp_path / "run", resume=True)
    assert not list((tmp_path / "elsewhere").iterdir())


def test_a_folder_as_new_as_the_store_stays_as_it_is(trained, run_copy, gate, place):
    copy(place, trained, 1, 2)
    before = content(run_copy)
    open_mirror(place, run_copy, resume=True)
    assert content(run_copy) == before


def test_a_folder_behind_the_store_gets_checkpoint_and_rows(trained, run_copy, gate, place):
    copy(place, trained, 2)
    shutil.rmtree(run_copy / "checkpoints/step_00000002")
    for name in ("metrics.jsonl", "history.jsonl"):  # as they were at step 1
        lines = (run_copy / name).read_text().splitlines(keepends=True)
        (run_copy / name).write_text("".join(lines[: {"metrics.jsonl": 1, "history.jsonl": 2}[name]]))
    open_mirror(place, run_copy, resume=True)
    verify_checkpoint(run_copy / "checkpoints/step_00000002")
    for name in ("metrics.jsonl", "history.jsonl"):
        assert (run_copy / name).read_bytes() == (trained / name).read_bytes()


@pytest.mark.parametrize("how", ["unfinished", "damaged", "manifest", "shorter", "outside"])
def test_what_is_no_whole_checkpoint_is_passed_over(trained, tmp_path, gate, place, how, caplog):
    copy(place, trained, 1, 2)
    store, folder = StoreFolder(place), "step_00000002"
    name = next(name for name in store.names(f"{folder}/model/"))
    size = len(store.read(name, 1 << 30))
    if how == "unfinished":
        store.delete([f"{folder}/{MIRROR}"])
    elif how == "damaged":
        store.put(name, bytes(size), size)
    elif how == "shorter":
        store.put(name, b"", 0)
    else:
        text = store.read(f"{folder}/{MIRROR}", 1 << 20).decode()
        text = "{" if how == "manifest" else text.replace('"tokenizer.json"', '"../tokenizer.json"')
        store.put(f"{folder}/{MIRROR}", text.encode(), len(text))
    open_mirror(place, tmp_path / "run", resume=True)
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == ["step_00000001"]
    assert ("looking for an older one" in caplog.text) == (how != "unfinished")
    assert not (tmp_path / "tokenizer.json").exists()


def test_a_store_with_another_run_is_refused(trained, run_copy, tmp_path, gate, place):
    copy(place, trained, 1)
    with pytest.raises(RunError, match="--resume"):
        open_mirror(place, tmp_path / "run", resume=False)
    history = run_copy / "history.jsonl"
    history.write_text(history.read_text().replace('"time": "2', '"time": "1', 1))
    before = content(run_copy)
    with pytest.raises(RunError, match="another one"):
        open_mirror(place, run_copy, resume=True)
    assert content(run_copy) == before


def test_the_store_keeps_as_many_as_the_run(trained, gate, place):
    store = StoreFolder(place)
    store.put("step_00000000/model/part", b"left by a kill", 14)
    store.put("step_00000009/mirror.json", b"ahead", 5)
    copy(place, trained, 1, 2, keep=1)
    assert {name.split("/")[0] for name in store.names()} == {"step_00000002", "step_00000009"}


def test_a_store_that_is_away_is_told_once_and_tried_again(trained, gate, place, caplog):
    """The store is away for many attempts, of two checkpoints."""
    caplog.set_level(logging.INFO)
    store = StoreFolder(place)
    gate.shut()
    with Mirror(store, RunFolder(trained), 0) as copied:
        for step in (1, 2):
            before = gate.refused
            copied.add(trained / "checkpoints" / checkpoint_name(step))
            until(lambda least=before + 12: gate.refused > least)
        gate.open()
    (told,) = [message for message in caplog.messages if "could not copy" in message]
    assert "step_00000001 there: a connection that broke off" in told
    assert f"step_00000002/{MIRROR}" in store.names()


def test_a_run_ends_though_the_store_stays_away(trained, gate, place, caplog):
    store = StoreFolder(place)
    gate.shut()
    began = time.monotonic()
    with Mirror(store, RunFolder(trained), 0) as copied:
        copied.add(trained / "checkpoints/step_00000002")
    assert time.monotonic() - began < 30
    assert "--resume" in caplog.messages[-1]
    assert copied.copying is None or copied.copying.name == "step_00000002"


KILLED = """
import sys
from pathlib import Path
from mvlm.runs import object_store
from mvlm.runs.folder import RunFolder
from mvlm.runs.mirror import Mirror
object_store.PART_BYTES = 5 << 20
object_store.PARTS_AT_ONCE = 1
run = Path(sys.argv[2])
with Mirror(object_store.StoreFolder(sys.argv[1]), RunFolder(run), 0) as copied:
    copied.add(run / "checkpoints/step_00000002")
"""


def test_an_upload_that_is_killed_between_parts_is_no_checkpoint(run_copy, tmp_path, gate, place, monkeypatch):
    """A file of 40 MB is added to a checkpoint. The process is killed after a quarter of it."""
    monkeypatch.setattr(object_store, "PART_BYTES", 5 << 20)
    copy(place, run_copy, 1)
    checkpoint = run_copy / "checkpoints/step_00000002"
    large = next((checkpoint / "model").iterdir())
    large.write_bytes(large.read_bytes() + bytes(40 << 20))  # as if the model were larger
    manifest = json.loads((checkpoint / MANIFEST).read_text())
    manifest["sha256"][f"model/{large.name}"] = mirror.sha256(large)
    (checkpoint / MANIFEST).write_text(json.dumps(manifest))
    before = gate.sent
    child = subprocess.Popen([sys.executable, "-c", KILLED, f"s3://{str(place)[4:]}", str(run_copy)])
    until(lambda: gate.sent - before > 12 << 20)
    child.kill()
    child.wait()
    names = StoreFolder(place).names("step_00000002/")
    assert f"step_00000002/model/{large.name}" not in names
    open_mirror(place, tmp_path / "restored", resume=True)
    assert [path.name for path in (tmp_path / "restored/checkpoints").iterdir()] == ["step_00000001"]
    copy(place, run_copy, 2)
    assert f"step_00000002/{MIRROR}" in StoreFolder(place).names()
    assert StoreFolder(place).read(f"step_00000002/model/{large.name}", 1 << 30) == large.read_bytes()


@pytest.mark.parametrize("what", ["denied", "no bucket", "away"])
def test_a_store_that_cannot_be_read_ends_a_run_before_it_starts(tmp_path, gate, monkeypatch, what):
    url = f"s3://{BUCKET}/one"
    if what == "denied":
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "another-secret-word")
    elif what == "no bucket":
        url = "s3://no-such-bucket-of-tests/one"
    else:
        gate.shut()
    with pytest.raises(RunError, match=r"^s3://[\w-]+/one: wanted a store that can be read, found ") as caught:
        open_mirror(Path(url), tmp_path / "run", resume=True)
    assert {"denied": "denied", "no bucket": "no such bucket", "away": "a connection that broke off"}[what] in str(
        caught.value
    )
    assert "secret" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_folder_with_checkpoints_goes_on_without_the_store(run_copy, gate, place, caplog):
    gate.shut()
    before = content(run_copy)
    open_mirror(place, run_copy, resume=True)
    assert content(run_copy) == before
    assert "goes on from its own folder" in caplog.text


@pytest.mark.parametrize("url", ["gs://bucket/run", "runs/copies", "https://user:secret-word@host/run"])
def test_another_place_than_s3_is_refused(scenes, url):
    with pytest.raises(ConfigError, match="mirror: wanted s3://BUCKET/PATH") as caught:
        pretrain_config(scenes, Path("run"), mirror=Path(url))
    assert "secret-word" not in str(caught.value)


def test_a_run_goes_on_elsewhere_from_its_copies(scenes, tmp_path, gate, place, without_tensorboard, caplog):
    """The store is away while a run trains to step 2, and back before it ends. Another folder trains to step 4."""
    caplog.set_level(logging.INFO)
    settings = {"max_steps": 4, "checkpoint_every_steps": 1}
    pretrain(pretrain_config(scenes, tmp_path / "whole", **settings))
    out = tmp_path / "first"
    stop = tmp_path / "stop"
    config = pretrain_config(scenes, out, mirror=place, preemption_file=stop, **settings)
    write = mirror.Mirror.add

    def add(self: Mirror, checkpoint: Path) -> None:
        write(self, checkpoint)
        if checkpoint.name == "step_00000001":
            gate.shut()
        if checkpoint.name == "step_00000002":
            stop.touch()
            gate.open()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mvlm.training.stopping.POLL_SECONDS", 0.0)
        patch.setattr(mirror.Mirror, "add", add)
        assert pretrain(config) == str(stop)
    stop.unlink()
    shutil.rmtree(out)
    second = pretrain_config(scenes, tmp_path / "second", mirror=place, resume=True, **settings)
    pretrain(second)
    assert losses_of(second.out) == losses_of(tmp_path / "whole")
    newest = StoreFolder(place).names("step_00000004/")
    assert f"step_00000004/{MIRROR}" in newest
    written = caplog.text + "".join(p.read_text(errors="replace") for p in second.out.rglob("*.json*"))
    for secret in KEYS.values():
        assert secret not in written
