"""The training step on a CUDA device: no host synchronization, CUDA graphs, and kernels against torch."""

from dataclasses import replace

import pytest
import torch

from mvlm.config.model import MaskVLMConfig
from mvlm.distributed.global_batch import backward_global
from mvlm.distributed.parallel import parallelize
from mvlm.distributed.world import World
from mvlm.model.maskvlm import MaskVLM
from mvlm.model.packing import pad_to_bucket
from mvlm.objectives.losses import Losses
from mvlm.training.cuda_graphs import CudaGraphs
from mvlm_kernels import use_backend
from support.models import micro_batch, micro_config

pytestmark = pytest.mark.gpu
SIZES = {"width": 128, "heads": 2, "image_size": 96, "patch_size": 16, "mask_block": 32, "text_length": 24}


def make(pairs: int = 16):
    """A model with heads of width 64, and a batch padded to buckets, on the device."""
    config = micro_config(**SIZES)
    torch.manual_seed(0)
    model = MaskVLM(config).cuda()
    batch, masks = micro_batch(tuple(3 + n % 20 for n in range(pairs)), config=config)
    batch, masks = pad_to_bucket(batch, masks, config.text_length)
    return model, batch.to("cuda"), masks.to("cuda")


def step(model: MaskVLM, batch, masks, number: int | torch.Tensor = 0) -> torch.Tensor:
    with torch.autocast("cuda", torch.bfloat16):
        loss = model(batch, masks, step=number, plan="fast").total
    loss.backward()
    return loss.detach()


@pytest.mark.parametrize("drop_masked", [False, True])
def test_a_step_never_synchronizes_with_the_device(drop_masked):
    model, batch, masks = make()
    model.config = replace(model.config, drop_masked=drop_masked)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    step(model, batch, masks)  # kernels compile, caches fill
    optimizer.step()
    torch.cuda.synchronize()
    try:
        torch.cuda.set_sync_debug_mode("error")
        step(model, batch, masks)
        optimizer.step()
        model.clamp_temperature()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_step_of_two_microbatches_never_synchronizes_with_the_device():
    """The host waits once, for the event behind the numbers of rows to exchange, which is no synchronization here."""
    model, *whole = make()
    micro = [tuple(whole), tuple(x.to("cuda") for x in make()[1:])]
    world = World(rank=0, size=1, local_rank=0, device=torch.device("cuda"))

    def step() -> Losses:
        return backward_global(
            parallelize(model, world),
            micro,  # pyright: ignore[reportArgumentType]
            world,
            seed=0,
            step=1,
            plan="fast",
            autocast=lambda: torch.autocast("cuda", torch.bfloat16),
        )

    first = step()  # kernels compile, caches fill
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad(set_to_none=True)
    torch.cuda.synchronize()
    try:
        torch.cuda.set_sync_debug_mode("error")
        again = step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.allclose(torch.stack([*first.values()]), torch.stack([*again.values()]))
    for wanted, parameter in zip(gradients, model.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, wanted, rtol=1e-2, atol=1e-3)


def test_kernels_train_as_torch_does():
    """The loss curves of 200 steps with and without the kernels stay together."""
    curves = {}
    for backend in ("triton", "torch"):
        model, batch, masks = make()
        model.set_attention("auto", "triton" if backend == "triton" else "sdpa")
        optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4, fused=True)
        losses = []
        with use_backend(backend):
            for number in range(200):
                losses.append(step(model, batch, masks, number))
                optimizer.step()
                optimizer.zero_grad()
        curves[backend] = torch.stack(losses)
    a, b = curves["triton"], curves["torch"]
    assert a[-20:].mean() < 0.7 * a[0]
    assert (a - b).abs().mean() <= 0.02 * b.mean()


def test_the_base_model_takes_a_step():
    torch.manual_seed(0)
    config = MaskVLMConfig.preset("base")
    batch, masks = micro_batch(tuple(8 + n % 20 for n in range(32)), config=config)
    batch, masks = (x.to("cuda") for x in pad_to_bucket(batch, masks, config.text_length))
    model = MaskVLM(config).cuda()
    assert torch.isfinite(step(model, batch, masks))


def test_steps_from_cuda_graphs_train_as_eager_steps():
    """Two buckets in turns, with updates between: equal losses and weights, digit for digit."""
    results = []
    for limit in (0, 8):
        model, _, _ = make()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)

        def eager(microbatches, number, model=model) -> Losses:
            with torch.autocast("cuda", torch.bfloat16):
                losses = model(*microbatches[0], step=number, plan="fast")
            losses.total.backward()
            return losses.detach()

        graphs = CudaGraphs(eager, model.parameters(), limit=limit)
        losses = []
        for number in range(12):
            pairs = 16 if number % 3 else 8
            batch, masks = micro_batch(tuple(3 + n % 20 for n in range(pairs)), seed=number, config=model.config)
            batch, masks = pad_to_bucket(batch, masks, model.config.text_length)
            step_number = torch.tensor(number, device="cuda")
            losses.append(graphs.run([(batch.to("cuda"), masks.to("cuda"))], step_number))
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        assert graphs.captured == (2 if limit else 0)
        results.append(
            (torch.stack([torch.stack([*x.values()]) for x in losses]), [p.detach() for p in model.parameters()])
        )
    (eager_losses, eager_weights), (losses, weights) = results
    assert torch.equal(losses, eager_losses)
    for p, q in zip(weights, eager_weights, strict=True):
        assert torch.equal(p, q)
