"""Failed steps made again: bits, the module and the op where they failed, other numbers of ranks, and odd folders."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mvlm.errors import RunError
from mvlm.verify.replay import KeptStep, replay
from support.failing import (
    BACKWARD_MODULE,
    FORWARD_MODULE,
    change_before,
    failing_run,
    overflow_forward,
)
from support.forgery import sign
from support.models import ALONE

MICROBATCH = "microbatches/rank_00000.safetensors"


@pytest.fixture(scope="module")
def failed(scenes, tmp_path_factory) -> Path:
    """The failed step of a run, forward. Read only."""
    return failing_run(scenes, tmp_path_factory.mktemp("failed") / "run")


@pytest.fixture
def copy(failed, tmp_path) -> Path:
    return Path(shutil.copytree(failed, tmp_path / "failed_step"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"backward": True, "log_every": 4},
        {"stages": ("0:48:0.4", "2:32")},
        pytest.param({"accumulate": 2, "plan": "plain", "checkpoint_activations": True}, marks=pytest.mark.extended),
        pytest.param({"backward": True, "accumulate": 2, "precision": "bf16"}, marks=pytest.mark.extended),
    ],
    ids=str,
)
def test_a_step_is_repeated_and_its_module_and_op_are_named(scenes, tmp_path, without_tensorboard, settings):
    found = replay(failing_run(scenes, tmp_path / "run", **settings), ALONE)
    assert (found.step, found.differences, list(found.found)) == (2, {}, [0])
    assert found.recorded["grad_norm"] in ("nan", "inf")
    op, backward = found.found[0], settings.get("backward", False)
    assert op.backward == backward
    assert not op.came_in
    assert op.module.startswith(BACKWARD_MODULE if backward else FORWARD_MODULE)
    assert "mm" in op.op
    assert op.place.startswith("mvlm")


@pytest.mark.slow
def test_own_code_runs_if_the_user_names_it_and_masks_of_ones_own_are_kept(scenes, tmp_path, without_tensorboard):
    marker, file = tmp_path / "ran", tmp_path / "mine.py"
    file.write_text(
        f"open({str(marker)!r}, 'a').close()\n\n"
        "def more(features):\n    return 0.01 * features.image.float().square().mean()\n\n"
        "def few(draw):\n    return draw.random(image_mask_ratio=0.4)\n"
    )
    own_loss = f"{file}:more"
    failed = failing_run(scenes, tmp_path / "run", own_loss=own_loss, own_masks=f"{file}:few")
    marker.unlink()
    with pytest.raises(RunError, match="--own-loss"):
        replay(failed, ALONE)
    assert not marker.exists()
    assert replay(failed, ALONE, own_loss).differences == {}


@pytest.mark.slow
def test_a_step_of_ranks_is_repeated_on_as_many_and_on_one(scenes, tmp_path, monkeypatch, ranks, on_ranks, failed):
    """Each rank keeps its own microbatches. On one rank the same module is found, and sums may round otherwise."""
    words = ["pretrain", "--config", failed.parent / "config.json", "--out", tmp_path / "run"]
    with monkeypatch.context() as patch:
        change_before(patch, 2, overflow_forward)
        codes, said = on_ranks(ranks, *words)
    assert codes == [0] * ranks, said
    folder = tmp_path / "run/failed_step"
    kept = [load_file(folder / f"microbatches/rank_{rank:05d}.safetensors") for rank in range(ranks)]
    one = load_file(failed / MICROBATCH)["0/sample_id"]
    assert torch.cat([tensors["0/sample_id"] for tensors in kept]).equal(one)
    codes, said = on_ranks(ranks, "replay", folder)
    assert codes == [0] * ranks, said
    assert "bit for bit" in said
    assert f"rank 0: the first module whose output is not finite, forward: {FORWARD_MODULE}" in said
    alone = replay(folder, ALONE)
    assert (alone.found[0].module, alone.samples) == (FORWARD_MODULE, replay(failed, ALONE).samples)


@pytest.mark.slow
def test_the_command_says_what_it_found(failed, copy, run_mvlm):
    done = run_mvlm("replay", failed)
    assert done.code == 0
    assert done.out[0].startswith("step 2: ")
    assert any("bit for bit" in line for line in done.out)
    assert any(FORWARD_MODULE in line for line in done.out)
    state = json.loads((copy / "state.json").read_text())
    state["values"]["itc"] = "1.5"
    (copy / "state.json").write_text(json.dumps(state))
    sign(copy)
    done = run_mvlm("replay", copy)
    assert done.code == 1
    assert any(line.startswith("no   itc: the run had 1.5") for line in done.out)


EDITS = {
    "token": lambda t: t["0/tokens"].__setitem__(0, 300),
    "negative patch": lambda t: t["0/patch_ids"].__setitem__((0, 0), -1),
    "masked token": lambda t: t["0/token_ids"].__setitem__(0, 10**6),
    "captions": lambda t: t["0/cu_seqlens"].__setitem__(1, -3),
    "longest": lambda t: t.update({"0/max_length": torch.tensor(1)}),
    "images": lambda t: t.update({"0/images": t["0/images"][:, :, :16].contiguous()}),
    "floats": lambda t: t.update({"0/tokens": t["0/tokens"].float()}),
    "missing": lambda t: t.pop("0/text_id"),
    "other pairs": lambda t: t.update({"0/image_of": torch.zeros(8, dtype=torch.int64)}),
}
"""Changes of a microbatch, after which it would read beyond a tensor, or is of no loader."""


@pytest.mark.slow
def test_a_batch_that_no_loader_makes_is_refused(copy):
    tensors = load_file(copy / MICROBATCH)
    for name, edit in EDITS.items():
        changed = {key: tensor.clone() for key, tensor in tensors.items()}
        edit(changed)
        save_file(changed, copy / MICROBATCH)
        sign(copy)
        with pytest.raises(RunError, match=r"rank_00000.safetensors: wanted a batch of the run") as caught:
            KeptStep(copy, None).build(ALONE)
        assert "\n" not in str(caught.value), name


@pytest.mark.parametrize(
    "field, value",
    [("frozen", ["nobody"]), ("microbatches", 3), ("values", {"itc": "__import__"}), ("machine", {}), ("step", -1)],
)
def test_a_state_that_no_run_writes_is_refused(copy, field, value):
    state = json.loads((copy / "state.json").read_text())
    (copy / "state.json").write_text(json.dumps(state | {field: value}))
    sign(copy)
    with pytest.raises(RunError):
        KeptStep(copy, None).build(ALONE)
