"""Runs that start from a trained model, or from pretrained encoders."""

import gc
import os
import shutil
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from mvlm.distributed.world import join_ranks
from mvlm.errors import ConfigError, RunError
from mvlm.model.encoders import resize_positions
from mvlm.model.network import MaskVLMNetwork
from mvlm.runs.folder import find_checkpoint, read_metrics
from mvlm.tasks.finetune import finetune
from mvlm.tasks.load import load_model
from mvlm.training.run import build_run, build_trainer, open_inputs, pretrain
from mvlm.verify.verify import verify_run
from mvlm.weights import export_timm_vit
from mvlm.weights.start import choose_tokenizer, make_model, share_tokenizer
from mvlm_dataloading import DataError, Dataset, open_dataset
from support.commands import assert_refused
from support.encoders import hf_text, timm_vit
from support.faults.forks import ended_well, in_ranks, wait
from support.folders import checkpoint_contents
from support.models import ALONE, micro_config, pretrain_config
from support.questions import finetune_config
from support.scenes import write_scenes
from support.text_towers import tower_config, write_text_tower
from support.towers import timm_module
from support.towers import tower_config as image_tower_config


@pytest.mark.slow
def test_a_run_starts_from_the_encoders_of_its_files(scenes, tmp_path, without_tensorboard, tokenizer, caplog):
    """At a learning rate of zero the encoders are unchanged after the run. A missing file leaves no run folder."""
    save_file({name: t.float() for name, t in timm_vit().state_dict().items()}, tmp_path / "vit.safetensors")
    save_file(
        {name: t.float().contiguous() for name, t in hf_text("Roberta").state_dict().items()},
        tmp_path / "text.safetensors",
    )
    files = {"image_weights": tmp_path / "vit.safetensors", "text_weights": tmp_path / "text.safetensors"}
    with pytest.raises(ConfigError, match=r"text_weights: wanted the tokenizer that .* was trained with, found none"):
        pretrain(pretrain_config(scenes, tmp_path / "run", **files))
    assert not (tmp_path / "run").exists()
    tokenizer.save(tmp_path / "tokenizer.json")
    files["tokenizer"] = tmp_path / "tokenizer.json"
    config = pretrain_config(
        scenes, tmp_path / "run", lr_encoder=0.0, lr_cross=1e-3, max_steps=1, weight_decay=0.0, **files
    )
    with caplog.at_level("INFO"):
        pretrain(config)
    assert caplog.text.count("image_encoder: ") == 1
    model = load_model(tmp_path / "run").network
    theirs = load_file(files["image_weights"])
    assert torch.equal(model.get_parameter("image_encoder.position"), theirs["pos_embed"][0])
    words = load_file(files["text_weights"])["embeddings.word_embeddings.weight"]
    assert torch.equal(model.get_parameter("text_encoder.words.weight"), words)

    # A resumed run reads the checkpoint alone.
    files["image_weights"].unlink()
    files["tokenizer"].unlink()
    pretrain(replace(config, resume=True))
    with pytest.raises(DataError, match=r"tokenizer.json: "):
        pretrain(pretrain_config(scenes, tmp_path / "other", **files))
    tokenizer.save(files["tokenizer"])
    with pytest.raises(RunError, match="wanted a safetensors file, could not read it"):
        pretrain(pretrain_config(scenes, tmp_path / "other", **files))
    assert not (tmp_path / "other").exists()


def open_without_tars(source: Path, out: Path) -> Dataset:
    """A training split whose captions cannot be read."""
    dataset = open_dataset(shutil.copytree(source, out), "train")
    for tar in dataset.tars:
        tar.unlink()
    return dataset


def test_a_resumed_run_takes_its_tokenizer_and_reads_no_caption(trained, scenes, tmp_path):
    unreadable = open_without_tars(scenes, tmp_path / "data")
    own = load_model(trained).tokenizer
    assert choose_tokenizer(pretrain_config(scenes, trained), unreadable).fingerprint == own.fingerprint
    with pytest.raises(DataError, match="no such file"):
        choose_tokenizer(pretrain_config(scenes, tmp_path / "new"), unreadable)


