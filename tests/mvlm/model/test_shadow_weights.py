"""A step with copies of the weights in bf16, and one in which autocast casts them, have the same bits."""

import copy
from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import distribute_tensor

from mvlm.config.groups import PartSettings
from mvlm.costs.step_cost import simulated_ranks
from mvlm.device import autocast
from mvlm.distributed.global_batch import backward_global
from mvlm.distributed.parallel import checkpoint_activations, parallelize
from mvlm.model.adaptation import adapt
from mvlm.model.maskvlm import MaskVLM
from mvlm.model.shadow_weights import shadow_weights
from support.models import ALONE, micro_batch, micro_model

Numbers = list[Tensor]


def three_steps(model: MaskVLM, shadows: bool, microbatches: int = 1) -> Numbers:
    """Losses, gradients and weights of three updates in bf16."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01, fused=True)
    copies = shadow_weights(model) if shadows else None
    assert (copies is not None) == shadows
    parallel, found = parallelize(model, ALONE), []
    for step in range(3):
        micro = [micro_batch(seed=10 * step + a, config=model.config) for a in range(microbatches)]
        with nullcontext() if copies is None else copies.in_use():
            if microbatches == 1:
                with autocast(ALONE.device, "bf16"):
                    losses = model(*micro[0], step=step, plan="fast")
                losses.total.backward()
            else:
                in_bf16 = partial(autocast, ALONE.device, "bf16")
                losses = backward_global(parallel, micro, ALONE, seed=0, step=step, plan="fast", autocast=in_bf16)
        found += [x.detach() for x in losses.values()]
        found += [torch.zeros(0) if p.grad is None else p.grad for p in model.parameters()]
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        found += [p.detach().clone() for p in model.parameters()]
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    "sizes",
    [{"cross_norm": "post"}, {"cross_norm": "pre", "mim_rows": "masked"}, {"drop_masked": True}],
    ids=["post-norm", "masked rows", "dropped"],
)
@pytest.mark.parametrize("how", ["plainly", "checkpointed", "in microbatches", "adapters"])
def test_steps_have_the_bits_of_steps_that_cast(sizes: dict[str, Any], how: str):
    both = [micro_model(dtype=torch.float32, **sizes) for _ in range(2)]
    for model in both:
        if how == "checkpointed":
            checkpoint_activations(model)
        if how == "adapters":
            torch.manual_seed(0)
            adapt(model, PartSettings(train_image="lora", train_text="frozen"))
    number = 2 if how == "in microbatches" else 1
    found, wanted = (three_steps(model, shadows, number) for model, shadows in zip(both, (True, False), strict=True))
    assert len(found) == len(wanted)
    for x, y in zip(found, wanted, strict=True):
        assert torch.equal(x, y)


def test_copies_are_no_part_of_the_model():
    model = micro_model(dtype=torch.float32)
    names, copies = list(model.state_dict()), shadow_weights(model)
    assert copies is not None
    with copies.in_use():
        assert list(model.state_dict()) == names == list(copy.deepcopy(model).state_dict())
    # Half the bytes of the blocks' linear layers.
    linear = [m for name, m in model.named_modules() if isinstance(m, nn.Linear) and "blocks." in name]
    assert sum(x.nbytes for x in copies.tensors) == 2 * sum(p.numel() for m in linear for p in m.parameters())


def test_sharded_parameters_have_no_copies():
    model = micro_model(dtype=torch.float32)
    with simulated_ranks(2):
        mesh = init_device_mesh("cpu", (2,))
        model.pixel_head.weight = nn.Parameter(distribute_tensor(model.pixel_head.weight.detach(), mesh))
        assert shadow_weights(model) is None
