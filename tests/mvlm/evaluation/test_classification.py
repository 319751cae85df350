"""Zero-shot classification, compared with numpy, alone, on ranks and during training."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from mvlm.config.json_files import config_json
from mvlm.errors import ConfigError, RunError
from mvlm.evaluation.class_images import open_classes
from mvlm.evaluation.classification import classify_images, hits_of
from mvlm.evaluation.workspace import Workspace
from mvlm.inference.trained_model import TrainedModel
from mvlm.runs.load import load_without_head
from mvlm_dataloading.files import write_json
from support.classes import as_tar, write_classes
from support.folders import rows_of
from support.models import pretrain_config

TEMPLATES = ["{} on white", "a {} square"]


def expected(model, place, templates: list[str]) -> list[float]:
    """Top-1 and top-5 in per cent, by explicit loops over embeddings of `TrainedModel`."""
    names = sorted(folder.name for folder in place.iterdir())
    classes = []
    for name in names:
        texts = np.stack([model.embed_texts([t.replace("{}", name)])[0].double().numpy() for t in templates]).mean(0)
        classes.append(texts / np.linalg.norm(texts))
    right = []
    for label, name in enumerate(names):
        for file in sorted((place / name).iterdir()):
            own = model.embed_images(Image.open(file))[0].double().numpy()
            order = np.argsort([-float(own @ one) for one in classes], kind="stable").tolist()
            right.append([order.index(label) < k for k in (1, 5)])
    return (100 * np.mean(right, axis=0)).tolist()


@pytest.mark.parametrize("kind", ["folder", "tar"])
def test_accuracy_is_that_of_explicit_loops(model, tmp_path, kind):
    folders = {colour: colour for colour in ("red", "green", "blue", "yellow")}
    place = write_classes(tmp_path / "data", folders, each=5)
    for i, extra in enumerate(("white", "black")):
        (place / extra).mkdir()
        for side in (20, 33):
            Image.new("L", (side, 32), 255 * (1 - i)).save(place / extra / f"{side}.png")
    templates = tmp_path / "templates.txt"
    templates.write_text("\n".join(TEMPLATES))
    classes = open_classes(as_tar(place, tmp_path / "data.tar") if kind == "tar" else place, templates)
    found = classify_images(model.network, classes, model.tokenizer, "fp32", Workspace())
    top1, top5 = expected(model, place, TEMPLATES)
    assert [found["top1"], found["top5"]] == pytest.approx([top1, top5], abs=0.006)
    assert (found["n_images"], found["n_classes"]) == (24, 6)
    assert found["top1_95"][0] <= found["top1"] <= found["top1_95"][1]


def test_a_tie_and_what_is_no_number_are_misses():
    similarity = torch.tensor([[3.0, 2, 1, 0, -1, -2], [3, 3, 1, 0, -1, -2], [torch.nan] * 6, [1, 2, 3, 4, 5, 0.5]])
    assert hits_of(similarity, torch.tensor([0, 0, 0, 5])).tolist() == [[1, 1], [0, 1], [0, 0], [0, 0]]


def test_an_image_that_cannot_be_decoded_is_named(model, tmp_path):
    place = write_classes(tmp_path / "data")
    (place / "red/red_1.PNG").write_bytes(b"nothing")
    with pytest.raises(RunError, match=r"data/red/red_1\.PNG"):
        classify_images(model.network, open_classes(place), model.tokenizer, "fp32", Workspace())


@pytest.mark.slow
def test_a_run_classifies_at_its_evaluations(scenes, tmp_path, ranks, on_ranks, run_mvlm):
    """Ranks train. Their row has the accuracy of the last checkpoint, and `mvlm eval classes` prints it."""
    place, templates = write_classes(tmp_path / "classes", each=9), tmp_path / "templates.txt"
    templates.write_text("\n".join(TEMPLATES))
    config = pretrain_config(
        scenes, tmp_path / "run", eval_every_steps=2, precision="fp32", classes=place, templates=templates
    )
    write_json(tmp_path / "config.json", config_json(config))
    codes, errors = on_ranks(ranks, "pretrain", "--config", tmp_path / "config.json", "--out", config.out)
    assert codes == [0] * ranks, errors
    row = rows_of(config.out)[-1]
    trained = load_without_head(config.out, "cpu")
    wanted = expected(TrainedModel(trained.network, trained.tokenizer, "fp32"), place, TEMPLATES)
    assert [row["classes_top1"], row["classes_top5"]] == pytest.approx(wanted, abs=0.006)
    assert row["classes_top1_low"] <= row["classes_top1"] <= row["classes_top1_high"]
    words = ("eval", "classes", "--checkpoint", config.out, "--classes", place, "--templates", templates)
    outcome = run_mvlm(*words, "--out", tmp_path / "figures.json", "--device", "cpu")
    assert outcome.code == 0, outcome
    found = json.loads((tmp_path / "figures.json").read_text())
    assert (found["n_images"], found["n_classes"], found["templates"]) == (36, 4, TEMPLATES)
    assert any(f"{found['top1']:.2f} %" in line for line in outcome.out)


@pytest.mark.parametrize(("changes", "what"), [({"classes": "x"}, "eval-every-steps"), ({"templates": "x"}, "classes")])
def test_settings_that_nothing_would_read_are_refused(scenes, changes, what):
    with pytest.raises(ConfigError, match=what):
        pretrain_config(scenes, scenes, eval_every_steps=0, **changes)
