"""Freed memory stays with the process, in large pages: page faults, counted by the system. Only commands ask for it."""

import subprocess
import sys
from pathlib import Path

import pytest

from mvlm import cli
from mvlm.tasks import finetune
from mvlm.training import freed_memory, run
from support.commands import run_python

_CODE = """
import ctypes
import resource
import torch
from mvlm.training.freed_memory import keep_freed_memory

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def step():
    # 20 tensors of different sizes, 100 MB together, as the activations of a step.
    tensors = [torch.ones(250_000 + 100_000 * k) for k in range(20)]
    del tensors

def faults_a_step():
    for _ in range(3):
        step()
    before = faults()
    for _ in range(5):
        step()
    return (faults() - before) / 5

# Some systems give large pages to all memory. The first figure is of small ones.
PR_SET_THP_DISABLE = 41
prctl = ctypes.CDLL(None).prctl
assert prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0) == 0
print(faults_a_step())
assert prctl(PR_SET_THP_DISABLE, 0, 0, 0, 0) == 0
keep_freed_memory()
torch.ones(1_000_000)  # freed at once: glibc then looks whether the heap's end is free
before = faults()
step()
print(faults() - before)
print(faults_a_step())
"""


@pytest.mark.slow
def test_a_step_reuses_the_memory_of_the_previous_step():
    done = subprocess.run([sys.executable, "-c", _CODE], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    before, first, kept = map(float, done.stdout.split())
    assert before > 10_000  # a page has 4 kB, so 100 MB are 25,000 pages
    assert kept < 100
    choice = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if choice.exists() and "[never]" not in choice.read_text():
        assert first < 5_000  # fresh memory in pages of 2 MB


_HEAP = """
import ctypes, sys
from dataclasses import replace
from pathlib import Path
import mvlm
from mvlm.config.recipes import finetune_defaults
from mvlm.tasks.finetune import finetune
from mvlm.training.freed_memory import keep_freed_memory

data, trained, out = map(Path, sys.argv[1:])
libc = ctypes.CDLL(None)
libc.sbrk.restype, libc.sbrk.argtypes = ctypes.c_void_p, [ctypes.c_ssize_t]
before = libc.sbrk(0)
model = mvlm.load_model(trained).network.config
steps = {"max_steps": 1, "warmup_steps": 1, "batch_size": 4, "eval_every_steps": 0, "device": "cpu"}
mvlm.pretrain(mvlm.PretrainConfig.preset("tiny", data=data, out=out / "p", model=model, **steps))
finetune(replace(finetune_defaults("retrieval", trained, data, out / "f"), **steps))
print(libc.sbrk(0) - before)
keep_freed_memory()
print(libc.sbrk(0) - before)
"""


@pytest.mark.slow
def test_training_in_python_leaves_the_allocator_of_the_process_alone(scenes, trained, tmp_path):
    """Memory is kept by a heap that grows by 1.5 GB of addresses at once."""
    done = run_python("-c", _HEAP, scenes, trained, tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    left_alone, asked = map(int, done.stdout.split()[-2:])
    assert left_alone < 1 << 30 < asked


@pytest.mark.parametrize("device", ["cpu", "auto"])
def test_commands_that_train_keep_freed_memory(monkeypatch, tmp_path, device):
    done = []
    monkeypatch.setattr(freed_memory, "keep_freed_memory", done.append)
    monkeypatch.setattr(run, "pretrain", lambda config: done.append(config.out.name))
    monkeypatch.setattr(finetune, "finetune", lambda config: done.append(config.out.name))
    words = ["--data", str(tmp_path), "--device", device]
    cli.run_command(["pretrain", "tiny", *words, "--out", str(tmp_path / "p")])
    cli.run_command(["finetune", "vqa", *words, "--checkpoint", str(tmp_path), "--out", str(tmp_path / "f")])
    assert done == [device, "p", device, "f"]
