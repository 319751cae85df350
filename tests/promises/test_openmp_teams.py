"""The loader's threads open no OpenMP team, so the training step's stays the only one."""

import subprocess
import sys

import pytest

from mvlm_dataloading import open_dataset
from support.data import damage_images, wave_tokenizer, write_dataset

TEAM = 32
_CODE = f"""
import os, sys
import torch
from mvlm_dataloading import Augment, Loader, load_tokenizer, open_dataset

def threads():
    return len(os.listdir("/proc/self/task"))

torch.set_num_threads({TEAM})
alone = threads()
torch.zeros(1 << 24).add_(1)  # the training step's own team
before = threads()
assert before >= alone + {TEAM} - 1, (alone, before)
loaders = []
for train in (True, False):
    loader = Loader(
        open_dataset(sys.argv[1], "train" if train else "test"), load_tokenizer(sys.argv[2]), batch_size=20,
        image_size=224, text_length=16, seed=0, train=train, augment=Augment(operations=2) if train else None,
        max_bad_fraction=0.5,
    )
    loaders.append(loader)
    batches = iter(loader)
    for _ in range(4):
        next(batches)
assert loaders[0].skipped == 1  # a batch into which a substitute was copied
print(threads() - before)
"""


@pytest.mark.slow
def test_loader_threads_open_no_openmp_team(tmp_path):
    wave_tokenizer().save(tmp_path / "tokenizer.json")
    data = write_dataset(tmp_path / "data", 80, splits=("train", "test"), kinds=("JPEG",), size=(224, 224))
    damage_images(open_dataset(data, "train"), [3])
    command = [sys.executable, "-c", _CODE, str(data), str(tmp_path / "tokenizer.json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout.split()[-1]) < TEAM - 1, done.stdout
