"""No thread but the training step's opens an OpenMP team.

In bf16 oneDNN takes fewer threads for some products. Those that the team loses then end late, beside the new ones, so
runs are in fp32 here.

With more OpenMP threads than cores, libgomp's threads no longer spin, and every operation of the step waits for a
wake-up. A team is seen by its number of threads, which is far above that of all other threads of a run.
"""

import subprocess
import sys

import pytest

from mvlm_dataloading import open_dataset
from support.data import damage_images
from support.shapes import copy_shapes

TEAM = 64
"""Threads of the step's own team: more than a run has of all other kinds, DALI's among them, which end late."""
_TEAM = f"""
import os, sys
import torch

def threads():
    return len(os.listdir("/proc/self/task"))

torch.set_num_threads({TEAM})
alone = threads()
torch.zeros(1 << 24).add_(1)  # the training step's own team
before = threads()
assert before >= alone + {TEAM} - 1, (alone, before)
"""
_RUN = f"""
import threading, time
from dataclasses import replace
from pathlib import Path
from mvlm.config.model import MaskVLMConfig
from mvlm.config.pretrain import PretrainConfig
from mvlm.training.run import pretrain

def watch():
    while not ended.is_set():
        most[0] = max(most[0], threads())
        time.sleep(0.002)

most, ended = [0], threading.Event()
watcher = threading.Thread(target=watch, daemon=True)
watcher.start()
data, damaged, out = map(Path, sys.argv[1:])
model = MaskVLMConfig.preset("tiny", image_layers=1, text_layers=1, cross_layers=1, decoder_layers=1)
for folder, randaugment, keep_mb in ((data, 0, 512), (damaged, 2, 0)):
    recipe = PretrainConfig.preset("tiny", data=folder, out=out / str(randaugment))
    most[0], before = 0, threads()
    pretrain(replace(
        recipe, model=model, max_steps=4, warmup_steps=1, batch_size=20, eval_every_steps=2, checkpoint_every_steps=2,
        ema_decay=0.9, device="cpu", randaugment=randaugment, keep_images_mb=keep_mb, precision="fp32",
    ))
    print("more threads:", most[0] - before)
# A second team would have been seen.
most[0], before = 0, threads()
other = threading.Thread(target=lambda: (torch.zeros(1 << 24).add_(1), time.sleep(0.2)))
other.start()
other.join()
ended.set()
watcher.join()
assert most[0] - before >= {TEAM} - 1, most[0] - before
"""


@pytest.mark.extended
@pytest.mark.slow
def test_a_run_opens_no_second_openmp_team(tmp_path):
    """Two runs of one process, with evaluations, checkpoints and averaged weights, with and without kept images.

    The second has an image that cannot be decoded, in whose place another is copied.
    """
    data, damaged = (copy_shapes(tmp_path / name) for name in ("data", "damaged"))
    damage_images(open_dataset(damaged, "train"), [3])
    command = [sys.executable, "-c", _TEAM + _RUN, data, damaged, tmp_path / "runs"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "skipped an image that cannot be decoded" in done.stderr
    more = [int(line.split()[-1]) for line in done.stdout.splitlines() if line.startswith("more threads:")]
    assert len(more) == 2
    assert max(more) < TEAM - 1, done.stdout