@pytest.mark.slow
def test_rank_0_trains_the_tokenizer_and_the_others_read_no_caption(scenes, tokenizer, tmp_path):
    """Of two ranks, the second has no tars. If the first cannot read them either, both end."""

    def work(data: list[Dataset]) -> None:
        os.environ["LOCAL_RANK"] = os.environ["RANK"]
        world = join_ranks("cpu")
        found = share_tokenizer(pretrain_config(scenes, tmp_path / "run"), data[world.rank], world)
        (tmp_path / f"rank-{world.rank}").write_text(found.fingerprint)
        world.close()

    unreadable = open_without_tars(scenes, tmp_path / "data")
    data = [open_dataset(scenes, "train"), unreadable]
    assert [ended_well(pid) for pid in in_ranks(lambda: work(data), 2)] == [True, True]
    assert [(tmp_path / f"rank-{rank}").read_text() for rank in range(2)] == [tokenizer.fingerprint] * 2
    assert [wait(pid) for pid in in_ranks(lambda: work([unreadable] * 2), 2)] == [1, 1]


@pytest.mark.slow
def test_a_run_with_an_image_tower_is_verified_continued_and_exported(scenes, tmp_path, run_mvlm, without_tensorboard):
    """Muon, an average of the weights, recomputed blocks; its checkpoints do not need the file."""
    weights = timm_module(image_tower_config("test_vit")).state_dict()
    save_file(weights, tmp_path / "tower.safetensors")
    words = """--max-steps 4 --batch-size 4 --checkpoint-every-steps 2 --warmup-steps 1 --ema-decay 0.5 --precision fp32
        --checkpoint-activations --device cpu --model.image-tower timm:test_vit --model.image-size 64
        --model.image-layers 2 --model.text-layers 1 --model.cross-layers 1 --model.decoder-layers 1"""
    run, files = tmp_path / "run", ("--data", scenes, "--image-weights", tmp_path / "tower.safetensors")
    outcome = run_mvlm("pretrain", "tiny", *words.split(), *files, "--out", run)
    assert outcome.code == 0, outcome.err
    network = load_model(run).network
    assert (network.config.width, network.config.patch_size, network.config.image_mean) == (64, 16, (0.5, 0.5, 0.5))
    name = "blocks.1.mlp.fc2.weight"
    assert 0 < (network.get_parameter(f"image_encoder.module.{name}") - weights[name]).abs().max() < 0.5
    outcome = run_mvlm("eval", "retrieval", "--checkpoint", run, "--data", scenes, "--out", run / "eval/test.json")
    assert outcome.code == 0, outcome.err
    verified = run_mvlm("verify", run, "--steps", 2).out
    assert [line for line in verified if not line.startswith(("yes", "verified"))] == []
    (tmp_path / "tower.safetensors").unlink()
    assert run_mvlm("export", run, tmp_path / "pt2", "--format", "pt2").code == 0
    with pytest.raises(ConfigError, match="image_tower"):
        export_timm_vit(network)
    own = {"data": scenes, "out": tmp_path / "own", "initial_model": run}
    again = make_model(pretrain_config(**own, model=network.config), fresh=True)
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in network.state_dict().items())
    with pytest.raises(ConfigError, match="image_tower"):
        pretrain(pretrain_config(**own, model=replace(network.config, image_tower="")))


