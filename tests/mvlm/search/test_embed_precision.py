"""An embedding has vectors of one device and precision, whatever "auto" stands for where the work goes on."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import mvlm.device
import mvlm.search.embed as embedding
from mvlm.distributed.world import World
from mvlm.errors import RunError
from mvlm.inference.trained_model import TrainedModel
from mvlm.search.collection import open_collection
from mvlm.search.embed import embed
from mvlm.search.embedding_files import read_description
from support.folders import folder_hash

real_write = embedding.write_table


@pytest.fixture
def machine(monkeypatch) -> Any:
    """A machine on which "auto" is bf16 if its `fast` is set, and fp32 if not."""
    found = SimpleNamespace(fast=True)
    monkeypatch.setattr(mvlm.device, "has_fast_bf16", lambda device: found.fast)
    monkeypatch.setattr(embedding, "PART", 4)
    return found


@pytest.fixture
def begun(model, machine, pictures, alone, tmp_path, monkeypatch) -> Path:
    """An embedding that a machine with fast bf16 began."""

    def stop_at_the_second(path, table):
        if "0000001" in path.name:
            raise KeyboardInterrupt
        real_write(path, table)

    with monkeypatch.context() as patch:
        patch.setattr(embedding, "write_table", stop_at_the_second)
        with pytest.raises(KeyboardInterrupt):
            embed(automatic(model), open_collection(pictures), tmp_path / "out", alone)
    return tmp_path / "out"


def automatic(model: TrainedModel, precision: str = "auto") -> TrainedModel:
    return TrainedModel(model.network, model.tokenizer, precision)


def test_work_goes_on_in_the_precision_in_which_it_began(model, machine, begun, pictures, alone, tmp_path):
    collection = open_collection(pictures)
    before = folder_hash(begun)
    machine.fast = False
    with pytest.raises(
        RunError,
        match=r"found another one \(precision: found bf16, wanted fp32\); give --device cpu --precision bf16, choose",
    ):
        embed(automatic(model), collection, begun, alone)
    assert folder_hash(begun) == before
    found = embed(automatic(model, "bf16"), collection, begun, alone)
    assert (found["device"], found["precision"], found["images"]) == ("cpu", "bf16", 10)
    machine.fast = True
    embed(automatic(model), collection, tmp_path / "undisturbed", alone)
    whole, other = (
        {name: digest for name, (digest, _) in folder_hash(x).items()} for x in (begun, tmp_path / "undisturbed")
    )
    assert whole == other


def test_work_that_was_begun_on_another_device_is_refused(model, begun, pictures, alone):
    plan = begun / "parts" / "plan.json"
    plan.write_text(json.dumps(json.loads(plan.read_text()) | {"device": "cuda"}))
    with pytest.raises(RunError, match=r"\(device: found cuda, wanted cpu\); give --device cuda --precision bf16, "):
        embed(automatic(model), open_collection(pictures), begun, alone)


def test_work_that_an_earlier_version_left_is_refused(model, begun, pictures, alone):
    """Its plan does not say in which precision its parts are."""
    plan = begun / "parts" / "plan.json"
    old = json.loads(plan.read_text()) | {"precision": "auto"}
    del old["device"]
    plan.write_text(json.dumps(old))
    with pytest.raises(
        RunError, match=r"precision: found auto, wanted bf16\); choose another folder or remove this one"
    ):
        embed(automatic(model), open_collection(pictures), begun, alone)


def test_a_finished_embedding_is_left_as_it_is_on_any_machine(model, machine, pictures, alone, tmp_path):
    collection, out = open_collection(pictures), tmp_path / "out"
    made = embed(automatic(model), collection, out, alone)
    machine.fast = False
    assert embed(automatic(model), collection, out, alone) == made
    with pytest.raises(RunError, match=r"\(precision: found bf16, wanted fp32\)"):
        embed(automatic(model, "fp32"), collection, out, alone)
    old = {name: value for name, value in made.items() if name != "device"} | {"precision": "auto"}
    (out / "embedding.json").write_text(json.dumps(old))  # as an earlier version wrote it
    assert embed(automatic(model), collection, out, alone) == old
    assert read_description(out) == old


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("name", ["precision", "model", "data"])
def test_ranks_that_differ_are_refused(model, machine, pictures, tmp_path, rank, name):
    class Two(World):
        """A rank beside one that computes in fp32, or has another model or other data."""

        def gather_objects(self, value: Any, group: Any = None) -> list[Any]:
            if isinstance(value, dict):
                return [value if i == rank else value | {name: "other"} for i in range(2)]
            return [value, value]

    world = Two(rank=rank, size=2, local_rank=rank, device=torch.device("cpu"))
    error, message = (
        (
            RunError,
            rf"rank 1 was started with other settings or data than rank 0 \({name}: rank 0 has \w+, rank 1 has other\)",
        )
        if rank == 0
        else (SystemExit, "2")
    )  # rank 0 says it for all
    with pytest.raises(error, match=message):
        embed(automatic(model), open_collection(pictures), tmp_path / "out", world)
    assert not (tmp_path / "out").exists()
