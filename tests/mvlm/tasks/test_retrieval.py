"""Fine-tuning for retrieval: its losses have shared right answers, and its run is a model for other commands."""

import json
from dataclasses import replace

import pytest
import torch

from mvlm.distributed.parallel import parallelize
from mvlm.distributed.world import World
from mvlm.errors import ConfigError
from mvlm.inference.encode import eval_loader
from mvlm.model.maskvlm import MaskVLM
from mvlm.runs.folder import read_metrics
from mvlm.tasks.finetune import finetune
from mvlm.tasks.load import load_model, load_task
from mvlm.tasks.retrieval import Retrieval
from mvlm.tasks.task import TaskOptions
from mvlm_dataloading import open_dataset
from support.models import micro_config
from support.questions import finetune_config as configured
from support.scenes import scene, write_scenes


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
    """Four images occur twice, the second time with the caption of the next image: matches are no equivalence.

    The model was pretrained with dropped patches and masked captions, and is fine-tuned with neither.
    """
    texts = [scene(i if i < 32 else i - 31)[1] for i in range(36)]
    data = write_scenes(tmp_path / "data", {"train": 36}, captions=lambda i: [texts[i]])
    model, split = load_model(trained, "cpu", "fp32"), open_dataset(data, "train")
    model.network.config = replace(model.network.config, drop_masked=True, contrast_masked=True)
    task, world = Retrieval(model.network, TaskOptions(), {}), World(0, 1, 0, torch.device("cpu"))
    config = configured(trained, data, tmp_path / "run", "retrieval")
    batch = next(iter(eval_loader(split, model.network, model.tokenizer)))
    found = task.backward(parallelize(task, world), [batch], [], world, config, 0)
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


def test_a_model_of_another_contrastive_loss_is_refused():
    model = MaskVLM(micro_config(contrastive="sigmoid"))
    with pytest.raises(ConfigError, match="contrastive"):
        Retrieval(model, TaskOptions(), {})
