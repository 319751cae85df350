import itertools
import json
import math
import re
from contextlib import ExitStack
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from mvlm.distributed.parallel import compile_step, parallelize
from mvlm.distributed.world import World
from mvlm.errors import ConfigError, NonFiniteLossError, RunError
from mvlm.model import fast
from mvlm.objectives import losses as objectives
from mvlm.runs.checkpoint import verify_checkpoint
from mvlm.runs.checkpoint_writer import CheckpointWriter
from mvlm.runs.folder import read_metrics
from mvlm.runs.load import load_model
from mvlm.training import trainer as train
from mvlm.training.build import make_loader
from mvlm.training.optimizer import make_optimizer
from mvlm.training.run import pretrain
from mvlm.training.trainer import Trainer, learning_rate_factor
from mvlm_dataloading import DataError, open_dataset, tokenizer_for
from support.folders import checkpoint_contents, folder_hash
from support.models import micro_config, micro_model, pretrain_config
from support.scenes import overwrite, write_scenes

CPU = torch.device("cpu")
ALONE = World(rank=0, size=1, local_rank=0, device=CPU)
LOSSES = ("loss", "mlm", "mim", "itc", "itm", "grad_norm")


def test_the_learning_rate_rises_in_a_line_and_falls_as_a_cosine():
    config = pretrain_config(Path(), Path(), max_steps=110, warmup_steps=10, lr_end=0.2)
    factors = [learning_rate_factor(step, config) for step in range(111)]
    assert factors[:10] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0])
    assert factors[10] == 1
    assert factors[60] == pytest.approx((1 + 0.2) / 2)  # half of the way down
    assert factors[35] == pytest.approx(0.2 + 0.8 * (1 + math.sqrt(0.5)) / 2)  # a quarter of the way
    assert factors[110] == pytest.approx(0.2)
    assert all(a > b for a, b in pairwise(factors[10:]))


def test_a_run_without_warm_up_starts_at_the_peak():
    config = pretrain_config(Path(), Path(), max_steps=10, warmup_steps=0)
    assert learning_rate_factor(0, config) == 1


@pytest.mark.parametrize("cross_norm", ["post", "pre"])
def test_only_matrices_decay_and_modules_have_their_rates(cross_norm):
    """What decays is told by the kind of module here: the weights of linear layers, and nothing else."""
    model = micro_model(dtype=torch.float32, cross_norm=cross_norm)
    config = pretrain_config(Path(), Path(), lr_encoder=1e-5, lr_cross=3e-4, lr_pixels=7e-5, weight_decay=0.06)
    optimizer = make_optimizer(model, config, CPU)
    matrices = {id(module.weight) for module in model.modules() if isinstance(module, nn.Linear)}
    rates = {}
    for name, module in model.named_children():
        pixels = name in ("image_cross", "image_decoder", "pixel_head")
        rate = 1e-5 if name in ("image_encoder", "text_encoder") else 7e-5 if pixels else 3e-4
        rates |= {id(parameter): rate for parameter in module.parameters()}
    rates[id(model.log_scale)] = 3e-4

    names = {id(parameter): name for name, parameter in model.named_parameters()}
    seen = []
    for group in optimizer.param_groups:
        assert group["betas"] == (0.9, config.beta2)
        for parameter in group["params"]:
            name = names[id(parameter)]
            assert group["weight_decay"] == (0.06 if id(parameter) in matrices else 0.0), name
            assert group["peak"] == rates[id(parameter)], name
            seen.append(id(parameter))
    assert len(seen) == len(set(seen))
    assert set(seen) == set(names)


@pytest.fixture
def start(scenes, tokenizer, tmp_path):
    """A function that makes a run in progress, and its batches."""

    def make(dtype=torch.float32, **changes):
        config = pretrain_config(scenes, tmp_path / "run", precision="fp32", max_steps=20, **changes)
        model = micro_model(dtype=dtype)
        loader = make_loader(open_dataset(scenes, "train"), tokenizer, config, ALONE)
        run = Trainer(config, ALONE, parallelize(model, ALONE), make_optimizer(model, config, CPU), loader, tokenizer)
        return run, iter(loader)

    return make


