"""Whole runs of a micro model: files, metrics, checkpoints, evaluations, faults."""

import json
import shutil
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from mvlm.distributed.world import World
from mvlm.errors import ConfigError
from mvlm.runs.checkpoint_writer import CheckpointWriter
from mvlm.tasks.load import load_model
from mvlm.training import trainer as train
from mvlm.training.run import build_trainer, do_run, make_loader, open_inputs, pretrain
from mvlm.training.trainer import Trainer
from mvlm.verify.verify import threads
from mvlm_dataloading import open_dataset, tokenizer_for
from support.folders import LOSSES, checkpoint_contents, losses_of, rows_of
from support.models import ALONE, micro_config, pretrain_config


def test_run_writes_metrics_configuration_checkpoints_and_events(trained, scenes):
    rows = rows_of(trained)
    assert [row["step"] for row in rows] == [1, 2]
    for number, row in enumerate(rows, 1):
        assert list(row) == [
            *("step", "pairs_seen", "loss", "mlm", "mim", "itc", "itm"),
            *("mlm_accuracy", "itc_accuracy", "itm_accuracy", "grad_norm"),
            *(f"grad_norm_{part}" for part in ("log_scale", "image_encoder", "text_encoder", "image_cross")),
            *(f"grad_norm_{part}" for part in ("text_cross", "image_decoder", "pixel_head", "language_head")),
            *(f"grad_norm_{part}" for part in ("image_projection", "text_projection", "matching_head")),
            *("temperature", "lr", "lr_encoder", "lr_pixels", "pairs_per_s", "data_wait_s"),
            *("seconds", "memory_mb"),
            *("skipped", "bad_steps"),
        ]
        assert (row["lr_encoder"], row["lr_pixels"]) == (row["lr"] / 2, pytest.approx(row["lr"] * 1.5))
        assert 0.06 < row["temperature"] < 0.08
        assert all(0 <= row[f"{name}_accuracy"] <= 1 for name in ("mlm", "itc", "itm"))
        assert row["memory_mb"] > 50
        assert row["pairs_seen"] == 8 * number
        assert row["loss"] == pytest.approx(row["mlm"] + row["mim"] + row["itc"] + row["itm"], rel=1e-5)
        assert row["lr"] == pytest.approx(2e-3 * number / 2)
        assert row["skipped"] == 0
        assert row["pairs_per_s"] > 0 <= row["data_wait_s"]
    config = json.loads((trained / "config.json").read_text())
    assert config["data"] == str(scenes)
    assert config["model"]["mask_token_id"] == 4
    assert sorted(path.name for path in (trained / "checkpoints").iterdir()) == ["step_00000001", "step_00000002"]
    assert list((trained / "tensorboard").iterdir())
    assert {path.name for path in trained.iterdir()} == {
        ".lock",
        "config.json",
        "history.jsonl",
        "metrics.jsonl",
        "checkpoints",
        "tensorboard",
    }


@pytest.mark.slow
def test_equal_seeds_give_equal_runs(scenes, tmp_path, without_tensorboard):
    """Digit for digit in bf16, with two threads; another seed is another run."""
    runs = {}
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        config = pretrain_config(scenes, tmp_path / name, batch_size=16, seed=seed, precision="bf16")
        torch.manual_seed(len(runs))  # whatever was drawn before
        with threads(2):
            pretrain(config)
        weights = checkpoint_contents(config.out / "checkpoints/step_00000002")
        runs[name] = (losses_of(config.out), weights)
    assert runs["a"] == runs["b"]
    assert len(runs["a"][0]) == 2
    for mine, yours in zip(runs["a"][0], runs["c"][0], strict=True):
        assert all(mine[name] != yours[name] for name in LOSSES)
    tensors = []
    for name in "ab":  # as files too
        manifest = json.loads((tmp_path / name / "checkpoints/step_00000002/manifest.json").read_text())
        tensors.append({file: digest for file, digest in manifest["sha256"].items() if "safetensors" in file})
    assert tensors[0] == tensors[1]


