"""Several questions about an image in a batch: the image is encoded once, and losses and gradients are the same."""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from mvlm.errors import ConfigError
from mvlm.inference.encode import eval_loader
from mvlm.runs.folder import read_metrics
from mvlm.runs.load import load_model
from mvlm.tasks.evaluate import predict_split
from mvlm.tasks.finetune import finetune
from mvlm.tasks.registry import find_task
from mvlm.tasks.task import Task, TaskOptions
from mvlm_dataloading import Batch, Masks, open_dataset
from support.questions import WRITERS, finetune_config

FORMS = {
    "classifier": ("vqa", TaskOptions()),
    "masked": ("vqa", TaskOptions(answers="masked")),
    "blind masked": ("vqa", TaskOptions(answers="masked", blind="text")),
    "entailment": ("entailment", TaskOptions()),
    "pairs": ("pairs", TaskOptions()),
}


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> dict[str, Path]:
    """A data set of each task, in which two or more training samples have one image. Read only."""
    return {name: WRITERS[name](tmp_path_factory.mktemp(name) / "data") for name in ("vqa", "entailment", "pairs")}


def loaded(task: Task, data: Path, share: bool) -> tuple[Batch, Masks, list[torch.Tensor]]:
    """The first batch of the training split, and its targets in float64."""
    dataset = open_dataset(data, "train")
    batch, masks = next(
        iter(eval_loader(dataset, task.model, task.tokenizer, per_image=1 if share else None, **task.loader_options()))
    )
    targets = [x[batch.sample_id] for x in task.targets(dataset)]
    return batch, masks, [x.double() if x.is_floating_point() else x for x in targets]


@pytest.mark.slow
@pytest.mark.parametrize("plan", ["plain", "fast"])
@pytest.mark.parametrize("form", FORMS)
def test_losses_and_gradients_are_those_of_samples_with_images_of_their_own(trained, data, form, plan):
    name, options = FORMS[form]
    pretrained = load_model(trained)
    model, tokenizer = pretrained.network, pretrained.tokenizer
    kind = find_task(name)
    task = kind(model.train(), options, kind.make_state(open_dataset(data[name], "train"), options)).double()
    task.set_tokenizer(tokenizer)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in task.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    found = {}
    for share in (False, True):
        batch, masks, targets = loaded(task, data[name], share)
        if share:
            assert len(batch.images) <= len(batch.sample_id) / 2
            assert len(batch.cu_seqlens) - 1 < len(batch.sample_id)
        task.zero_grad()
        losses = task.losses_of_step(batch, masks, targets, plan)
        losses.total.backward()
        gradients = {n: p.grad for n, p in task.named_parameters() if p.requires_grad}
        with torch.no_grad():
            found[share] = [x.item() for x in losses[:2]], gradients, task.predict(batch, plan)
    assert found[True][0] == pytest.approx(found[False][0], rel=1e-9)
    for n, gradient in found[False][1].items():
        torch.testing.assert_close(found[True][1][n], gradient, rtol=1e-6, atol=1e-10, msg=n)
    assert found[True][2] == found[False][2]
    records = predict_split(task.float(), open_dataset(data[name], "train"), tokenizer, plan=plan)
    assert records is not None
    assert len(records) == 32


