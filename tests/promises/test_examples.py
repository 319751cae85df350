"""The scripts in examples/ do what their first lines say, on small data and micro models, in this process."""

import ast
import os
import re
import runpy
import shlex
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mvlm.cli import run_command
from mvlm.config.model import MaskVLMConfig
from mvlm.runs.load import load_model
from mvlm.tasks.metrics.vqa import vqa_accuracy
from mvlm_dataloading import open_dataset
from support.demo_folder import write_demo_folder
from support.scenes import scene

EXAMPLES = Path(__file__).parents[2] / "examples"
SCRIPTS = sorted(EXAMPLES.glob("*.py"))


def run(monkeypatch: pytest.MonkeyPatch, name: str, *words: object) -> dict[str, Any]:
    """Names that an example leaves when it is run with these words."""
    monkeypatch.setattr(sys, "argv", [name, *map(str, words)])
    return runpy.run_path(str(EXAMPLES / name), run_name="__main__")


@pytest.fixture
def folder(tmp_path, monkeypatch, without_tensorboard) -> Path:
    """A working folder with runs/demo and data/emoji, small ones."""
    monkeypatch.chdir(write_demo_folder(tmp_path))
    return tmp_path


def test_examples_are_few_and_short_and_say_how_to_run_them():
    scripts = [*SCRIPTS, *EXAMPLES.glob("*.sbatch")]
    assert len(scripts) <= 10
    assert {path.suffix for path in EXAMPLES.iterdir() if path.is_file()} == {".md", ".py", ".sbatch", ".toml"}
    for path in SCRIPTS:
        assert len(path.read_text().splitlines()) <= 70, path
        text = ast.get_docstring(ast.parse(path.read_text())) or ""
        assert f"examples/{path.name}" in text, path
        assert "rints" in text or path.name == "counting_task.py", path


def test_layers_in_plain_torch_equal_torchs(monkeypatch, capsys):
    names = run(monkeypatch, "kernels_in_torch.py")
    assert sorted(names["differences"]) == ["gradient of the patches", "gradient of the words", "output"]
    assert max(names["differences"].values()) < 1e-5
    assert names["explanation"].backend == "torch"
    assert "not triton: the tensors are on the CPU" in capsys.readouterr().out


def test_a_swapped_timm_model_equals_the_original(monkeypatch, capsys):
    pytest.importorskip("timm")
    names = run(monkeypatch, "kernels_in_timm.py")
    assert names["difference"] < 1e-4
    assert names["wanted"].std() > 0.1
    printed = capsys.readouterr().out
    assert "swapped: patch_embed (PatchEmbed)" in printed
    assert "embedded patches: (4, 9, 64)\nafter undo: PatchEmbed" in printed


@pytest.mark.slow
def test_swapped_models_of_transformers_equal_the_originals(monkeypatch, capsys):
    pytest.importorskip("transformers")
    names = run(monkeypatch, "kernels_in_transformers.py")
    assert names["fused"] == [2, 0]  # BERT's masks are padding, GPT-2's are causal
    assert max(names["differences"]) < 1e-5
    assert "SDPA: the mask is not plain key padding" in capsys.readouterr().out


@pytest.mark.slow
def test_a_swapped_model_of_diffusers_equals_the_original(monkeypatch, capsys):
    pytest.importorskip("diffusers")
    names = run(monkeypatch, "kernels_in_diffusers.py")
    assert len(names["report"].swapped) == len(names["calls"]) == 8
    assert names["difference"] < 1e-4
    printed = capsys.readouterr().out
    assert "3 calls of 256 queries and 7 keys: by the op" in printed
    assert "3 calls of 256 queries and 256 keys: the shorter side has 256 rows, the kernels take 128" in printed


@pytest.mark.slow
def test_the_training_loop_lowers_the_losses(folder, monkeypatch, capsys):
    words = ["--steps", 12, "--batch-size", 8, "--width", 32]
    history = run(monkeypatch, "training_loop.py", *words)["history"]
    assert len(history) == 12
    assert sum(history[-3:]) < sum(history[:3])
    assert re.search(r"^step 11: mlm \d.*, mim 0.*, itc \d.*, itm 0", capsys.readouterr().out, re.MULTILINE)