def last_numbers(run: Trainer) -> dict[str, float]:
    """What the last step told."""
    return run.metrics.read()[-1]


def test_the_loader_masks_and_cuts_as_the_settings_say(scenes, tokenizer):
    """Patches of 4 pixels in blocks of 8, a quarter of the 16 blocks; all ordinary tokens of captions of at most 5."""
    model = micro_config(patch_size=4, mask_block=8, image_mask_ratio=0.25, text_mask_ratio=1.0, text_length=5)
    config = pretrain_config(scenes, Path(), model=model, batch_size=32)
    batch, masks = next(iter(make_loader(open_dataset(scenes, "train"), tokenizer, config, ALONE)))
    assert batch.images.shape == (32, 3, 32, 32)
    assert masks.patch_ids.shape == (32, 16)
    for row in masks.patch_ids.tolist():
        blocks = [(patch // 8 // 2, patch % 8 // 2) for patch in row]
        assert sorted(blocks.count(block) for block in set(blocks)) == [4, 4, 4, 4]
    starts = batch.cu_seqlens.tolist()
    assert max(b - a for a, b in itertools.pairwise(starts)) == 5
    special = {*starts[:-1], *(end - 1 for end in starts[1:])}
    assert masks.token_ids.tolist() == [t for t in range(starts[-1]) if t not in special]


def test_the_loader_follows_the_seed(scenes, tokenizer):
    orders = []
    for seed in (0, 0, 1):
        config = pretrain_config(scenes, Path(), batch_size=32, seed=seed)
        batch, _ = next(iter(make_loader(open_dataset(scenes, "train"), tokenizer, config, ALONE)))
        orders.append(batch.sample_id.tolist())
    assert orders[0] == orders[1] != orders[2]


@pytest.mark.parametrize("scale, flat", [((0.01, 0.02), True), ((0.9, 1.0), False)])
def test_the_loader_crops_as_the_recipe_says(scenes, tokenizer, scale, flat):
    """A hundredth of a scene is mostly of one colour, nine tenths of it never are."""
    config = pretrain_config(scenes, Path(), batch_size=32, crop_scale=scale)
    batch, _ = next(iter(make_loader(open_dataset(scenes, "train"), tokenizer, config, ALONE)))
    spread = batch.images.flatten(2).float().std(2).amax(1)  # (32,) by picture
    assert (spread < 1).float().mean() > 0.5 if flat else (spread > 10).all()


def test_a_step_is_what_adamw_does_with_the_gradient_of_the_total(start):
    """One update of every parameter against Loshchilov and Hutter's formula in numpy."""
    run, batches = start(warmup_steps=4, weight_decay=0.1, clip_norm=0.5)
    before = {name: p.detach().double().numpy().copy() for name, p in run.model.named_parameters()}
    batch, masks = next(iter(make_loader(run.loader.dataset, run.tokenizer, run.config, ALONE)))
    twin = micro_model(dtype=torch.float32)
    twin(batch, masks, seed=0, step=0, plan=run.config.plan).total.backward()
    gradients = {name: p.grad.double().numpy() for name, p in twin.named_parameters() if p.grad is not None}
    norm = math.sqrt(sum((g**2).sum() for g in gradients.values()))
    assert norm > 0.5

    run.one_step(batches)
    row = last_numbers(run)
    assert run.metrics.steps == [run.step] == [1]
    assert row["grad_norm"] == pytest.approx(norm, rel=1e-5)  # as it was before clipping
    for part, _ in run.model.named_children():
        squares = [(g**2).sum() for name, g in gradients.items() if name.startswith(f"{part}.")]
        assert row[f"grad_norm_{part}"] == pytest.approx(math.sqrt(sum(squares)), rel=1e-5)
    assert {group["lr"] / group["peak"] for group in run.optimizer.param_groups} == {1 / 4}
    peaks = {id(p): (g["peak"], g["weight_decay"]) for g in run.optimizer.param_groups for p in g["params"]}
    for name, parameter in run.model.named_parameters():
        g, (peak, decay) = gradients[name] * 0.5 / norm, peaks[id(parameter)]
        moved = before[name] * (1 - peak / 4 * decay) - peak / 4 * g / (np.abs(g) + 1e-8)  # the first step of Adam
        np.testing.assert_allclose(parameter.detach().numpy(), moved, rtol=1e-6, atol=1e-7, err_msg=name)
        assert parameter.grad is None


def test_the_model_is_told_seed_and_step(start, monkeypatch):
    """ITM's negatives follow from both; reconstruction comes first."""
    run, batches = start(seed=7, reconstruction_first=2)
    told, forward = [], run.model.forward

    def listen(batch, masks, **settings):
        told.append(settings)
        return forward(batch, masks, **settings)

    monkeypatch.setattr(run.model, "forward", listen)
    for _ in range(3):
        run.one_step(batches)
    assert told == [{"seed": 7, "step": step, "reconstruction_only": step < 2, "plan": "fast"} for step in range(3)]


@pytest.mark.parametrize("limit", [1e-3, 1e3])
def test_gradients_are_clipped_to_the_norm(start, limit, monkeypatch):
    run, batches = start(clip_norm=limit)
    norms = []

    def watch(*_):
        squares = [(p.grad.double() ** 2).sum() for p in run.model.parameters() if p.grad is not None]
        norms.append(math.sqrt(sum(squares)))

    monkeypatch.setattr(run.optimizer, "step", watch)
    run.one_step(batches)
    row = last_numbers(run)
    assert 1e-2 < row["grad_norm"] < 1e3
    assert norms == [pytest.approx(min(limit, row["grad_norm"]), rel=1e-3)]


@pytest.mark.parametrize("value, end", [(20.0, math.log(1 / 0.001)), (-3.0, math.log(1 / 0.5))])
def test_the_temperature_is_clamped_after_each_step(start, value, end):
    run, batches = start()
    with torch.no_grad():
        run.model.log_scale.fill_(value)
    run.one_step(batches)
    assert run.model.log_scale.item() == pytest.approx(end, rel=1e-6)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize(
    "term, module, function",
    [
        ("mlm", fast, "linear_cross_entropy"),
        ("mim", fast, "linear_pixel_loss"),
        ("itc", objectives, "contrastive_loss"),
        ("itm", objectives, "matching_loss"),
    ],
)
def test_a_loss_that_is_not_finite_stops_before_the_update(start, monkeypatch, term, module, function, value):
    run, batches = start(max_bad_steps=0)
    run.one_step(batches)
    weights = {name: tensor.clone() for name, tensor in run.model.state_dict().items()}
    moments = [{k: v.clone() for k, v in state.items()} for state in run.optimizer.state.values()]
    loss = getattr(module, function)

    def spoilt(*inputs, **settings):
        found = loss(*inputs, **settings)
        return (found[0] + value, *found[1:]) if isinstance(found, tuple) else found + value

    monkeypatch.setattr(module, function, spoilt)
    run.one_step(batches)
    with pytest.raises(NonFiniteLossError, match=rf"^step 2: {term} is {value}; the update was not made "):
        run.check_skipped_updates(run.metrics)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in run.model.state_dict().items())
    for before, state in zip(moments, run.optimizer.state.values(), strict=True):
        assert all(torch.equal(before[k], v) for k, v in state.items())


def test_a_gradient_that_is_not_finite_stops_too(start):
    """A loss may be finite and its gradient not: here through the square root of zero."""
    run, batches = start(max_bad_steps=0)
    parameter = run.model.pixel_head.bias
    forward = run.model.forward

    def broken(*inputs, **settings):
        losses = forward(*inputs, **settings)
        zero = (parameter.sum() * 0).sqrt()
        return losses._replace(total=losses.total + zero)

    run.model.forward = broken
    before = parameter.detach().clone()
    run.one_step(batches)
    with pytest.raises(NonFiniteLossError, match=r"^step 1: grad_norm is nan; the update was not made "):
        run.check_skipped_updates(run.metrics)
    assert torch.equal(parameter, before)
    assert all(not value.any() for state in run.optimizer.state.values() for value in state.values())


def test_a_run_that_stops_keeps_what_it_had(scenes, tmp_path, monkeypatch, without_tensorboard):
    config = pretrain_config(scenes, tmp_path / "run", max_steps=6, checkpoint_every_steps=2, max_bad_steps=0)
    loss, calls = fast.linear_pixel_loss, []

    def broken(*inputs, **settings):
        calls.append(1)
        return loss(*inputs, **settings) * (math.nan if len(calls) == 4 else 1)

    monkeypatch.setattr(fast, "linear_pixel_loss", broken)
    with pytest.raises(NonFiniteLossError, match=r"^step 4: mim is nan"):
        pretrain(config)
    assert [row["step"] for row in read_metrics(config.out / "metrics.jsonl")] == [1, 2, 3]
    assert [path.name for path in (config.out / "checkpoints").iterdir()] == ["step_00000002"]
    verify_checkpoint(config.out / "checkpoints/step_00000002")


def test_what_a_run_writes(trained, scenes):
    rows = read_metrics(trained / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2]
    for number, row in enumerate(rows, 1):
        assert list(row) == [
            *("step", "pairs_seen", "loss", "mlm", "mim", "itc", "itm"),
            *("mlm_accuracy", "itc_accuracy", "itm_accuracy", "grad_norm"),
            *(f"grad_norm_{part}" for part in ("log_scale", "image_encoder", "text_encoder", "image_cross")),
            *(f"grad_norm_{part}" for part in ("text_cross", "image_decoder", "pixel_head", "language_head")),
            *(f"grad_norm_{part}" for part in ("image_projection", "text_projection", "matching_head")),
            *("temperature", "lr", "lr_encoder", "lr_pixels", "pairs_per_s", "data_wait_s", "memory_mb"),
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
    assert {path.name for path in trained.iterdir()} == {"config.json", "metrics.jsonl", "checkpoints", "tensorboard"}


def test_tensorboard_has_the_same_figures(trained):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(trained / "tensorboard"))
    events.Reload()
    for row, loss, rate in zip(
        read_metrics(trained / "metrics.jsonl"), events.Scalars("mlm"), events.Scalars("lr"), strict=True
    ):
        assert (loss.step, rate.step) == (row["step"], row["step"])
        assert loss.value == pytest.approx(row["mlm"], rel=1e-6)
        assert rate.value == pytest.approx(row["lr"], rel=1e-6)


def losses_of(run: Path) -> list[dict[str, float]]:
    return [{name: row[name] for name in ("step", *LOSSES)} for row in read_metrics(run / "metrics.jsonl")]


def numbers_of(run: Path) -> list[dict[str, float]]:
    """Every field of metrics.jsonl but rates, times and memory."""
    passing = ("pairs_per_s", "data_wait_s", "memory_mb", "mfu")
    return [{k: v for k, v in row.items() if k not in passing} for row in read_metrics(run / "metrics.jsonl")]


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_equal_seeds_equal_runs(scenes, tmp_path, two_threads, without_tensorboard, precision):
    """Digit for digit, with two threads; another seed is another run."""
    runs = {}
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        config = pretrain_config(scenes, tmp_path / name, max_steps=4, batch_size=16, seed=seed, precision=precision)
        torch.manual_seed(len(runs))  # whatever was drawn before
        pretrain(config)
        weights = checkpoint_contents(config.out / "checkpoints/step_00000004")
        runs[name] = (losses_of(config.out), weights)
    assert runs["a"] == runs["b"]
    assert len(runs["a"][0]) == 4
    for mine, yours in zip(runs["a"][0], runs["c"][0], strict=True):
        assert all(mine[name] != yours[name] for name in LOSSES)


class Interrupted(Exception):
    pass


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"reconstruction_first": 4},
        {"eval_every_steps": 2, "batch_size": 7, "ema_decay": 0.9},
        {"reconstruction_first": 3, "skip_spikes": True},  # the objectives change where the run is cut
    ],
)
def test_a_resumed_run_is_the_run_without_a_break(scenes, tmp_path, monkeypatch, without_tensorboard, settings):
    """Six steps, against a run that is stopped in its fifth and goes on from its checkpoint of the third."""
    whole = pretrain_config(scenes, tmp_path / "whole", max_steps=6, **settings)
    pretrain(whole)

    broken = pretrain_config(scenes, tmp_path / "broken", max_steps=6, checkpoint_every_steps=3, **settings)
    one_step = Trainer.one_step

    def stop(run, batches):
        if run.step == 4:
            raise Interrupted
        return one_step(run, batches)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "one_step", stop)
        with pytest.raises(Interrupted):
            pretrain(broken)
    # The line of the fourth was to be written while the fifth ran.
    assert [row["step"] for row in read_metrics(broken.out / "metrics.jsonl")] == [1, 2, 3]
    torch.manual_seed(99)
    pretrain(pretrain_config(scenes, tmp_path / "broken", max_steps=6, resume=True, **settings))

    assert numbers_of(broken.out) == numbers_of(whole.out)
    assert [row["step"] for row in read_metrics(broken.out / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]
    mine, theirs = (checkpoint_contents(run.out / "checkpoints/step_00000006") for run in (broken, whole))
    assert mine == theirs
    assert {name.split("/")[0] for name in mine} > {"model", "optimizer", "generators", "state.json"}


def test_a_run_that_goes_on_past_a_damaged_checkpoint_keeps_its_own(scenes, tmp_path, monkeypatch, without_tensorboard):
    """Step 4 is damaged, so the run goes on from 2 and saves at 3, with room for one: it can go on from 3."""
    config = pretrain_config(scenes, tmp_path / "run", max_steps=4, checkpoint_every_steps=2)
    pretrain(config)
    (config.out / "checkpoints/step_00000004/state.json").write_text("{}")
    one_step = Trainer.one_step

    def stop(run, batches):
        if run.step == 3:
            raise Interrupted
        return one_step(run, batches)

    again = replace(config, resume=True, checkpoint_every_steps=3, keep_checkpoints=1)
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "one_step", stop)
        with pytest.raises(Interrupted):
            pretrain(again)
    assert find_checkpoint(config.out) == config.out / "checkpoints/step_00000003"
    pretrain(again)
    assert find_checkpoint(config.out) == config.out / "checkpoints/step_00000004"


