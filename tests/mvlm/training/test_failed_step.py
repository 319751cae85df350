"""The folder of a run's first step that is not finite: the state before it, and nothing else of the run changed."""

import json
import logging
from pathlib import Path

import pytest
from safetensors.torch import load_file

from mvlm.errors import RunError
from mvlm.model import fast
from mvlm.runs.checkpoint import verify_checkpoint
from mvlm.training.failed_step import FailedStep
from mvlm.training.run import pretrain
from mvlm.verify.replay import KeptStep
from support.folders import checkpoint_contents, reproducible_rows
from support.models import pretrain_config


def tensors_of(folder: Path) -> dict[str, bytes]:
    """Bytes of all tensors of a checkpoint or a failed step, but for microbatches."""
    return {name: value for name, value in checkpoint_contents(folder).items() if "/" in name and "micro" not in name}


@pytest.fixture
def poisoned(monkeypatch, without_tensorboard):
    """Lets the gradients of these calls of MIM, from 1, be NaN."""

    def at(*calls: int) -> None:
        loss, made = fast.masked_pixel_loss, []

        def broken(*inputs, **settings):
            made.append(1)
            found = loss(*inputs, **settings)
            return found + (0 * found).sqrt() if len(made) in calls else found

        monkeypatch.setattr(fast, "masked_pixel_loss", broken)

    return at


@pytest.mark.slow
@pytest.mark.parametrize("log_every", [1, 4])
def test_the_folder_has_the_state_before_the_first_failed_step(scenes, tmp_path, poisoned, log_every):
    """Weights, moments and generators are those of the checkpoint before it; a checkpoint after it is another one."""
    poisoned(3, 5)
    config = pretrain_config(
        scenes, tmp_path / "run", max_steps=6, checkpoint_every_steps=2, keep_checkpoints=9, log_every=log_every
    )
    pretrain(config)
    folder = config.out / "failed_step"
    verify_checkpoint(folder, ("microbatches", "model", "optimizer", "generators", "config.json", "state.json"))
    before, after = (tensors_of(config.out / f"checkpoints/step_0000000{step}") for step in (2, 4))
    found = tensors_of(folder)
    assert found.keys() == before.keys()
    assert found == before != after
    state = json.loads((folder / "state.json").read_text())
    assert (state["step"], state["left_out"], state["values"]["grad_norm"]) == (2, {}, "nan")
    batch = load_file(folder / "microbatches/rank_00000.safetensors")
    assert batch["0/images"].shape == (8, 3, 32, 32)
    assert len(set(state["samples"])) == 8 == len(batch["0/sample_id"].unique())


@pytest.mark.slow
@pytest.mark.parametrize("last", [False, True])
def test_a_run_that_keeps_its_failed_step_is_the_run_that_does_not(scenes, tmp_path, poisoned, last):
    """Also if it is the last step, which no other follows. A resumed run keeps the folder that is there."""
    outs = []
    for limit in (1000, 0):
        poisoned(3 if last else 2)
        config = pretrain_config(
            scenes, tmp_path / str(limit), max_steps=3, failed_step_mb=limit, ema_decay=0.9, optimizer="muon"
        )
        pretrain(config)
        assert (config.out / "failed_step").exists() == (limit > 0)
        outs.append(config.out)
    same = [(reproducible_rows(out), checkpoint_contents(out / "checkpoints/step_00000003")) for out in outs]
    assert same[0] == same[1]


@pytest.mark.slow
def test_what_does_not_fit_is_left_out_and_named(start, tmp_path, poisoned, caplog):
    """First the moments, then the weights, then the microbatches; a replay says what it lacks."""
    poisoned(*range(1, 9))
    run, batches = start()
    sizes = {"weights": sum(x.nbytes for x in run.model.state_dict().values())}
    for limit, left_out, missing in (
        (sizes["weights"] + 60_000, ["optimizer"], None),
        (60_000, ["model", "optimizer"], "weights"),
        (100, ["microbatches", "model", "optimizer"], "microbatches"),
    ):
        folder = tmp_path / str(limit)
        run.failed_step = FailedStep(folder, limit)
        with caplog.at_level(logging.WARNING):
            run.one_step(batches)
            run.write_failed_step()
            run.writer.wait()
        assert list(json.loads((folder / "state.json").read_text())["left_out"]) == left_out
        assert sum(t.nbytes for f in folder.rglob("*.safetensors") for t in load_file(f).values()) < limit + 6_000
        assert f"without {' and '.join(left_out)}".split(" and ")[0] in caplog.text
        if missing:
            with pytest.raises(RunError, match=f"wanted the {missing} .* left out"):
                KeptStep(folder, None)
        else:
            KeptStep(folder, None)
