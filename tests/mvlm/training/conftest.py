"""Fixtures of the tests of training: a trainer of a micro model."""

import pytest
import torch

from mvlm.distributed.parallel import parallelize
from mvlm.training.optimizer import make_optimizer
from mvlm.training.run import make_loader
from mvlm.training.trainer import RunInputs, Trainer
from mvlm_dataloading import open_dataset
from support.models import ALONE, micro_model, pretrain_config


@pytest.fixture
def start(scenes, tokenizer, tmp_path):
    """Function that makes a trainer and its batches."""

    def make(dtype=torch.float32, sizes=None, **changes):
        config = pretrain_config(scenes, tmp_path / "run", precision="fp32", max_steps=20, **changes)
        model = micro_model(dtype=dtype, **(sizes or {}))
        inputs = RunInputs(config, open_dataset(scenes, "train"), None, tokenizer)
        loader = make_loader(inputs.dataset, tokenizer, config, ALONE)
        optimizer = make_optimizer(model, config, ALONE.device)
        return Trainer(inputs, ALONE, parallelize(model, ALONE), optimizer, loader), iter(loader)

    return make
