"""Runs that `mvlm verify` refuses: each forged plainly, and by a forger who makes all hashes fit again."""

import json
import shutil

import pytest
import torch

from mvlm.speedrun.claims import read_claims
from mvlm.speedrun.paper import check_data, check_history, check_metrics
from mvlm.speedrun.verify import verify_run
from mvlm.training.guarded_adamw import GuardedAdamW
from mvlm.training.run import pretrain
from mvlm_dataloading import open_dataset
from support.data import exchange_texts, state_fingerprint
from support.folders import forbid
from support.forgery import change_events, change_rows, change_tensors, checkpoint, reseal, short_run
from support.scenes import write_scenes

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("without_tensorboard")]


def change_one_weight(name: str, tensor: torch.Tensor) -> torch.Tensor:
    if name == "pixel_head.weight":
        tensor = tensor.clone()
        tensor[0, 0] += 1e-3
    return tensor


def test_a_changed_weight(bare_run, refusals):
    change_tensors(checkpoint(bare_run, 6) / "model", change_one_weight)
    assert "damaged, its sha256 is not the manifest's" in refusals(bare_run)["checkpoints"]
    reseal(bare_run)
    text = "steps 5 to 6: step_00000006: model/pixel_head.weight is not the replayed one"
    assert refusals(bare_run) == {"replay": text}


def test_a_checkpoint_that_may_not_be_read(bare_run, refusals, monkeypatch):
    forbid(monkeypatch, "rank_00000.safetensors")
    assert "Permission denied" in refusals(bare_run)["checkpoints"]


def test_a_swapped_checkpoint(bare_run, other_run, refusals):
    shutil.rmtree(checkpoint(bare_run, 4))
    shutil.copytree(checkpoint(other_run, 4), checkpoint(bare_run, 4))
    assert refusals(bare_run) == {"checkpoints": "step_00000004: its manifest is not the one that the history has"}
    reseal(bare_run)
    found = verify_run(bare_run, steps=0, seed=0)
    texts = [check.text for check in found.checks if check.name == "replay" and check.passed is False]
    assert len(texts) == 1
    assert texts[0].startswith("steps 5 to 6: step 5: grad_norm is ")


def test_an_edited_loss(bare_run, refusals):
    def edit(row):
        row["mlm"] -= 0.01 * (row["step"] == 3)

    change_rows(bare_run, edit)
    check = check_metrics(read_claims(bare_run, None))
    assert check.text == "rows up to step 4 are not those that were saved with its checkpoint"
    reseal(bare_run)
    assert check_metrics(read_claims(bare_run, None)).passed
    found = refusals(bare_run)
    assert list(found) == ["replay"]
    assert found["replay"].startswith("steps 3 to 4: step 3: mlm is ")


def test_an_edited_figure_of_an_evaluation(run, refusals):
    change_rows(run, lambda row: row.update(tr_r1=row["tr_r1"] + 12.5) if "tr_r1" in row else None)
    file = run / "eval/test.json"
    figures = json.loads(file.read_text())
    figures["gain_text_nats"] += 1e-4
    file.write_text(json.dumps(figures))
    reseal(run)
    found = refusals(run)
    assert set(found) == {"replay", "evaluation"}
    assert found["replay"].startswith("steps 3 to 4: step 4: tr_r1 is ")
    assert found["evaluation"].startswith("gain_text_nats is ")


@pytest.mark.parametrize(
    "change, text",
    [
        (lambda figures: figures["tr_95"]["r1"].__setitem__(0, 99.0), "tr_95.r1[0] is 99.0, found"),
        (lambda figures: figures.update(split="validation"), "of the split validation and not of test"),
        (lambda figures: figures.update(model="0" * 64), "of other weights than the last checkpoint's"),
    ],
)
def test_figures_that_are_not_those_of_the_run_on_the_test_split(run, refusals, change, text):
    file = run / "eval/test.json"
    figures = json.loads(file.read_text())
    change(figures)
    file.write_text(json.dumps(figures))
    found = refusals(run)
    assert set(found) == {"evaluation"}
    assert text in found["evaluation"]


@pytest.mark.parametrize(
    "edit, text",
    [
        (lambda row: row.update(seconds=row["seconds"] * 0.5), "s since the last row, its rate gives"),
        (lambda row: row.update(lr=row["lr"] * 1.01), "step 1: lr 0.00101, the settings give 0.001"),
        (lambda row: row["step"] != 4, "no row of step 4"),
    ],
)
def test_edited_times_rates_and_steps_of_rows(bare_run, edit, text):
    change_rows(bare_run, edit)
    reseal(bare_run)
    check = check_metrics(read_claims(bare_run, None))
    assert not check.passed
    assert text in check.text


