"""Masks and losses of the user's own, by name, in runs: those of examples/, resumed, in microbatches, on two ranks."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from mvlm.config.json_files import read_config
from mvlm.errors import ConfigError, RunError
from mvlm.runs.folder import RunFolder, read_metrics
from mvlm.training.own_masks import check_masks
from mvlm.training.run import pretrain
from mvlm.verify.verify import verify_run
from mvlm_dataloading import Masks
from support.models import micro_batch, pretrain_config

EXAMPLES = Path(__file__).parents[3] / "examples"
SCHEDULE, ATTENTION = f"{EXAMPLES}/masking_schedule.py:rising", f"{EXAMPLES}/attentive_masks.py:attended"
LOSS = f"{EXAMPLES}/two_views.py:agreement"
LOSSES = ("mlm", "mim", "itc", "itm", "grad_norm")
RISE = 4
"""Updates in which the masking ratio of the tests rises, in place of the example's 1,000."""


def rows(out: Path) -> list[list[float]]:
    return [[row[name] for name in LOSSES] for row in read_metrics(out / "metrics.jsonl")]


@pytest.fixture
def steep() -> Callable[[Path], str]:
    """Name of the schedule of examples/, with a rise of `RISE` updates, that writes its counts to a path (`counts`)."""
    text = (EXAMPLES / "masking_schedule.py").read_text()
    assert "STEPS = 0.3, 0.6, 1000" in text

    def schedule(place: Path) -> str:
        file = place.with_suffix(".py")
        file.write_text(
            text.replace("1000", str(RISE)) + "\n\ndef noted(draw):\n    masks = rising(draw)\n"
            f"    with open({str(place)!r}, 'a') as file:\n"
            "        print(draw.step, masks.patch_ids.shape[1], file=file)\n    return masks\n"
        )
        return f"{file}:noted"

    return schedule


def counts(place: Path) -> dict[int, int]:
    """Masked patches of each update that a schedule wrote. All its microbatches and ranks have equally many."""
    found: dict[int, int] = {}
    for line in place.read_text().splitlines():
        step, count = map(int, line.split())
        assert found.setdefault(step, count) == count
    return found


@pytest.mark.slow
def test_a_schedule_masks_more_with_every_update_resumed_too(scenes, tmp_path, steep):
    place, out = tmp_path / "counts", tmp_path / "run"
    own = {"own_masks": steep(place), "max_steps": RISE + 2, "checkpoint_every_steps": 1, "keep_checkpoints": 0}
    pretrain(pretrain_config(scenes, out, accumulate=2, **own))
    patches = pretrain_config(scenes, out).model.num_patches
    # Linear from 0.3 to 0.6 in `RISE` updates, and then constant; by Python's own rounding.
    wanted = {step: round(patches * (0.3 + 0.3 * min(1.0, step / RISE))) for step in range(RISE + 2)}
    assert counts(place) == wanted
    assert len(set(wanted.values())) > 2
    for later in range(3, RISE + 3):
        shutil.rmtree(out / f"checkpoints/step_{later:08d}")
    place.unlink()
    pretrain(pretrain_config(scenes, out, accumulate=2, **own, resume=True))
    assert counts(place) == {step: count for step, count in wanted.items() if step >= 2}


@pytest.mark.slow
@pytest.mark.parametrize("own", [{"own_masks": SCHEDULE}, {"own_masks": ATTENTION}, {"own_loss": LOSS}])
def test_examples_train_resume_bit_for_bit_and_take_microbatches(scenes, tmp_path, own):
    common = {"max_steps": 3, "checkpoint_every_steps": 1, "keep_checkpoints": 0, "precision": "fp32", **own}
    pretrain(pretrain_config(scenes, tmp_path / "whole", **common))
    pretrain(pretrain_config(scenes, tmp_path / "resumed", **common))
    for later in (2, 3):
        kept = tmp_path / f"resumed/checkpoints/step_{later:08d}"
        shutil.rmtree(kept)
    pretrain(pretrain_config(scenes, tmp_path / "resumed", **common, resume=True))
    assert rows(tmp_path / "resumed") == rows(tmp_path / "whole")
    pretrain(pretrain_config(scenes, tmp_path / "micro", **common, accumulate=2))
    # The attention of a later update has other digits, so other patches may be chosen: compare the first.
    torch.testing.assert_close(rows(tmp_path / "micro")[0], rows(tmp_path / "whole")[0], rtol=1e-4, atol=1e-5)


