"""`torchrun -m mvlm pretrain` on two ranks against `mvlm pretrain` on one."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mvlm.distributed.world import World
from mvlm.errors import ConfigError
from mvlm.runs.load import load_model
from mvlm.training.run import make_loader, pretrain
from support.folders import LOSSES, rows_of
from support.models import pretrain_config

PAGE = Path(__file__).parents[3] / "docs" / "guides" / "many_gpus.md"


@pytest.fixture(scope="module", params=["adamw", pytest.param("muon", marks=pytest.mark.extended)])
def runs(request, scenes, tmp_path_factory) -> tuple[Path, Path]:
    """Runs of four steps: one process, and two ranks with FSDP2 and two microbatches each."""
    folder, optimizer = tmp_path_factory.mktemp("runs"), request.param
    config = pretrain_config(
        scenes, folder / "one", max_steps=4, precision="fp32", eval_every_steps=4, optimizer=optimizer
    )
    pretrain(config)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    # The command of docs/guides/many_gpus.md, with another configuration and other folders.
    shown = re.search(
        r"^    torchrun (--standalone.*?) tiny --data data/emoji --out runs/two (.*)$", PAGE.read_text(), re.M
    )
    assert shown is not None
    command = [sys.executable, "-m", "torch.distributed.run", *shlex.split(shown[1])]
    command += ["--config", str(folder / "one" / "config.json"), "--out", str(folder / "two"), *shlex.split(shown[2])]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return folder / "one", folder / "two"


@pytest.mark.slow
def test_two_ranks_log_the_losses_of_one(runs):
    one, two = (rows_of(run) for run in runs)
    assert [row["step"] for row in two] == [1, 2, 3, 4]
    for ours, theirs in zip(two, one, strict=True):
        assert ours["pairs_seen"] == theirs["pairs_seen"]
        for name in LOSSES:
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4), name
    for name in ("tr_r10", "ir_r10"):
        assert two[-1][name] == one[-1][name]
    assert two[-1]["gain_text_nats"] == pytest.approx(one[-1]["gain_text_nats"], abs=1e-3)


@pytest.mark.slow
def test_sharded_model_is_saved_unsharded(runs):
    one, two = (load_model(run).network for run in runs)
    for (name, ours), theirs in zip(two.named_parameters(), one.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-4, msg=name)
    settings = json.loads((runs[1] / "config.json").read_text())
    assert (settings["parallel"], settings["accumulate"]) == ("fsdp", 2)


def test_batch_that_does_not_divide_among_ranks_is_refused(train_split, tokenizer):
    config = pretrain_config(Path(), Path(), batch_size=8, accumulate=2)
    world = World(rank=0, size=3, local_rank=0, device=torch.device("cpu"))
    with pytest.raises(ConfigError, match="wanted a multiple of 3 ranks x 2 microbatches = 6, got 8"):
        make_loader(train_split, tokenizer, config, world)
