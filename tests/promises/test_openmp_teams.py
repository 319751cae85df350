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
from support.data import damage_images, wave_tokenizer, write_dataset
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
_LOADERS = """
from mvlm_dataloading import Augment, Loader, LoaderWork, load_tokenizer, open_dataset

loaders = []
for train in (True, False):
    loader = Loader(
        open_dataset(sys.argv[1], "train" if train else "test"), load_tokenizer(sys.argv[2]), batch_size=20,
        image_size=224, text_length=16, seed=0, train=train, augment=Augment(operations=2) if train else None,
        work=LoaderWork(max_bad_fraction=0.5),
    )
    loaders.append(loader)
    batches = iter(loader)
    for _ in range(4):
        next(batches)
assert loaders[0].skipped == 1  # a batch into which a substitute was copied
print(threads() - before)
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
data, out = Path(sys.argv[1]), Path(sys.argv[2])
model = MaskVLMConfig.preset("tiny", image_layers=1, text_layers=1, cross_layers=1, decoder_layers=1)
for randaugment, keep_mb in ((0, 512), (2, 0)):
    recipe = PretrainConfig.preset("tiny", data=data, out=out / str(randaugment))
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


@pytest.mark.slow
def test_a_run_opens_no_second_openmp_team(tmp_path):
    """Two runs of one process, with evaluations, checkpoints and averaged weights, with and without kept images."""
    data = copy_shapes(tmp_path / "data")
    command = [sys.executable, "-c", _TEAM + _RUN, str(data), str(tmp_path / "runs")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    more = [int(line.split()[-1]) for line in done.stdout.splitlines() if line.startswith("more threads:")]
    assert len(more) == 2
    assert max(more) < TEAM - 1, done.stdout


@pytest.mark.slow
def test_loader_threads_open_no_openmp_team(tmp_path):
    wave_tokenizer().save(tmp_path / "tokenizer.json")
    data = write_dataset(tmp_path / "data", 80, splits=("train", "test"), kinds=("JPEG",), size=(224, 224))
    damage_images(open_dataset(data, "train"), [3])
    command = [sys.executable, "-c", _TEAM + _LOADERS, str(data), str(tmp_path / "tokenizer.json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout.split()[-1]) < TEAM - 1, done.stdout