def test_a_full_disk_between_checkpoints_does_not_end_the_run(
    scenes, tmp_path, monkeypatch, without_tensorboard, caplog, file_limit
):
    """No line of steps 2 and 3 can be written; there is room again when step 5 is made and saved."""
    config = pretrain_config(scenes, tmp_path / "run", max_steps=5)
    one_step, full = Trainer.one_step, ExitStack()

    def fill(run, batches):
        if run.step == 2:
            full.enter_context(file_limit((config.out / "metrics.jsonl").stat().st_size + 20))
        if run.step == 4:
            full.close()
        return one_step(run, batches)

    monkeypatch.setattr(Trainer, "one_step", fill)
    with full:
        pretrain(config)
    assert [row["step"] for row in read_metrics(config.out / "metrics.jsonl")] == [1, 4, 5]
    assert caplog.text.count("could not write metrics.jsonl: [Errno 27] File too large; training continues") == 1
    assert find_checkpoint(config.out) == config.out / "checkpoints/step_00000005"


def test_a_complete_run_is_left_as_it_is(scenes, run_copy, caplog):
    before = folder_hash(run_copy)
    with caplog.at_level("INFO"):
        pretrain(pretrain_config(scenes, run_copy, checkpoint_every_steps=1, resume=True))
    assert "is complete: 2 of 2 steps" in caplog.text
    assert folder_hash(run_copy) == before