@pytest.mark.slow
def test_a_run_goes_on_from_a_trained_model_on_other_data(trained, run_copy, tmp_path, without_tensorboard, caplog):
    """At a learning rate of zero all weights are the trained ones. The tokenizer is the trained model's."""
    first = load_model(trained)
    before = first.network.state_dict()
    other = write_scenes(tmp_path / "other", captions=lambda i: [f"another text of {i}"])
    still = {"lr_encoder": 0.0, "lr_cross": 0.0, "lr_pixels": 0.0, "weight_decay": 0.0, "max_steps": 1}
    settings = still | {"initial_model": run_copy}
    pretrain(pretrain_config(other, tmp_path / "second", **settings))
    second = load_model(tmp_path / "second")
    assert second.tokenizer.fingerprint == first.tokenizer.fingerprint
    for name, tensor in before.items():
        assert torch.equal(second.network.state_dict()[name], tensor), name

    # Images of another size: the positions are resized, all else stays.
    small = micro_config(image_size=micro_config().image_size // 2)
    with caplog.at_level("INFO"):
        pretrain(pretrain_config(other, tmp_path / "small", model=small, **settings))
    assert caplog.text.count("image_size: 16 pixels, where the model was trained with 32") == 1
    resized = load_model(tmp_path / "small").network.state_dict()
    assert [n for n, t in before.items() if not torch.equal(t, resized[n])] == ["image_encoder.position"]

    # A model of another architecture leaves no folder.
    deeper = micro_config(image_layers=micro_config().image_layers + 1)
    with pytest.raises(RunError, match=r"run: wanted the tensors of this model's architecture, found others"):
        pretrain(pretrain_config(other, tmp_path / "third", model=deeper, **settings))
    assert not (tmp_path / "third").exists()

    # A resumed run reads its own checkpoints alone, an older one if the newest is damaged.
    shutil.rmtree(run_copy)
    shutil.copytree(tmp_path / "second/checkpoints/step_00000001", tmp_path / "second/checkpoints/step_00000002")
    (tmp_path / "second/checkpoints/step_00000002/tokenizer.json").write_text("{")
    pretrain(pretrain_config(other, tmp_path / "second", resume=True, **settings))


@pytest.mark.slow
def test_a_run_with_a_text_tower_resumes_to_the_bit_without_its_folder(scenes, tmp_path, without_tensorboard):
    """The run starts from the folder, keeps what it needs, and is verified; another run goes on from its model."""
    tower = tmp_path / "tower"
    write_text_tower(tower, "bert")
    settings = {"text_tower": tower, "model": tower_config(), "max_steps": 2}
    for name, every in (("whole", 0), ("broken", 1)):
        pretrain(pretrain_config(scenes, tmp_path / name, checkpoint_every_steps=every, **settings))
    shutil.rmtree(tmp_path / "broken/checkpoints/step_00000002")
    shutil.rmtree(tower)
    torch.manual_seed(99)
    pretrain(pretrain_config(scenes, tmp_path / "broken", resume=True, **settings))
    whole, broken = (checkpoint_contents(tmp_path / run / "checkpoints/step_00000002") for run in ("whole", "broken"))
    assert whole == broken
    problems = [problem for check in verify_run(tmp_path / "broken") for problem in check.problems]
    assert [problem for problem in problems if "eval/test.json" not in problem] == []

    still = {"lr_encoder": 0.0, "lr_cross": 0.0, "lr_pixels": 0.0, "weight_decay": 0.0, "max_steps": 1}
    settings = still | {"model": tower_config(), "initial_model": tmp_path / "whole"}
    pretrain(pretrain_config(scenes, tmp_path / "second", **settings))
    first, second = (load_model(tmp_path / run, "cpu").network.state_dict() for run in ("whole", "second"))
    assert any(".tower." in name for name in first)
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def test_positions_behind_the_image_encoder_are_added_not_silently_lost(trained, scenes, tmp_path):
    placed = replace(load_model(trained).network.config, output_positions=True)
    model = make_model(pretrain_config(scenes, tmp_path / "run", model=placed, initial_model=trained), fresh=True)
    assert model.config.output_positions
    model.save_pretrained(tmp_path / "placed")
    load_model(trained).tokenizer.save(tmp_path / "placed/tokenizer.json")
    lost = pretrain_config(scenes, tmp_path / "run", initial_model=tmp_path / "placed")
    with pytest.raises(ConfigError, match=r"output-positions"):
        pretrain(lost)


def test_a_trained_model_takes_a_size_that_fits_the_new_masks_alone(trained, scenes, tmp_path):
    """The trained model's own blocks of 16 pixels do not divide images of 24."""
    old = load_model(trained).network
    new = replace(old.config, mask_block=8, image_size=24, image_mask_ratio=0.2, text_length=14)
    model = make_model(pretrain_config(scenes, tmp_path / "run", model=new, initial_model=trained), fresh=True)
    found, before = model.state_dict(), old.state_dict()
    assert torch.equal(found.pop("image_encoder.position"), resize_positions(before["image_encoder.position"], 3))
    assert torch.equal(found.pop("text_encoder.position")[:12], before["text_encoder.position"])
    assert all(torch.equal(tensor, before[name]) for name, tensor in found.items())
    wider = replace(new, width=32)
    with pytest.raises(RunError, match="wanted the tensors of this model's architecture, found others"):
        pretrain(pretrain_config(scenes, tmp_path / "run", model=wider, initial_model=trained))


@pytest.mark.parametrize(
    "change", [{"heads": 1}, {"cross_norm": "pre"}, {"mim_target": "normalized"}, {"image_mean": (0.1, 0.2, 0.3)}]
)
def test_a_trained_model_whose_weights_mean_something_else_is_refused(trained, scenes, tmp_path, change):
    """Before a network is built, and before there is a folder."""
    model = replace(load_model(trained).network.config, **change)
    config = pretrain_config(scenes, tmp_path / "new/run", model=model, initial_model=trained)
    with (
        networks_built() as built,
        pytest.raises(ConfigError, match=f"was trained with {next(iter(change))} .*; use the same"),
    ):
        pretrain(config)
    assert not built
    assert not (tmp_path / "new").exists()


@contextmanager
def networks_built() -> Iterator[list[weakref.ref[MaskVLMNetwork]]]:
    """Context with a list that gets a reference to each network that is built in it, but for those on `meta`."""
    built: list[weakref.ref[MaskVLMNetwork]] = []

    def see(module: torch.nn.Module, name: str, _: object) -> None:
        meta = torch.get_default_device().type == "meta"
        if isinstance(module, MaskVLMNetwork) and name == "image_encoder" and not meta:
            built.append(weakref.ref(module))

    handle = torch.nn.modules.module.register_module_module_registration_hook(see)
    try:
        yield built
    finally:
        handle.remove()


STARTS: dict[str, tuple[dict[str, Any], int]] = {
    "random": ({}, 1),
    "encoder": ({"image_weights": Path("vit.safetensors")}, 1),
    "model": ({"initial_model": Path("run")}, 2),
    "larger": ({"initial_model": Path("run"), "model": micro_config(image_size=48)}, 2),
    "adapters": ({"initial_model": Path("run"), "train_image": "lora"}, 2),
    "kept": ({"initial_model": Path("run"), "keep_start": 1.0, "model": micro_config(text_length=14)}, 2),
}
"""Settings of a start, and the networks that it builds: the run's own, and the trained one."""


@pytest.mark.parametrize("start", STARTS)
def test_a_run_builds_its_network_once_and_frees_the_one_it_starts_from(run_copy, scenes, tmp_path, start):
    settings, number = STARTS[start]
    save_file({name: t.float() for name, t in timm_vit().state_dict().items()}, tmp_path / "vit.safetensors")
    settings = {name: tmp_path / value if isinstance(value, Path) else value for name, value in settings.items()}
    config = pretrain_config(scenes, tmp_path / "new", **settings)
    with networks_built() as built, build_run(config, ALONE, open_inputs, build_trainer) as trainer:
        trainer.loader.close()
        gc.collect()
        assert len(built) == number
        assert [network() for network in built if network() is not None] == [trainer.model]
        if trainer.keep_start is not None:  # equal at the first step, random positions of longer texts included
            own, kept = trainer.model.state_dict(), trainer.keep_start.start.state_dict()
            assert all(torch.equal(tensor, kept[name]) for name, tensor in own.items())


def test_fine_tuning_builds_its_network_once(trained, questions, tmp_path):
    with networks_built() as built:
        finetune(finetune_config(trained, questions, tmp_path / "run"))
    assert len(built) == 1


def test_the_sigmoid_loss_starts_at_the_odds_of_a_match_in_a_batch(scenes, tmp_path):
    config = pretrain_config(scenes, tmp_path / "run", model=micro_config(contrastive="sigmoid"))
    bias = make_model(config, fresh=True).logit_bias
    assert bias is not None
    assert bias.sigmoid().item() == pytest.approx(1 / config.batch_size)


@pytest.mark.slow
def test_a_run_with_adapters_keeps_what_it_learns_and_resumes_to_the_bit(trained, run_copy, scenes, tmp_path, run_mvlm):
    """Weights are those of its start plus alpha / rank B A, by numpy. It wants its start, and not another one."""
    run, copy = tmp_path / "adapted", tmp_path / "copy"
    parts: dict[str, Any] = {"train_image": "lora", "train_text": "frozen", "train_cross": "lora", "lora_alpha": 4.0}
    settings: dict[str, Any] = {"max_steps": 3, "checkpoint_every_steps": 1, "keep_checkpoints": 3, "ema_decay": 0.5}
    settings |= {"optimizer": "muon", "checkpoint_activations": True, "initial_model": run_copy, **parts}
    settings |= {"also_evaluate": scenes, "log_every": 2}
    pretrain(pretrain_config(scenes, run, **settings))
    shutil.copytree(run, copy)
    for step in (2, 3):
        shutil.rmtree(copy / f"checkpoints/step_0000000{step}")
    pretrain(pretrain_config(scenes, copy, resume=True, **settings))
    last = "checkpoints/step_00000003"
    for part in ("model", "ema", "optimizer"):
        one, other = (load_file(next((folder / last / part).iterdir())) for folder in (run, copy))
        assert one.keys() == other.keys()
        assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
    *checks, _ = verify_run(run)  # it was not evaluated
    assert [check.problems for check in checks] == [[]] * 4

    stored = load_file(next((run / last / "ema").iterdir()))
    before, after = load_model(trained).network.state_dict(), load_model(run).network.state_dict()
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        factor = f"{name.removesuffix('.weight')}.parametrizations.weight.0"
        if f"{factor}.a" in stored:
            wanted = tensor.numpy() + 4 / 8 * stored[f"{factor}.b"].numpy() @ stored[f"{factor}.a"].numpy()
            np.testing.assert_allclose(after[name].numpy(), wanted, atol=1e-6)
            assert not torch.equal(after[name], tensor)
        else:
            assert torch.equal(after[name], (before | stored)[name]), name
    assert not any("original" in name or name.startswith(("text_encoder", "language_head")) for name in stored)
    validation = open_dataset(scenes, "validation")
    for row, path in zip(read_metrics(run / "metrics.jsonl")[::2], (trained, run), strict=True):
        found = {name[-5:]: value for name, value in row.items() if name.startswith("also_")}
        wanted = load_model(path).evaluate(validation).figures["itc"]
        assert found == {f"{way}_r1": wanted[way]["r1"] for way in ("tr", "ir")}

    assert run_mvlm("export", run, tmp_path / "mean", "--mix", 0.5).code == 0
    mean = load_model(tmp_path / "mean").network.state_dict()
    for name, tensor in before.items():
        np.testing.assert_array_equal(mean[name].numpy(), 0.5 * (tensor.numpy() + after[name].numpy()))
    for words in ((trained, "--mix", 0.5), (run, "--mix", 1.5), (run, "--mix", 0.5, "--format", "hub")):
        assert_refused(run_mvlm("export", words[0], tmp_path / "other", *words[1:]), "mix: ")

    shutil.move(run_copy, tmp_path / "elsewhere")
    with pytest.raises(RunError, match=str(run_copy)):
        load_model(run)
    pretrain(pretrain_config(scenes, run_copy, max_steps=1, checkpoint_every_steps=1))
    (run_copy / "checkpoints/step_00000001").rename(run_copy / "checkpoints" / find_checkpoint(trained).name)
    with pytest.raises(RunError, match="found another"):
        load_model(run)
    with pytest.raises(RunError, match="found another"):
        pretrain(pretrain_config(scenes, copy, resume=True, **settings))


@pytest.mark.slow
def test_a_run_that_keeps_its_start_stays_near_it_and_resumes_to_the_bit(trained, run_copy, scenes, tmp_path):
    """The first step's distance is zero. Of ten steps, images and captions move less with it than without."""
    moved, losses = [], []
    settings: dict[str, Any] = {"max_steps": 10, "checkpoint_every_steps": 5, "initial_model": run_copy}
    for weight in (0.0, 30.0):
        out = tmp_path / f"kept-{weight}"
        pretrain(pretrain_config(scenes, out, keep_start=weight, **settings))
        losses.append(read_metrics(out / "metrics.jsonl")[0]["loss"])
        models = [load_model(path) for path in (trained, out)]
        start, own = (model.embed_texts(["red", "blue"]) for model in models)
        moved.append((start - own).norm())
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert moved[1] < 0.7 * moved[0]
    shutil.copytree(out, tmp_path / "copy")
    shutil.rmtree(tmp_path / "copy/checkpoints/step_00000010")
    pretrain(pretrain_config(scenes, tmp_path / "copy", keep_start=30.0, resume=True, **settings))
    assert load_model(tmp_path / "copy").sha256 == load_model(out).sha256
