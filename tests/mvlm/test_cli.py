"""The command line: finding commands, errors as lines and exit codes, help, and one run through all commands."""

import json
import mmap
import os
import re
import subprocess
import sys
from importlib import metadata

import numpy as np
import pytest
import torch
from PIL import Image

from mvlm import cli
from mvlm.errors import ConfigError, RunError
from mvlm.runs.folder import read_metrics
from mvlm_dataloading import DataError
from support.commands import MICRO_FLAGS, assert_refused, run_python
from support.folders import folder_hash
from support.scenes import missing_shard, png, scene


@pytest.mark.parametrize(
    "words, message",
    [
        (
            ["pretrain", "hgue", "--data", "d", "--out", "o"],
            "unknown preset: wanted one of tiny, small, base, got 'hgue'",
        ),
        (["pretrain"], "wanted a preset after `mvlm pretrain`: tiny, small, base, or --config FILE; got nothing"),
        (
            ["pretrain", "--data", "d"],
            "wanted a preset after `mvlm pretrain`: tiny, small, base, or --config FILE; got '--data'",
        ),
        (["pretrian", "tiny"], "unknown command 'pretrian'; did you mean `mvlm pretrain`?"),
        (["eval", "retreival"], "unknown command 'eval retreival'; did you mean `mvlm eval retrieval`?"),
        (["eval"], "unknown command 'eval'; "),
        (["data", "emjoi", "out"], "unknown command 'data emjoi'; did you mean `mvlm data emoji`?"),
        (["zzz"], "unknown command 'zzz'; wanted one of: data emoji, data cc3m"),
    ],
)
def test_mistyped_commands_and_presets_are_refused(run_mvlm, words, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert_refused(run_mvlm(*words), message)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize(
    "words, message",
    [
        (["pretrain", "tiny", "--data", "d", "--out", "o", "--max-stpes", "3"], "max-steps"),
        (["pretrain", "tiny", "--data", "d"], "--out"),
        (["pretrain", "tiny", "--out", "o"], "--data"),
        (["pretrain", "tiny", "--data", "d", "--out", "o", "--max-steps", "many"], "many"),
        (["pretrain", "tiny", "--data", "d", "--out", "o", "--precision", "fp8"], "fp8"),
        (["eval", "retrieval", "--chekpoint", "c", "--data", "d"], "checkpoint"),
        (["report"], "Run folder"),
    ],
)
def test_mistyped_flags_are_refused(run_mvlm, words, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    outcome = run_mvlm(*words)
    assert outcome.code == 2
    assert message in "\n".join(outcome.err)
    assert not list(tmp_path.iterdir())


def test_a_system_error_without_a_path_keeps_its_traceback(run_mvlm, monkeypatch):
    def fail(_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(cli, "run_command", fail)
    with pytest.raises(OSError, match="Input/output error"):
        run_mvlm("pretrain")


@pytest.mark.parametrize(
    "ask",
    [
        lambda: torch.empty(2**50),  # the CPU's allocator
        lambda: bytearray(2**60),
        lambda: mmap.mmap(-1, 2**60, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS),
        lambda: raise_(torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 9 GiB")),
        lambda: raise_(RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be reported later")),
        lambda: raise_(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")),
    ],
)
def test_a_lack_of_memory_is_one_line(run_mvlm, monkeypatch, ask):
    monkeypatch.setattr(cli, "run_command", lambda _: ask())
    outcome = run_mvlm("pretrain")
    assert outcome.code == 2
    wanted = r"mvlm: wanted memory, found too little \(.+\); free some, or lower --batch-size where there is one"
    assert re.fullmatch(wanted, "".join(outcome.err))


def raise_(error):
    raise error


@pytest.mark.parametrize("kind", [ConfigError, RunError, DataError])
def test_an_error_of_several_lines_is_printed_as_one(run_mvlm, monkeypatch, kind):
    def fail(_):
        raise kind("found a file:\n  line 3,\n  line 4")

    monkeypatch.setattr(cli, "run_command", fail)
    outcome = run_mvlm("pretrain")
    assert (outcome.code, outcome.err) == (2, ["mvlm: found a file: line 3, line 4"])


def test_an_error_that_is_not_the_users_keeps_its_traceback(run_mvlm, monkeypatch):
    def fail(_):
        raise ValueError("not the user's doing")

    monkeypatch.setattr(cli, "run_command", fail)
    with pytest.raises(ValueError, match="not the user's doing"):
        run_mvlm("pretrain")


def test_an_interrupt_exits_with_130(run_mvlm, monkeypatch):
    def interrupt(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "run_command", interrupt)
    outcome = run_mvlm("pretrain")
    assert (outcome.code, outcome.err) == (130, ["mvlm: interrupted"])


def test_version_is_that_of_the_package(run_mvlm):
    outcome = run_mvlm("--version")
    assert (outcome.code, outcome.out) == (0, [f"mvlm {metadata.version('mvlm')}"])


def test_help_of_a_first_word_lists_its_commands_alone(run_mvlm):
    lines = run_mvlm("eval", "--help").out
    listed = [line.split()[:3] for line in lines if line.startswith("  mvlm ")]
    assert listed == [["mvlm", *name.split()] for name in cli.COMMANDS if name.startswith("eval ")]
    assert "Evaluation" in lines
    assert "Training" not in lines


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"]])
def test_usage_lists_every_command(run_mvlm, words):
    outcome = run_mvlm(*words)
    assert outcome.code == 0
    for command in cli.COMMANDS:
        assert any(line.startswith(f"  mvlm {command} ") for line in outcome.out)


@pytest.mark.slow
@pytest.mark.parametrize("command", list(cli.COMMANDS))
def test_help_of_every_command(run_mvlm, command):
    outcome = run_mvlm(*command.split(), "--help")
    assert outcome.code == 0
    assert len(outcome.out) >= 2


def test_a_mistake_is_answered_without_importing_torch():
    """In a new process: one line, exit code 2, at once."""
    program = (
        "import sys, atexit, mvlm.cli\n"
        "atexit.register(lambda: print(sorted({'torch', 'nvidia.dali', 'tensorboard'} & set(sys.modules))))\n"
        "mvlm.cli.main()"
    )
    done = run_python("-c", program, "pretrain", "hgue", "--data", "d", "--out", "o")
    assert done.returncode == 2
    assert done.stderr == "mvlm: unknown preset: wanted one of tiny, small, base, got 'hgue'\n"
    assert done.stdout == "[]\n"


def test_a_path_at_home_is_not_a_folder_named_tilde(tmp_path):
    """A shell leaves the ~ of `--out=~/run`."""
    environment = {**os.environ, "HOME": str(tmp_path / "home"), "PYTHONPATH": os.pathsep.join(sys.path)}
    words = ["-m", "mvlm", "eval", "retrieval", "--checkpoint=~/run", "--data", "~/data"]
    done = subprocess.run(
        [sys.executable, *words], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert str(tmp_path / "home") in done.stderr
    assert "~" not in done.stderr


def test_messages_of_other_libraries_are_warnings_alone():
    program = (
        "import logging, mvlm.cli as cli\n"
        "names = 'onnxscript', 'mvlm.runs', 'mvlm_dataloading'\n"
        "cli.run_command = lambda words: [logging.getLogger(name).info(name) for name in names]\n"
        "cli.main()"
    )
    assert run_python("-c", program).stderr.split() == ["mvlm.runs", "mvlm_dataloading"]


def test_a_reader_that_ends_early_is_no_error():
    """As in `mvlm --help | head -1`."""
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "wb") as pipe:
        done = subprocess.run(
            [sys.executable, "-m", "mvlm", "--help"], stdout=pipe, stderr=subprocess.PIPE, check=False
        )
    assert (done.returncode, done.stderr) == (141, b"")


@pytest.mark.slow
def test_python_m_mvlm_is_the_same_program(scenes_copy, tmp_path):
    """`python -m mvlm`, with broken data: nothing but one line is on the error stream, no warning either."""
    missing_shard(scenes_copy, "train")
    before = folder_hash(tmp_path)
    done = run_python("-m", "mvlm", "pretrain", "tiny", "--data", scenes_copy, "--out", tmp_path / "run", *MICRO_FLAGS)
    assert done.returncode == 2
    assert done.stdout == ""
    assert re.fullmatch(r"mvlm: \S+/train-000000.tar: wanted a shard that .*\n", done.stderr)
    assert folder_hash(tmp_path) == before


@pytest.mark.slow
def test_from_shards_to_a_report(run_mvlm, scenes, tmp_path):
    run = tmp_path / "run"
    outcome = run_mvlm("pretrain", "tiny", "--data", scenes, "--out", run, *MICRO_FLAGS, "--log-every", 2)
    assert outcome.code == 0
    assert [line.split("  ")[0] for line in outcome.out] == ["step 2/2"]
    assert all(
        re.fullmatch(r"step \d/2  mlm \S+  mim \S+  itc \S+  itm \S+  \d+ pairs/s", line) for line in outcome.out
    )
    assert [row["step"] for row in read_metrics(run / "metrics.jsonl")] == [2]

    words = ("--checkpoint", run, "--data", scenes, "--split", "test", "--out", run / "eval/test.json", "--rerank", 4)
    outcome = run_mvlm("eval", "retrieval", *words)
    assert outcome.code == 0
    assert "all 8 images, 12 captions" in "\n".join(outcome.out)
    figures = json.loads((run / "eval/test.json").read_text())
    assert (figures["split"], figures["n_images"], figures["n_texts"], figures["reranked"]) == ("test", 8, 12, 4)
    assert list(figures["tr"]) == list(figures["ir"]) == ["r1", "r5", "r10"]
    assert {"itc", "unseen", "gain_text_nats", "gain_pixels_pct", "masked_l1"} < set(figures)

    outcome = run_mvlm("report", run)
    assert outcome.code == 0
    assert outcome.out == [str(run / "report.html")]
    assert (run / "report.html").read_text().startswith("<!doctype html>")

    (tmp_path / "a.png").write_bytes(png(scene(0)[0]))
    image = ("--checkpoint", run, "--image", tmp_path / "a.png")
    for out, message in ((tmp_path / "a.png", "another file than the image"), (tmp_path / "a.foo", "a .png file")):
        assert_refused(run_mvlm("reconstruct", *image, "--caption", "red", "--out", out), f"out: wanted {message}")
    for wrong, panels in ((), 3), (("--wrong-caption", "blue"), 4):
        out = tmp_path / f"{panels}.png"
        outcome = run_mvlm("reconstruct", *image, "--caption", "red", "--out", out, *wrong)
        assert outcome.code == 0
        assert outcome.out[0].startswith(f"{out}: image, masked, rebuilt")
        with Image.open(out) as shown:
            assert shown.size == (32 * panels, 32)
            pixels = np.array(shown)
        assert (pixels[:, :32] == scene(0)[0]).all()
        grey = (pixels[:, 32:64] == 190).all(-1)
        assert grey.sum() == 32 * 32 / 2  # two of four blocks
        assert (pixels[:, 64:96][~grey] == pixels[:, :32][~grey]).all()

    outcome = run_mvlm("fill", *image, "--caption", "red [MASK] left on [MASK]", "--top", 3)
    assert outcome.code == 0
    assert [line.split(":")[0] for line in outcome.out] == ["[MASK] 1", "[MASK] 2"]
    assert all(len(re.findall(r"\d+%", line)) == 3 for line in outcome.out)


@pytest.mark.parametrize(
    "words, names",
    [(("data", "coco"), "ROOT OUT"), (("data", "merge"), "PARTS"), (("study",), "FILE"), (("report",), "RUN")],
)
def test_help_names_what_stands_alone(run_mvlm, words, names):
    text = " ".join(run_mvlm(*words, "--help").out)
    assert names in text
