"""Runs that `mvlm verify` refuses: each forged plainly, and by a forger who makes all hashes fit again."""

import json
import shutil

import pytest
import torch

from mvlm.errors import RunError
from mvlm.model.network import MaskVLMNetwork
from mvlm.training.optimizer import GuardedAdamW
from mvlm.training.run import pretrain
from mvlm_dataloading import open_dataset
from support.data import exchange_texts, state_fingerprint
from support.forgery import change_rows, change_tensors, checkpoint, reseal, short_run
from support.scenes import write_scenes

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("without_tensorboard")]


def flip_one_bit(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """The tensor; of one, the last bit of one value is another."""
    if name == "pixel_head.weight":
        tensor = tensor.clone()
        tensor.view(torch.int32)[0, 0] ^= 1
    return tensor


def test_a_bit_of_a_final_weight(bare_run, problems):
    change_tensors(checkpoint(bare_run, 6) / "model", flip_one_bit)
    [found] = problems(bare_run)
    assert "damaged, its sha256 is not the manifest's" in found
    reseal(bare_run, history=False)
    assert "step_00000006: its manifest is not the one that the history has" in problems(bare_run)
    reseal(bare_run)
    assert problems(bare_run) == ["steps 5 to 6: step_00000006: model/pixel_head.weight is not the replayed one"]


def test_a_swapped_checkpoint(bare_run, other_run, problems):
    shutil.rmtree(checkpoint(bare_run, 4))
    shutil.copytree(checkpoint(other_run, 4), checkpoint(bare_run, 4))
    assert problems(bare_run) == ["step_00000004: its manifest is not the one that the history has"]
    reseal(bare_run)
    found = problems(bare_run)
    assert found[0].startswith("steps 5 to 6: step 5: grad_norm is ")
    assert any(problem.startswith("steps 5 to 6: step_00000006: model/") for problem in found)


def test_an_edited_row(bare_run, problems):
    """A row of step 3 is edited, far from the end: it is replayed if all steps are."""

    def edit(row):
        row["mlm"] -= 0.01 * (row["step"] == 3)

    change_rows(bare_run, edit)
    text = "rows up to step 4 are not those that were saved with its checkpoint"
    assert text in problems(bare_run)
    reseal(bare_run)
    [found] = problems(bare_run, steps=6)
    assert found.startswith("steps 3 to 4: step 3: mlm is ")
    assert problems(bare_run) == []


def test_a_changed_setting(bare_run, problems):
    file = bare_run / "config.json"
    settings = json.loads(file.read_text())
    file.write_text(json.dumps(settings | {"mim_weight": 0.5}))
    found = problems(bare_run)
    assert any(problem.startswith("steps 5 to 6: step_00000006: model/") for problem in found)


@pytest.mark.parametrize(
    "change, text",
    [
        (lambda figures: figures.update(gain_text_nats=figures["gain_text_nats"] + 1e-4), "gain_text_nats is "),
        (lambda figures: figures["tr_95"]["r1"].__setitem__(0, 99.0), "tr_95.r1 is [99.0, "),
        (lambda figures: figures.update(split="validation"), "of the split validation and not of test"),
        (lambda figures: figures.update(model="0" * 64), "of other weights than the last checkpoint's"),
    ],
)
def test_an_edited_figure_of_an_evaluation(run, problems, change, text):
    """A figure on the test split is edited, or one during training."""
    file = run / "eval/test.json"
    figures = json.loads(file.read_text())
    change(figures)
    file.write_text(json.dumps(figures))
    if text.startswith("gain"):
        change_rows(run, lambda row: row.update(tr_r1=row["tr_r1"] + 12.5) if "tr_r1" in row else None)
        reseal(run)
        row, found = problems(run, steps=6)
        assert row.startswith("steps 3 to 4: step 4: tr_r1 is ")
    else:
        [found] = problems(run)
    assert text in found


def test_rows_and_parts_that_do_not_join_up(bare_run, problems):
    change_rows(bare_run, lambda row: row["step"] != 4)
    reseal(bare_run)
    assert problems(bare_run) == ["no row of step 4"]
    text = (bare_run / "history.jsonl").read_text()
    first = json.loads(text.splitlines()[0])
    (bare_run / "history.jsonl").write_text(text + json.dumps(first | {"step": 5}) + "\n")
    assert "a part continues after step 5, which was not saved" in problems(bare_run)


def test_other_data(bare_run, tmp_path, problems):
    """Data with other captions to the same images, or a shard with one other byte, are refused."""
    other = write_scenes(tmp_path / "other", captions=lambda i: [f"number {i}"])
    assert any(problem.startswith("train: the run had the fingerprint") for problem in problems(bare_run, other))

    data = write_scenes(tmp_path / "data")
    assert problems(bare_run, data) == []
    tar = data / "test-000000.tar"
    content = bytearray(tar.read_bytes())
    content[content.index(b" on ") + 1] ^= 1  # in a caption
    tar.write_bytes(content)
    (data / "test.index").touch()
    assert problems(bare_run, data) == ["test-000000.tar: its sha256 is not that of dataset.json"]


def test_other_data_under_the_fingerprints_of_the_run(bare_run, scenes, tmp_path, problems):
    """An index states a fingerprint. The forger writes the run's there, or keeps it and exchanges two captions."""
    data = write_scenes(tmp_path / "data", captions=lambda i: [f"number {i}"])
    for split in ("train", "validation", "test"):
        state_fingerprint(data / f"{split}.index", open_dataset(scenes, split).fingerprint)
    assert open_dataset(data, "train").fingerprint == open_dataset(scenes, "train").fingerprint
    stated = [f"{split}.index: its fingerprint is not that of its samples" for split in ("test", "train", "validation")]
    assert problems(bare_run, data) == stated

    data = write_scenes(tmp_path / "exchanged")
    exchange_texts(data / "train.index")
    wanted = open_dataset(scenes, "train")
    assert open_dataset(data, "train").fingerprint == wanted.fingerprint
    assert open_dataset(data, "train").captions(1) == wanted.captions(2)
    assert problems(bare_run, data) == ["train.index: its samples are not those of train-000000.tar"]


def test_a_run_that_skipped_a_step(scenes, tmp_path, monkeypatch, problems):
    """The row of step 3 is there, its update was not made."""
    config = short_run(scenes, tmp_path / "run")
    step, calls = GuardedAdamW.step, []

    def skip_third(optimizer, *rest):
        calls.append(1)
        return None if len(calls) == 3 else step(optimizer, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(GuardedAdamW, "step", skip_third)
        pretrain(config)
    found = problems(config.out, steps=6)
    assert found[0].startswith("steps 3 to 4: step 3: temperature is ")  # of after the update


def test_settings_of_a_larger_model_are_refused_before_it_is_made(bare_run, problems, monkeypatch):
    file = bare_run / "config.json"
    values = json.loads(file.read_text())
    file.write_text(json.dumps(values | {"model": values["model"] | {"image_layers": 10**6}}))
    monkeypatch.setattr(MaskVLMNetwork, "__init__", lambda *_: pytest.fail("made a network"))
    with pytest.raises(RunError, match=rf"{file}: .*image_layers 1, got 1000000"):
        problems(bare_run)