@pytest.mark.slow
def test_evaluations_change_no_loss(scenes, tmp_path, without_tensorboard):
    """Nor do they on further data, before the first step and after the last."""
    plain = pretrain_config(scenes, tmp_path / "plain", max_steps=4)
    settings = {"eval_every_steps": 2, "log_every": 4, "eval_images": 3, "also_evaluate": scenes}
    watched = pretrain_config(scenes, tmp_path / "watched", max_steps=4, **settings)
    pretrain(plain)
    pretrain(watched)
    rows = rows_of(watched.out)
    assert [row["step"] for row in rows] == [1, 2, 4]
    assert [sorted(name[:10] for name in row if name.startswith("also_")) for row in rows] == [
        ["also_befor"] * 2,
        [],
        ["also_after"] * 2,
    ]
    figures = {f"{way}_r{k}" for way in ("tr", "ir") for k in (1, 5, 10)}
    figures |= {"gain_text_nats", "gain_pixels_pct", "masked_nats", "masked_l1"}
    for row in rows[1:]:
        assert figures < set(row)
        assert 0 <= row["tr_r1"] <= row["tr_r5"] == row["ir_r10"] == 100
        assert min(abs(row["tr_r1"] - 100 * k / 3) for k in range(4)) < 0.01  # three of the eight images
    others = [row for row in losses_of(plain.out) if row["step"] in (1, 2, 4)]
    assert losses_of(watched.out) == others


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings, steps",
    [
        ({"checkpoint_every_steps": 2, "keep_checkpoints": 0}, [2, 4, 5]),
        ({}, [2, 4, 5]),  # a step takes half of ten minutes here
    ],
)
def test_checkpoints_are_written_by_steps_or_time_and_at_the_end(
    scenes, tmp_path, monkeypatch, without_tensorboard, settings, steps
):
    """A step is saved at most once, the last one too."""
    clock = [0.0]

    def wait(run, batches):
        clock[0] += 301
        return one_step(run, batches)

    one_step, save, saved = Trainer.one_step, CheckpointWriter.save, []
    monkeypatch.setattr(
        train, "time", SimpleNamespace(monotonic=lambda: clock[0], perf_counter=train.time.perf_counter)
    )
    monkeypatch.setattr(Trainer, "one_step", wait)
    monkeypatch.setattr(
        CheckpointWriter, "save", lambda saver, step, *rest: (saved.append(step), save(saver, step, *rest))[1]
    )
    config = pretrain_config(scenes, tmp_path / "run", max_steps=5, **({"keep_checkpoints": 1} | settings))
    pretrain(config)
    assert saved == steps
    left = sorted(path.name for path in (config.out / "checkpoints").iterdir())
    assert left == [f"step_0000000{step}" for step in ([5] if config.keep_checkpoints else steps)]


@pytest.mark.slow
@pytest.mark.parametrize("steps", [2, 0])
def test_a_run_frees_its_trainer_before_it_leaves_the_ranks(scenes, trained, tmp_path, monkeypatch, steps):
    """DDP's reducer may not be the last to hold the process group: a rank would wait for ever in its destructor."""
    made: list[weakref.ref[Trainer]] = []

    def build(inputs, world, checkpoint):
        found = build_trainer(inputs, world, checkpoint)
        made.append(weakref.ref(found))
        return found

    left = []
    monkeypatch.setattr(World, "close", lambda world: left.append(made[0]()))
    out = tmp_path / "run" if steps else Path(shutil.copytree(trained, tmp_path / "run"))
    do_run(pretrain_config(scenes, out, checkpoint_every_steps=1, resume=not steps), open_inputs, build, say_next=False)
    assert left == [None]


def test_loader_augments_as_configured(scenes, tmp_path):
    """One augmentation changes the pixels, and neither captions nor masks."""
    seen = {}
    for name, changes in {"none": {}, "flip": {"flip": 1.0}, "randaugment": {"randaugment": 2}}.items():
        config = pretrain_config(scenes, tmp_path / name, **changes)
        dataset = open_dataset(scenes, "train")
        batch, masks = next(iter(make_loader(dataset, tokenizer_for(dataset, 300), config, ALONE)))
        seen[name] = batch.images, batch.tokens, masks.patch_ids
    whole, flipped, altered = (seen[name][0] for name in ("none", "flip", "randaugment"))
    assert flipped.equal(whole.flip(-1))
    assert not altered.equal(whole)
    for name in ("flip", "randaugment"):
        assert all(a.equal(b) for a, b in zip(seen[name][1:], seen["none"][1:], strict=True))


def test_mask_token_of_the_model_is_the_tokenizers(scenes, tmp_path, without_tensorboard):
    config = pretrain_config(scenes, tmp_path / "run", max_steps=1, model=micro_config(mask_token_id=7))
    pretrain(config)
    loaded = load_model(config.out)
    model, tokenizer = loaded.network, loaded.tokenizer
    assert model.config.mask_token_id == tokenizer.mask_id == 4
    assert json.loads((config.out / "config.json").read_text())["model"]["mask_token_id"] == 4


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"tokenizer": "words.json"}, "model.vocab_size"),
        ({"model": micro_config(vocab_size=100)}, "vocab"),
        ({"cross_attention": "triton", "self_attention": "flash-attn"}, "attention backend"),
        ({"preemption_file": Path(__file__)}, "preemption_file"),
    ],
)
def test_settings_that_do_not_fit_leave_no_folder(scenes, tmp_path, train_split, changes, name):
    """A tokenizer too large, a vocabulary without all bytes, a backend for GPUs, a notice from before the run."""
    if "tokenizer" in changes:
        changes = {"tokenizer": tmp_path / "words.json"}
        tokenizer_for(train_split, 320).save(changes["tokenizer"])
    config = pretrain_config(scenes, tmp_path / "run", **changes)
    with pytest.raises(ConfigError, match=name):
        pretrain(config)
    assert not config.out.exists()


def test_a_part_frozen_at_random_weights_is_named(scenes, trained, tmp_path, caplog):
    def warned(**settings) -> list[str]:
        caplog.clear()
        build_trainer(open_inputs(pretrain_config(scenes, tmp_path / "run", **settings), ALONE), ALONE, "")
        return [record.getMessage().split(":")[0] for record in caplog.records if "frozen" in record.getMessage()]

    frozen = {"train_image": "frozen", "train_cross": "frozen"}
    assert warned(**frozen) == ["train_image", "train_cross"]
    assert warned(**frozen, initial_model=trained) == warned() == []