def test_other_data_is_refused_on_resume(run_copy, tmp_path):
    """Its folder may have moved, its contents may not have changed."""
    other = write_scenes(tmp_path / "other", {"train": 31})
    before = folder_hash(run_copy)
    with pytest.raises(DataError, match="wanted the data of the state, fingerprint"):
        pretrain(pretrain_config(other, run_copy, resume=True))
    assert folder_hash(run_copy) == before


def test_another_tokenizer_is_refused_on_resume(scenes, tmp_path, train_split, without_tensorboard):
    """The file has the name that it had, and other words in it."""
    words = tmp_path / "words.json"
    tokenizer_for(train_split, 300).save(words)
    original = words.read_bytes()
    config = pretrain_config(scenes, tmp_path / "run", tokenizer=words, max_steps=1)
    pretrain(config)
    tokenizer_for(train_split, 280).save(words)
    before = folder_hash(config.out)
    own = f"{config.out}/checkpoints/step_00000001/tokenizer.json"
    with pytest.raises(RunError, match=rf"^{words}: wanted the tokenizer .* the run's is {own}: restore"):
        pretrain(replace(config, resume=True))
    assert folder_hash(config.out) == before
    words.write_bytes(original)
    pretrain(replace(config, resume=True))
    assert folder_hash(config.out) == before


