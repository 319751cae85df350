"""Freed memory stays with the process, in large pages: page faults, counted by the system. Only commands ask for it."""

import subprocess
import sys
from pathlib import Path

import pytest

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

# Some systems give large pages to all memory. The first figure is of small ones. What imports have freed may have
# raised the size from which glibc gives memory back at once; it is that of a new process again.
PR_SET_THP_DISABLE, M_MMAP_THRESHOLD = 41, -3
assert ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 128 * 1024)
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