@pytest.mark.slow
def test_the_training_loop_masks_as_its_model_is_configured_and_its_model_is_kept(folder, monkeypatch):
    preset = MaskVLMConfig.preset
    changes = {"patch_size": 8, "image_masking": "variable", "text_masking": "variable"}
    monkeypatch.setattr(MaskVLMConfig, "preset", lambda name, **others: preset(name, **others, **changes))
    words = ["--steps", 1, "--batch-size", 8, "--width", 32, "--out", "own"]
    names = run(monkeypatch, "training_loop.py", *words)
    masks = names["masks"]
    assert masks.patch_ids.shape == masks.patch_weights.shape == (8, 144)
    assert masks.token_weights.shape == masks.token_ids.shape
    trained = load_model("own", "cpu")
    assert trained.network.config == names["config"]
    assert trained.tokenizer.fingerprint == names["tokenizer"].fingerprint


@pytest.mark.slow
def test_a_folder_of_pictures_is_pretrained_on(folder, monkeypatch, capsys):
    (folder / "pictures").mkdir()
    for number in range(32):
        pixels, caption = scene(number)
        Image.fromarray(pixels).save(folder / f"pictures/{number}.png")
        (folder / f"pictures/{number}.txt").write_text(caption)
    run(monkeypatch, "pretrain_a_folder.py", "pictures", "mine", "--steps", 2, "--batch-size", 8, "--workers", 0)
    dataset = open_dataset(folder / "mine/data", "train")
    assert 20 <= len(dataset) < 32
    assert len((folder / "mine/run/metrics.jsonl").read_text().splitlines()) >= 1
    printed = capsys.readouterr().out.splitlines()
    assert f"{len(dataset)} pictures to train on; mine/data/rejected.jsonl lists what cannot be used" in printed
    probabilities, captions = zip(*(line.split(maxsplit=1) for line in printed[-2:]), strict=True)
    assert captions == (dataset.captions(0)[0], dataset.captions(len(dataset) - 1)[0])
    assert all(0 <= float(probability) <= 1 for probability in probabilities)


@pytest.mark.slow
def test_own_labels_are_fine_tuned_on(folder, monkeypatch, capsys):
    names = run(monkeypatch, "finetune_labels.py", "--label", "base", "--steps", 2, "--batch-size", 8)
    assert names["frequencies"].total() == len(names["records"]) == 8
    assert {record["answer"] for record in names["records"]} <= {"red", "green", "blue", "yellow"}
    questions = open_dataset(folder / "labels/data", "validation")
    annotations = [questions.metadata(i) for i in range(len(questions))]
    right = {facts["question_id"]: facts["answers"][0]["answer"] for facts in annotations}
    assert vqa_accuracy(right, annotations)["accuracy"] == 100
    printed = capsys.readouterr().out
    assert re.search(r"^accuracy \d+\.\d % \(", printed, re.MULTILINE)
    assert printed.endswith("25.0 %\n")


def test_a_collection_is_searched(folder, monkeypatch, capsys):
    whole = run(monkeypatch, "embed_and_search.py", "blue", "--split", "train")
    train = open_dataset(folder / "data/emoji", "train")
    assert whole["captions"] == [train.captions(i)[0] for i in range(len(train))]
    capsys.readouterr()
    names = run(monkeypatch, "embed_and_search.py", "red top left", "blue", "--top", 3)
    assert names["gallery"].shape == (8, 8)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(": ")[0] for line in lines] == ["red top left", "  by ITM", "blue", "  by ITM"]
    for first, second in (lines[:2], lines[2:]):
        assert sorted(first.split(": ")[1].split(", ")) == sorted(second.split(": ")[1].split(", "))
    best = names["similarity"].argmax(dim=1).tolist()
    assert [line.split(": ")[1].split(", ")[0] for line in lines[::2]] == [names["captions"][i] for i in best]