def test_a_checkpoint_of_another_architecture_is_refused_on_resume(scenes, run_copy):
    file = run_copy / "config.json"
    config = json.loads(file.read_text())
    config["model"]["width"] = 24
    file.write_text(json.dumps(config))
    before = folder_hash(run_copy)
    with pytest.raises(RunError, match="a checkpoint of another architecture"):
        pretrain(pretrain_config(scenes, run_copy, resume=True, model=micro_config(width=24)))
    assert folder_hash(run_copy) == before


def test_reconstruction_comes_first(scenes, tmp_path, without_tensorboard):
    config = pretrain_config(scenes, tmp_path / "run", max_steps=3, reconstruction_first=2)
    pretrain(config)
    rows = read_metrics(config.out / "metrics.jsonl")
    assert [(row["itc"] is None, row["itm"] is None) for row in rows] == [(True, True), (True, True), (False, False)]
    for row in rows[:2]:
        assert row["loss"] == pytest.approx(row["mlm"] + row["mim"], rel=1e-5)


def test_itc_and_itm_may_join_within_a_line(scenes, tmp_path, without_tensorboard):
    config = pretrain_config(scenes, tmp_path / "run", max_steps=6, reconstruction_first=4, log_every=3)
    pretrain(config)
    rows = read_metrics(config.out / "metrics.jsonl")
    assert [(row["step"], row["itc"] is None) for row in rows] == [(3, True), (6, False)]
    assert set(rows[0]) == set(rows[1])
    joined = [name for name in rows[0] if name.startswith("grad_norm_") and rows[0][name] == 0 < rows[1][name]]
    assert joined  # what only ITC and ITM train


