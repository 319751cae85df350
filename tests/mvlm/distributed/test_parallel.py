"""`mvlm pretrain` on two ranks against `mvlm pretrain` on one."""

import json
import os
import re
import shlex
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from mvlm.device import autocast
from mvlm.distributed import coordination
from mvlm.distributed.global_batch import backward_global
from mvlm.distributed.parallel import named_blocks, parallelize
from mvlm.distributed.world import join_ranks
from mvlm.errors import RunError
from mvlm.tasks.load import load_model
from mvlm.training.run import pretrain
from support.faults.forks import ended_well, in_ranks, wait
from support.folders import LOSSES, rows_of
from support.models import micro_batch, micro_config, micro_model, pretrain_config
from support.towers import tower_config

PAGE = Path(__file__).parents[3] / "docs" / "guides" / "many_gpus.md"


@pytest.fixture(params=["adamw", *(pytest.param(name, marks=pytest.mark.extended) for name in ("muon", "tower"))])
def runs(request, scenes, tmp_path, on_ranks) -> tuple[Path, Path]:
    """Runs of two steps: one process, and two ranks with FSDP2 and two microbatches each.

    torchrun starts those of Muon, with the command of docs/guides/many_gpus.md; the others are forked. Those of an
    image tower recompute its blocks.
    """
    folder, optimizer = tmp_path, "muon" if request.param == "muon" else "adamw"
    model = micro_config(image_layers=1, text_layers=1, cross_layers=1, decoder_layers=1)
    if request.param == "tower":
        model = tower_config("test_vit2", image_layers=1)
    settings = {"precision": "fp32", "eval_every_steps": 2, "optimizer": optimizer, "model": model}
    settings["checkpoint_activations"] = request.param == "tower"
    config = pretrain_config(scenes, folder / "one", **settings)
    pretrain(config)
    shown = re.search(
        r"^    torchrun (--standalone.*?) -m mvlm pretrain tiny --data data/emoji --out runs/two (.*)$",
        PAGE.read_text(),
        re.M,
    )
    assert shown is not None
    own = [
        "pretrain",
        "--config",
        str(folder / "one/config.json"),
        "--out",
        str(folder / "two"),
        *shlex.split(shown[2]),
    ]
    if optimizer == "adamw":
        codes, errors = on_ranks(2, *own)
        assert codes == [0, 0], errors
    else:
        command = [sys.executable, "-m", "torch.distributed.run", *shlex.split(shown[1]), "-m", "mvlm", *own]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stderr
    return folder / "one", folder / "two"


@pytest.mark.slow
def test_two_ranks_log_the_losses_and_save_the_weights_of_one(runs):
    one, two = (rows_of(run) for run in runs)
    assert [row["step"] for row in two] == [1, 2]
    for ours, theirs in zip(two, one, strict=True):
        assert ours["pairs_seen"] == theirs["pairs_seen"]
        for name in LOSSES:
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4), name
    for name in ("tr_r10", "ir_r10"):
        assert two[-1][name] == one[-1][name]
    assert two[-1]["gain_text_nats"] == pytest.approx(one[-1]["gain_text_nats"], abs=1e-3)
    one, two = (load_model(run).network for run in runs)  # it is saved whole
    for (name, ours), theirs in zip(two.named_parameters(), one.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-4, msg=name)
    settings = json.loads((runs[1] / "config.json").read_text())
    assert (settings["parallel"], settings["accumulate"]) == ("fsdp", 2)


def note_dtypes(used: set[torch.dtype], module: torch.nn.Module, _: object) -> None:
    used.update(parameter.dtype for parameter in module.parameters())


@pytest.mark.slow
def test_fsdp_gathers_in_bf16_and_keeps_weights_and_gradients_in_fp32(ranks):
    """Losses are within the rounding of bf16, 2^-8, of those with weights gathered in fp32; both run under autocast."""

    def work() -> None:
        world, losses = join_ranks("cpu"), []
        for gathered in (None, torch.bfloat16):
            torch.manual_seed(0)
            model = micro_model(dtype=torch.float32)
            parallel = parallelize(model, world, "fsdp", nodes=1, gathered=gathered)
            used: set[torch.dtype] = set()
            for _, block in named_blocks(model):
                block.register_forward_pre_hook(partial(note_dtypes, used))
            micro = [micro_batch((7, 4, 12, 3), seed=world.rank)]
            found = backward_global(
                parallel, micro, world, seed=0, step=0, plan="fast",
                autocast=lambda: autocast(torch.device("cpu"), "bf16"),
            )  # fmt: skip
            losses.append(found.total.item())
            assert used == {gathered or torch.float32}
            assert {p.dtype for p in model.parameters()} == {torch.float32}
            assert {p.grad.dtype for p in model.parameters() if p.grad is not None} == {torch.float32}
        assert losses[0] == pytest.approx(losses[1], rel=2**-7)
        assert losses[0] != losses[1]
        world.close()

    assert [ended_well(pid) for pid in in_ranks(work, ranks)] == [True] * ranks


@pytest.mark.slow
@pytest.mark.parametrize("shared", [True, False])
def test_a_run_folder_that_ranks_do_not_share_ends_all_at_once(scenes, tmp_path, monkeypatch, ranks, shared):
    """Each rank works in a folder of its own, as on nodes with disks of their own. The folder may appear late."""
    monkeypatch.setattr(coordination, "SHARED_SECONDS", 10.0 if shared else 0.3)
    config = pretrain_config(scenes, Path("run"), max_steps=1)

    def work() -> int:
        place = tmp_path / ("0" if shared else os.environ["RANK"])
        place.mkdir(exist_ok=True)
        os.chdir(place)
        try:
            pretrain(config)
        except (RunError, SystemExit) as error:
            print(f"found: {error}", file=sys.stderr)
            return 2
        return 0

    log = tmp_path / "log"
    codes = [wait(pid) for pid in in_ranks(work, ranks, log)]
    found = [line for line in log.read_text().splitlines() if line.startswith("found: ")]
    if shared:
        assert codes == [0] * ranks, found
        assert not list(tmp_path.glob("0/run/.shared-*"))
        return
    assert codes == [2] * ranks
    (line,) = [line for line in found if line != "found: 2"]
    assert line.startswith("found: run: wanted a folder that all ranks share")
    assert "rank 1" in line
    assert not list(tmp_path.glob("*/run"))