@pytest.mark.slow
def test_the_study_compares_its_arms(folder, capsys):
    text = (EXAMPLES / "study.toml").read_text()
    assert tomllib.loads(text)["base"] in tomllib.loads(text)["arms"]
    short = {
        "steps = 100": "steps = 2", "size = 64": "size = 8", "warmup_steps = 10": "warmup_steps = 1",
        "width = 64": "width = 16\nimage_size = 32\ncross_layers = 1\ndecoder_layers = 1", "heads = 2": "heads = 1",
        "image_layers = 2": "image_layers = 1", "text_layers = 2": "text_layers = 1",
    }  # fmt: skip
    for long, few in short.items():
        assert long in text
        text = text.replace(long, few)
    (folder / "study.toml").write_text(text)
    run_command(["study", "study.toml", "--data", "data/emoji", "--out", "study"])
    assert "study/study.html" in capsys.readouterr().out
    rows = (folder / "study/study.csv").read_text()
    assert "ITC and ITM alone" in rows
    assert "all four" in rows


@pytest.fixture
def cluster(tmp_path) -> dict[str, str]:
    """Environment in which SLURM's commands and torchrun are stand-ins that write what they were asked."""
    stand_ins = {
        "scontrol": 'echo "scontrol $*" >> asked; [ "$1" = requeue ] || printf "node%s\\n" 07 08',
        "srun": 'exec "$@"',
        # It ends once the notice is there, as a run does.
        "torchrun": "\n".join(
            [
                'echo "torchrun $*" >> asked',
                "until [ -e runs/mvlm-42.stop ]; do sleep 0.02; done",
                "echo saved >> asked",
            ]
        ),
    }
    (tmp_path / "bin").mkdir()
    for name, body in stand_ins.items():
        file = tmp_path / "bin" / name
        file.write_text(f"#!/bin/bash\n{body}\n")
        file.chmod(0o755)
    return os.environ | {
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "SLURM_JOB_ID": "42", "SLURM_JOB_NUM_NODES": "2",
        "SLURM_JOB_NODELIST": "node[07-08]", "SLURM_GPUS_ON_NODE": "8",
    }  # fmt: skip


def test_the_job_of_several_nodes_saves_before_its_end_and_is_queued_again(cluster, tmp_path):
    script = EXAMPLES / "multi_node.sbatch"
    subprocess.run(["bash", "-n", script], check=True)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/mvlm-42.stop").touch()  # left by a job that was killed
    job = subprocess.Popen(["bash", script, "base", "--data", "my data"], cwd=tmp_path, env=cluster)
    asked, deadline = tmp_path / "asked", time.monotonic() + 60
    while not (asked.exists() and "torchrun" in asked.read_text()):
        assert job.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    job.send_signal(signal.SIGUSR1)
    assert job.wait(60) == 0
    first, torchrun, saved, requeued = asked.read_text().splitlines()
    assert (first, saved, requeued) == ("scontrol show hostnames node[07-08]", "saved", "scontrol requeue 42")
    words = shlex.split(torchrun)
    for name, value in {"--nnodes": "2", "--nproc-per-node": "8", "--rdzv-endpoint": "node07:29500"}.items():
        assert words[words.index(name) + 1] == value
    assert torchrun.endswith(
        "-m mvlm pretrain base --data my data --out runs/mvlm-42 --resume --preemption-file runs/mvlm-42.stop"
    )
    assert not (tmp_path / "runs/mvlm-42.stop").exists()


def test_the_job_of_several_nodes_fails_if_the_run_does(cluster, tmp_path):
    (tmp_path / "bin/torchrun").write_text("#!/bin/bash\nexit 2\n")
    done = subprocess.run(["bash", EXAMPLES / "multi_node.sbatch", "base"], cwd=tmp_path, env=cluster)
    assert done.returncode == 2
    assert "requeue" not in (tmp_path / "asked").read_text()