def test_evaluations_on_the_way_change_nothing(scenes, tmp_path, without_tensorboard):
    plain = pretrain_config(scenes, tmp_path / "plain", max_steps=4)
    watched = pretrain_config(scenes, tmp_path / "watched", max_steps=4, eval_every_steps=2, log_every=4)
    pretrain(plain)
    pretrain(watched)
    rows = read_metrics(watched.out / "metrics.jsonl")
    assert [row["step"] for row in rows] == [2, 4]
    figures = {f"{way}_r{k}" for way in ("tr", "ir") for k in (1, 5, 10)}
    figures |= {"gain_text_nats", "gain_pixels_pct", "masked_nats", "masked_l1"}
    for row in rows:
        assert figures < set(row)
        assert 0 <= row["tr_r1"] <= row["tr_r5"] <= row["tr_r10"] <= row["ir_r10"] == 100  # there are eight pictures
    others = [row for row in losses_of(plain.out) if row["step"] in (2, 4)]
    assert losses_of(watched.out) == others


def test_lines_are_written_every_so_many_steps(scenes, tmp_path, without_tensorboard):
    config = pretrain_config(scenes, tmp_path / "run", max_steps=5, log_every=2)
    pretrain(config)
    assert [row["step"] for row in read_metrics(config.out / "metrics.jsonl")] == [2, 4, 5]


