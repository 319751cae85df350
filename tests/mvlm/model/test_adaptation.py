"""Parts of a model that are frozen: nothing of them learns, and the rest as before."""

from pathlib import Path
from typing import Any

import pytest
import torch

from mvlm.model.adaptation import PARTS, adapt
from mvlm.training.optimizer import make_optimizer
from support.models import micro_batch, micro_model, pretrain_config


@pytest.mark.parametrize("part", PARTS)
def test_a_frozen_part_has_no_gradients_and_no_state_of_the_optimizer(part):
    gradients = []
    for how in ("full", "frozen"):
        model = micro_model(dtype=torch.float32)
        parts: dict[str, Any] = {f"train_{part}": how}
        config = pretrain_config(Path(), Path(), **parts)
        adapt(model, config)
        model(*micro_batch(), plan="fast").total.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
        optimizer = make_optimizer(model, config, torch.device("cpu"))
        optimizer.step()
        moments = {id(p) for p in optimizer.state}
    for name, parameter in model.named_parameters():
        frozen = name.split(".")[0] in PARTS[part]
        assert (gradients[1][name] is None) == frozen == (id(parameter) not in moments), name
        assert frozen or torch.allclose(gradients[0][name], gradients[1][name], rtol=1e-4, atol=1e-6), name