def test_a_changed_file_is_refused_and_no_config_runs_code(scenes, tmp_path, run_mvlm):
    file, marker = tmp_path / "mine.py", tmp_path / "ran"
    file.write_text(f"open({str(marker)!r}, 'a').close()\n\ndef same(draw):\n    return draw.masks\n")
    own, out = f"{file}:same", tmp_path / "run"
    pretrain(pretrain_config(scenes, out, max_steps=1, own_masks=own))
    assert len(read_config(out / "config.json")["own_masks_sha256"]) == 64
    marker.unlink()
    assert run_mvlm("pretrain", "--config", out / "config.json", "--out", tmp_path / "again").code == 2
    with pytest.raises(RunError, match="--own-masks"):
        list(verify_run(out))
    assert not marker.exists()
    assert not next(iter(verify_run(out, own_masks=own))).problems
    file.write_text(file.read_text() + "# more\n")
    with pytest.raises(RunError, match="own_masks_sha256"):
        pretrain(pretrain_config(scenes, out, max_steps=1, own_masks=own, resume=True))
    with pytest.raises(ConfigError, match="own_masks"):
        list(verify_run(out, own_masks=own))


def test_unchanged_masks_give_the_losses_of_the_loaders(scenes, tmp_path):
    (tmp_path / "mine.py").write_text("def same(draw):\n    return draw.random()\n")
    pretrain(pretrain_config(scenes, tmp_path / "a"))
    pretrain(pretrain_config(scenes, tmp_path / "b", own_masks=f"{tmp_path}/mine.py:same"))
    torch.testing.assert_close(rows(tmp_path / "b"), rows(tmp_path / "a"), rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_two_ranks_mask_as_one(scenes, tmp_path, on_ranks, steep):
    one, two, place = tmp_path / "one", tmp_path / "two", tmp_path / "counts"
    own = steep(place)
    pretrain(pretrain_config(scenes, one, max_steps=RISE, precision="fp32", own_masks=own, own_loss=LOSS))
    wanted = counts(place)
    place.unlink()
    codes, log = on_ranks(
        2, "pretrain", "--config", RunFolder(one).config, "--out", two, "--own-masks", own, "--own-loss", LOSS
    )
    assert codes == [0, 0], log
    assert counts(place) == wanted
    assert len(set(wanted.values())) > 2
    torch.testing.assert_close(rows(two), rows(one), rtol=1e-4, atol=1e-5)
    assert json.loads((two / "config.json").read_text())["own_loss_sha256"]


@pytest.mark.parametrize(
    "patches, tokens",
    [([[0, 16]] * 3, [1]), ([[1, 0]] * 3, [1]), ([[0, 1]] * 2, [1]), ([[0, 1]] * 3, [0]), ([[0, 1]] * 3, [2, 2])],
)
def test_masks_that_are_not_of_the_batch_are_refused(patches, tokens):
    batch, masks = micro_batch()
    check_masks(masks, batch, 16)
    patches = [patches[0]] * (len(patches) + len(batch.images) - 3)
    with pytest.raises(RunError, match="own_masks"):
        check_masks(Masks(patch_ids=torch.tensor(patches), token_ids=torch.tensor(tokens)), batch, 16)


@pytest.mark.parametrize("own", [{"own_loss": LOSS}, {"own_masks": SCHEDULE}])
def test_capture_and_a_wrong_name_are_refused_by_name(scenes, tmp_path, own):
    with pytest.raises(ConfigError, match="capture"):
        pretrain_config(scenes, tmp_path, capture="compile", **own)
    (setting, name), *_ = own.items()
    for wrong in ("nothing", "mvlm.no_module:f", name + "s"):
        with pytest.raises(ConfigError, match=setting):
            pretrain(pretrain_config(scenes, tmp_path / "run", **{setting: wrong}))