@pytest.mark.parametrize(
    "settings, steps",
    [
        ({"checkpoint_every_steps": 2}, [2, 4, 5]),
        ({"checkpoint_every_steps": 5}, [5]),
        ({"checkpoint_every_minutes": 0.0}, [5]),
        ({"checkpoint_every_minutes": 2.0}, [2, 4, 5]),  # a step takes 61 seconds here
        ({}, [5]),
    ],
)
def test_when_checkpoints_are_written(scenes, tmp_path, monkeypatch, without_tensorboard, settings, steps):
    """Each step at most once: the last is not written over itself."""
    clock = [0.0]

    def wait(run, batches):
        clock[0] += 61
        return one_step(run, batches)

    one_step, save, saved = Trainer.one_step, CheckpointWriter.save, []
    monkeypatch.setattr(
        train, "time", SimpleNamespace(monotonic=lambda: clock[0], perf_counter=train.time.perf_counter)
    )
    monkeypatch.setattr(Trainer, "one_step", wait)
    monkeypatch.setattr(
        CheckpointWriter, "save", lambda saver, step, *rest: (saved.append(step), save(saver, step, *rest))[1]
    )
    config = pretrain_config(scenes, tmp_path / "run", max_steps=5, keep_checkpoints=1, **settings)
    pretrain(config)
    assert saved == steps
    assert [path.name for path in (config.out / "checkpoints").iterdir()] == ["step_00000005"]


def test_the_tokenizer_decides_what_stands_for_a_masked_token(scenes, tmp_path, without_tensorboard):
    config = pretrain_config(scenes, tmp_path / "run", max_steps=1, model=micro_config(mask_token_id=7))
    pretrain(config)
    model, tokenizer = load_model(config.out)
    assert model.config.mask_token_id == tokenizer.mask_id == 4
    assert json.loads((config.out / "config.json").read_text())["model"]["mask_token_id"] == 4


def test_a_tokenizer_by_path(scenes, tmp_path, tokenizer, without_tensorboard):
    tokenizer.save(tmp_path / "words.json")
    config = pretrain_config(scenes, tmp_path / "run", max_steps=1, tokenizer=tmp_path / "words.json")
    pretrain(config)
    assert load_model(config.out)[1].fingerprint == tokenizer.fingerprint


def test_a_tokenizer_that_is_too_large(scenes, tmp_path, train_split):
    tokenizer_for(train_split, 320).save(tmp_path / "words.json")
    size = tokenizer_for(train_split, 320).vocab_size
    config = pretrain_config(scenes, tmp_path / "run", tokenizer=tmp_path / "words.json")
    with pytest.raises(ConfigError, match=f"model.vocab_size: wanted at least the tokenizer's {size}, got 300"):
        pretrain(config)
    assert not config.out.exists()


def test_a_notice_of_preemption_from_before(scenes, tmp_path):
    (tmp_path / "stop").touch()
    config = pretrain_config(scenes, tmp_path / "run", preemption_file=tmp_path / "stop")
    with pytest.raises(ConfigError, match=r"preemption_file: .*stop exists before the run starts; remove"):
        pretrain(config)
    assert not config.out.exists()