@pytest.mark.slow
@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("blind", ["image", "text"])
@pytest.mark.parametrize("form", ["classifier", "masked", "entailment", "pairs"])
def test_what_a_blind_model_gets_is_encoded_once(trained, data, form, blind, share, monkeypatch):
    """Losses, gradients and predictions are those of a grey image, or of a masked text, for each sample."""
    name, options = FORMS[form]
    pretrained = load_model(trained)
    model, tokenizer = pretrained.network, pretrained.tokenizer
    kind = find_task(name)
    options = replace(options, blind=blind)
    task = kind(model.train(), options, kind.make_state(open_dataset(data[name], "train"), options)).double()
    task.set_tokenizer(tokenizer)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in task.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    batch, masks, targets = loaded(task, data[name], share)
    hidden = task.hide(batch)
    if blind == "image":
        assert len(hidden.images) == 1
    else:
        assert len(hidden.cu_seqlens) - 1 < batch.max_length

    def plainly(batch: Batch) -> Batch:
        if blind == "image":
            return replace(batch, images=torch.full_like(batch.images, 128))
        words = [i for a, b in pairwise(batch.cu_seqlens.tolist()) for i in range(a + 1, b - 1)]
        return replace(batch, tokens=batch.tokens.index_fill(0, torch.tensor(words), model.config.mask_token_id))

    found = []
    for hide in (task.hide, plainly):
        monkeypatch.setattr(task, "hide", hide)
        for plan in ("plain", "fast"):
            task.zero_grad()
            losses = task.losses_of_step(batch, masks, targets, plan)
            losses.total.backward()
            gradients = {n: p.grad for n, p in task.named_parameters() if p.requires_grad}
            with torch.no_grad():
                found.append(([x.item() for x in losses[:2]], gradients, task.predict(batch, plan)))
    for one in found[:-1]:
        assert one[0] == pytest.approx(found[-1][0], rel=1e-9)
        assert one[2] == found[-1][2]
        for n, gradient in found[-1][1].items():
            torch.testing.assert_close(one[1][n], gradient, rtol=1e-6, atol=1e-10, msg=n)


@pytest.mark.slow
def test_resumed_run_equals_an_undisturbed_one(trained, data, tmp_path, without_tensorboard):
    settings = {"questions_per_image": 2, "crop_scale": (0.6, 1.0), "flip": 0.5, "checkpoint_every_steps": 2}
    finetune(finetune_config(trained, data["vqa"], tmp_path / "whole", max_steps=4, **settings))
    finetune(finetune_config(trained, data["vqa"], tmp_path / "cut", max_steps=4, keep_checkpoints=2, **settings))
    newest = max((tmp_path / "cut" / "checkpoints").iterdir())
    for path in sorted(newest.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    newest.rmdir()
    finetune(finetune_config(trained, data["vqa"], tmp_path / "cut", max_steps=4, resume=True, **settings))
    whole, cut = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("whole", "cut"))
    assert len(whole) == 4
    for a, b in zip(whole, cut, strict=True):
        for name in ("loss", "accuracy", "grad_norm"):
            assert a[name] == b[name]


@pytest.mark.slow
def test_two_ranks_equal_one(trained, data, tmp_path, on_two_ranks):
    settings = {"max_steps": 3, "eval_every_steps": 3, "questions_per_image": 2, "answers": "masked"}
    settings |= {"crop_scale": (0.6, 1.0), "question_length": 24}
    finetune(finetune_config(trained, data["vqa"], tmp_path / "one", **settings))
    words = [
        *("--checkpoint", trained, "--data", data["vqa"], "--out", tmp_path / "two", "--max-steps", "3"),
        *("--batch-size", "8", "--lr-encoder", "3e-3", "--lr-cross", "3e-3", "--lr-head", "3e-3", "--lr-end", "0"),
        *("--warmup-steps", "2", "--crop-scale", "0.6", "1", "--device", "cpu", "--precision", "fp32"),
        *("--weight-decay", "0", "--eval-every-steps", "3", "--questions-per-image", "2"),
        *("--answers", "masked", "--question-length", "24"),
    ]
    codes, errors = on_two_ranks("finetune", "vqa", *words)
    assert codes == [0, 0], errors
    one, two = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("one", "two"))
    for a, b in zip(one, two, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)
    assert one[-1]["val_accuracy"] == pytest.approx(two[-1]["val_accuracy"])


def test_a_task_that_reads_each_sample_alone_refuses_it(trained, tmp_path):
    captions = WRITERS["caption"](tmp_path / "captions")
    for task in ("caption", "retrieval"):
        with pytest.raises(ConfigError, match=f"questions_per_image: wanted 1, got 2; the task {task} reads"):
            finetune(finetune_config(trained, captions, tmp_path / "run", task, questions_per_image=2))
    assert not (tmp_path / "run").exists()
