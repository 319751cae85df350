"""Runs whose steps fail by themselves: their weights are changed so that fp32 overflows, forward or backward alone."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mvlm.training.run import pretrain
from mvlm.training.trainer import Trainer
from support.faults.campaign import MODEL
from support.models import pretrain_config

FORWARD_MODULE, BACKWARD_MODULE = "text_encoder.blocks.0.mlp.up", "image_decoder.blocks.0.mlp"


@torch.no_grad()
def overflow_forward(model: Any) -> None:
    """Fill the weight of a linear layer of the text encoder with 3e38, so that its products overflow fp32."""
    model.text_encoder.blocks[0].mlp.up.weight.fill_(3e38)


@torch.no_grad()
def overflow_backward(model: Any) -> None:
    """Scale two linear layers of the image decoder so that only the gradient between them overflows fp32.

    Their product keeps its size.
    The weight of MIM has to be 1e16.
    """
    mlp = model.image_decoder.blocks[0].mlp
    mlp.up.weight.mul_(1e-30)
    mlp.up.bias.zero_()
    mlp.down.weight.mul_(1e30)


def change_before(patch: pytest.MonkeyPatch, step: int, change: Callable[[Any], None]) -> None:
    """Let runs call ``change(model)`` before this step. Steps count from 1."""
    one_step = Trainer.one_step

    def changed(run: Trainer, batches: Any) -> None:
        if run.step + 1 == step:
            change(run.model)
        one_step(run, batches)

    patch.setattr(Trainer, "one_step", changed)


def failing_run(data: Path, out: Path, *, backward: bool = False, **settings: Any) -> Path:
    """A run of four steps of which the second and all after it fail. Returns the folder of its failed step."""
    settings = {"max_steps": 4, "precision": "fp32", "mim_weight": 1e16 if backward else 1.0, "model": MODEL} | settings
    with pytest.MonkeyPatch.context() as patch:
        change_before(patch, 2, overflow_backward if backward else overflow_forward)
        pretrain(pretrain_config(data, out, **settings))
    return out / "failed_step"