def test_a_vocabulary_without_room_for_all_bytes(scenes, tmp_path):
    config = pretrain_config(scenes, tmp_path / "run", model=micro_config(vocab_size=100))
    with pytest.raises(ConfigError, match="wanted a vocabulary of at least 261"):
        pretrain(config)
    assert not config.out.exists()


def test_pictures_that_cannot_be_decoded_are_skipped_and_counted(tmp_path, caplog, without_tensorboard):
    data = write_scenes(tmp_path / "data", {"train": 40})
    overwrite(open_dataset(data, "train"), "image", [3, 17])  # 5 % of 40 is 2
    config = pretrain_config(data, tmp_path / "run", max_steps=6)
    pretrain(config)
    skipped = [row["skipped"] for row in read_metrics(config.out / "metrics.jsonl")]
    assert skipped == sorted(skipped)
    assert skipped[-1] == 2  # six batches of 8 are more than an epoch
    assert len(re.findall("skipped an image that cannot be decoded: .*train-000000.tar", caplog.text)) == 2


def test_too_many_of_them_stop_the_run(tmp_path, without_tensorboard):
    data = write_scenes(tmp_path / "data", {"train": 40})
    overwrite(open_dataset(data, "train"), "image", [3, 17, 20])
    config = pretrain_config(data, tmp_path / "run", max_steps=6)
    with pytest.raises(DataError, match="wanted at most 5% undecodable images, found 3 of 40"):
        pretrain(config)


def test_an_attention_backend_that_cannot_run_here_leaves_no_folder(scenes, tmp_path):
    config = pretrain_config(scenes, tmp_path / "run", cross_attention="triton", self_attention="flash-attn")
    with pytest.raises(ConfigError, match=r"attention backend flash-attn: .*here can run: sdpa, math"):
        pretrain(config)
    assert not (tmp_path / "run").exists()


def test_augmentations_reach_the_loader(scenes, tmp_path):
    """The same run but for one setting sees other pixels; what it is not told of stays as it was."""
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


# Dynamo makes an instance of an autograd.Function while it traces one.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_a_compiled_run_is_the_same_run(start, scenes, tokenizer, tmp_path, monkeypatch):
    """Traced whole and run by torch's own kernels, in float64; batches of every length share a handful of graphs."""
    plain, batches = start(dtype=torch.float64)
    for _ in range(6):
        plain.one_step(batches)
    compiled, batches = start(dtype=torch.float64, compile=True)
    torch._dynamo.reset()
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    compile_step(compiled.model, ALONE, backend="aot_eager")
    for _ in range(6):
        compiled.one_step(batches)
    assert 1 <= torch._dynamo.utils.counters["stats"]["unique_graphs"] - before <= 3
    for wanted, got in zip(plain.metrics.read(), compiled.metrics.read(), strict=True):
        assert got == pytest.approx(wanted, rel=1e-6)  # numbers are kept in fp32


def test_compiling_is_for_one_rank_and_one_microbatch(scenes, tmp_path):
    with pytest.raises(ConfigError, match="compile: wanted one rank, got 2; leave --compile out"):
        compile_step(micro_model(), replace(ALONE, size=2))
    for changes in ({"accumulate": 2}, {"plan": "plain"}):
        with pytest.raises(ConfigError, match="compile: wanted --plan fast and --accumulate 1 with it"):
            pretrain_config(scenes, tmp_path, compile=True, **changes)


def test_evaluation_on_the_first_pictures(scenes, tmp_path):
    """Recall among three is a multiple of a third; among all it would not be."""
    config = pretrain_config(scenes, tmp_path / "run", max_steps=1, eval_every_steps=1, eval_images=3)
    pretrain(config)
    row = read_metrics(config.out / "metrics.jsonl")[-1]
    assert min(abs(row["tr_r1"] - 100 * k / 3) for k in range(4)) < 0.01
    assert (row["tr_r5"], row["tr_r10"]) == (100, 100)
