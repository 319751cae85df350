"""Fine-tuning for retrieval: its losses are of the whole batch, so ranks and microbatches share it."""

import json
import shutil

import pytest
import torch

from mvlm.distributed.parallel import parallelize
from mvlm.distributed.world import World
from mvlm.errors import ConfigError
from mvlm.inference.encode import eval_loader
from mvlm.model.maskvlm import MaskVLM
from mvlm.runs.folder import read_metrics
from mvlm.runs.load import load_model
from mvlm.tasks.finetune import finetune
from mvlm.tasks.registry import load_task
from mvlm.tasks.retrieval import Retrieval
from mvlm.tasks.task import TaskOptions
from mvlm_dataloading import open_dataset
from support.models import micro_config
from support.questions import finetune_config as configured
from support.scenes import scene, write_scenes


@pytest.mark.slow
def test_resumed_run_equals_an_undisturbed_one(trained, scenes, tmp_path):
    settings = {"eval_every_steps": 2, "ema_decay": 0.9, "max_steps": 4}
    finetune(configured(trained, scenes, tmp_path / "whole", "retrieval", **settings))
    settings |= {"checkpoint_every_steps": 2}
    finetune(configured(trained, scenes, tmp_path / "cut", "retrieval", **settings))
    shutil.rmtree(tmp_path / "cut" / "checkpoints" / "step_00000004")
    finetune(configured(trained, scenes, tmp_path / "cut", "retrieval", resume=True, **settings))
    whole, cut = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("whole", "cut"))
    assert "val_mean_r1" in whole[-1]
    for a, b in zip(whole, cut, strict=True):
        for name in ("loss", "accuracy", "itc_accuracy", "grad_norm", "val_mean_r1"):
            assert a.get(name) == b.get(name)


@pytest.mark.slow
def test_accumulated_microbatches_give_the_same_gradients(trained, scenes, tmp_path):
    for name, accumulate in (("one", 1), ("four", 4)):
        finetune(configured(trained, scenes, tmp_path / name, "retrieval", accumulate=accumulate, plan="plain"))
    one, four = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("one", "four"))
    for a, b in zip(one, four, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)


@pytest.mark.slow
def test_both_implementations_give_the_same_losses(trained, scenes, tmp_path):
    for plan in ("plain", "fast"):
        finetune(configured(trained, scenes, tmp_path / plan, "retrieval", plan=plan, max_steps=3))
    plain, fast = (read_metrics(tmp_path / plan / "metrics.jsonl") for plan in ("plain", "fast"))
    for a, b in zip(plain, fast, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)


@pytest.mark.slow
def test_two_ranks_equal_one(trained, scenes, tmp_path, on_two_ranks):
    finetune(configured(trained, scenes, tmp_path / "one", "retrieval", max_steps=3, eval_every_steps=3))
    settings = [
        *("--checkpoint", trained, "--data", scenes, "--out", tmp_path / "two", "--max-steps", "3"),
        *("--batch-size", "8", "--lr-encoder", "3e-3", "--lr-cross", "3e-3", "--lr-head", "3e-3", "--lr-end", "0"),
        *("--warmup-steps", "2", "--crop-scale", "1", "1", "--device", "cpu", "--precision", "fp32"),
        *("--weight-decay", "0", "--eval-every-steps", "3"),
    ]
    codes, errors = on_two_ranks("finetune", "retrieval", *settings)
    assert codes == [0, 0], errors
    one, two = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("one", "two"))
    for a, b in zip(one, two, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)
        assert a.get("val_mean_r1") == b.get("val_mean_r1")
    assert "val_mean_r1" in two[-1]


@pytest.mark.slow
def test_a_retrieval_run_is_a_model_for_every_other_command(trained, scenes, tmp_path, run_mvlm):
    """Evaluation takes it as a pretraining run; another task starts from it; its losses are ITC's and ITM's."""
    finetune(configured(trained, scenes, tmp_path / "run", "retrieval", max_steps=1, ema_decay=0.5))
    (row,) = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert row["loss"] == pytest.approx(row["itc"] + row["itm"], rel=1e-6)
    assert "temperature" in row
    task, _ = load_task(tmp_path / "run")
    found = load_model(tmp_path / "run").network.state_dict()
    before = load_model(trained).network.state_dict()
    assert all(torch.equal(tensor, found[name]) for name, tensor in task.model.state_dict().items())
    moved = {name.split(".")[0] for name, x in found.items() if not torch.equal(x, before[name])}
    assert moved >= {"image_encoder", "text_encoder", "text_cross", "matching_head", "text_projection"}
    assert not moved & {"image_decoder", "pixel_head", "language_head"}
    out = tmp_path / "figures.json"
    words = ("eval", "retrieval", "--checkpoint", tmp_path / "run", "--data", scenes, "--out", out, "--device", "cpu")
    assert run_mvlm(*words).code == 0
    assert {"tr", "ir", "itc", "itm"} <= set(json.loads(out.read_text()))


def test_the_loss_is_that_of_shared_right_answers(trained, tmp_path):
    """Four images occur twice, the second time with the caption of the next image.

    If matches were an equivalence, equal features would give the loss with one right answer a row. They are not: image
    0 matches captions 0 and 1, and caption 1 images 0 and 1, but image 1 not caption 0.
    """
    texts = [scene(i if i < 32 else i - 31)[1] for i in range(36)]
    data = write_scenes(tmp_path / "data", {"train": 36}, captions=lambda i: [texts[i]])
    model, split = load_model(trained, "cpu", "fp32"), open_dataset(data, "train")
    task, world = Retrieval(model.network, TaskOptions(), {}), World(0, 1, 0, torch.device("cpu"))
    config = configured(trained, data, tmp_path / "run", "retrieval")
    batch = next(iter(eval_loader(split, model.network, model.tokenizer)))
    found = task.backward(parallelize(task, world), [batch], world, config, 0)
    logits = (model.embed_images(split) @ model.embed_texts(split).T).double() * model.network.log_scale.exp().item()
    shared, alone = 0.0, 0.0
    for table in (logits, logits.T):
        for i in range(36):
            nats = -table[i].log_softmax(0)
            right = [j for j in range(36) if i % 32 == j % 32 or texts[i] == texts[j]]
            shared += nats[right].mean().item() / 72
            alone += nats[i].item() / 72
    assert found.itc.item() == pytest.approx(shared, rel=1e-6)
    assert abs(shared - alone) > 5e-5 * shared


@pytest.mark.parametrize("setting", [{"contrastive": "sigmoid"}, {"text_pooling": True}], ids=str)
def test_a_model_of_another_contrastive_loss_is_refused(setting):
    model = MaskVLM(micro_config(**setting))
    with pytest.raises(ConfigError, match=r"checkpoint: wanted a model with the paper's ITC, .*; fine-tune another"):
        Retrieval(model, TaskOptions(), {})