def test_a_run_with_muon_is_replayed_and_its_rate_is_checked(scenes, tmp_path, refusals):
    config = short_run(scenes, tmp_path / "run", optimizer="muon")
    pretrain(config)
    assert refusals(config.out) == {}
    change_rows(config.out, lambda row: row.update(lr_muon=row["lr_muon"] * 1.01))
    reseal(config.out)
    assert "lr_muon 0.0" in refusals(config.out)["metrics"]


def test_other_data(bare_run, tmp_path, refusals):
    """The same images with other captions, and the same description over a shard with one other byte."""
    other = write_scenes(tmp_path / "other", captions=lambda i: [f"number {i}"])
    found = refusals(bare_run, other)
    assert list(found) == ["data"]
    assert "train: the run had the fingerprint" in found["data"]

    data = write_scenes(tmp_path / "data")
    assert check_data(read_claims(bare_run, data)).passed
    tar = data / "test-000000.tar"
    content = bytearray(tar.read_bytes())
    content[content.index(b" on ") + 1] ^= 1  # in a caption
    tar.write_bytes(content)
    (data / "test.index").touch()
    assert refusals(bare_run, data) == {"data": "test-000000.tar: its sha256 is not that of dataset.json"}


def test_other_data_under_the_fingerprints_of_the_run(bare_run, scenes, tmp_path, refusals):
    """An index states a fingerprint. The forger writes the run's there, or keeps it and exchanges two captions."""
    data = write_scenes(tmp_path / "data", captions=lambda i: [f"number {i}"])
    for split in ("train", "validation", "test"):
        state_fingerprint(data / f"{split}.index", open_dataset(scenes, split).fingerprint)
    assert open_dataset(data, "train").fingerprint == open_dataset(scenes, "train").fingerprint
    stated = [f"{split}.index: its fingerprint is not that of its samples" for split in ("test", "train", "validation")]
    assert refusals(bare_run, data) == {"data": "; ".join(stated)}

    data = write_scenes(tmp_path / "exchanged")
    exchange_texts(data / "train.index")
    wanted = open_dataset(scenes, "train")
    assert open_dataset(data, "train").fingerprint == wanted.fingerprint
    assert open_dataset(data, "train").captions(1) == wanted.captions(2)
    assert refusals(bare_run, data) == {"data": "train.index: its samples are not those of train-000000.tar"}


def test_a_run_that_skipped_a_step(scenes, tmp_path, monkeypatch, refusals):
    """The row of step 3 is there, its update was not made. The forger then raises AdamW's own count."""
    config = short_run(scenes, tmp_path / "run")
    step, calls = GuardedAdamW.step, []

    def skip_third(optimizer, *rest):
        calls.append(1)
        return None if len(calls) == 3 else step(optimizer, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(GuardedAdamW, "step", skip_third)
        pretrain(config)
    found = refusals(config.out)["checkpoints"]
    assert found.startswith("step_00000004: AdamW made 3 updates in 4 steps, of which 0 were skipped as bad")
    for number in (4, 6):
        change_tensors(checkpoint(config.out, number) / "optimizer", lambda n, x: x + 1 if n.endswith("/step") else x)
    reseal(config.out)
    found = refusals(config.out)
    assert list(found) == ["replay"]
    assert found["replay"].startswith("steps 3 to 4: step 3: temperature is ")  # of after the update


def test_a_history_that_does_not_join_up(bare_run):
    text = (bare_run / "history.jsonl").read_text()
    first = json.loads(text.splitlines()[0])
    (bare_run / "history.jsonl").write_text(text + json.dumps(first | {"step": 5}) + "\n")
    check = check_history(read_claims(bare_run, None), "")
    assert not check.passed
    assert check.text == "a part continues after step 5, which was not saved"


def test_a_weight_far_off_on_another_kind_of_machine(bare_run, refusals):
    """Nothing has to be equal to the bit there, but a layer that is half as large is beyond the bounds."""
    change_events(bare_run, lambda event: event.get("machine", {}).update(processor="another"))
    change_tensors(checkpoint(bare_run, 6) / "model", lambda n, x: x / 2 if n.startswith("language_head") else x)
    reseal(bare_run)
    assert "of the way since the checkpoint off" in refusals(bare_run)["replay"]
    change_rows(bare_run, lambda row: row.update(mim=row["mim"] * 1.2))
    reseal(bare_run)
    assert "mim is" in refusals(bare_run)["replay"]
