"""DDP, FSDP2 and a pipeline's stages around models that use the ops: on two ranks, the gradients of one process."""

import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from mvlm_kernels import gather_patches, masked_pixel_loss, place_tokens
from mvlm_kernels.layers import AddLayerNorm, CrossAttention, GeluLinear
from support.faults.forks import ended_well, in_ranks

pytestmark = [
    pytest.mark.slow,
    pytest.mark.plain_empty,
    pytest.mark.skipif(not dist.is_available(), reason="torch is built without distributed"),
]
DRAW = torch.Generator().manual_seed(0)
IMAGES = torch.randint(0, 256, (4, 3, 16, 16), dtype=torch.uint8, generator=DRAW)
WORDS = torch.randn(4, 5, 16, generator=DRAW)
LENGTHS = torch.tensor([5, 2, 3, 1])


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.feed = AddLayerNorm(16), GeluLinear(16, 16)
        self.attend = CrossAttention(16, 2, kv_heads=1)

    def forward(self, x: Tensor, words: Tensor, lengths: Tensor) -> Tensor:
        x, normed = self.norm(x)
        x, normed = self.norm(x, self.attend(normed, words, key_lengths=lengths))
        return x + self.feed(normed)


class Reader(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.project = nn.Linear(192, 16)
        self.mask, self.cls, self.positions = (nn.Parameter(torch.randn(n, 16)) for n in (1, 1, 5))
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(16, 192)

    def forward(self, images: Tensor, words: Tensor, lengths: Tensor) -> Tensor:
        x = self.embed(images)
        for block in self.blocks:
            x = block(x, words, lengths)
        return self.loss(x, images)

    def embed(self, images: Tensor) -> Tensor:
        patches = self.project(gather_patches(images, None, 8, dtype=torch.float32))
        return place_tokens(patches, self.mask[0], self.positions, self.cls[0])

    def loss(self, x: Tensor, images: Tensor) -> Tensor:
        return masked_pixel_loss(self.head(x[:, 1:]), images, None, 8, kind="mse")


def gradients(model: nn.Module, rows: slice = slice(0, 4)) -> dict[str, Tensor]:
    model.zero_grad()
    model(IMAGES[rows], WORDS[rows], LENGTHS[rows]).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def ddp(rank: int) -> dict[str, Tensor]:
    model = nn.parallel.DistributedDataParallel(Reader(), static_graph=False)
    return {name.removeprefix("module."): x for name, x in gradients(model, slice(2 * rank, 2 * rank + 2)).items()}


def fsdp(rank: int) -> dict[str, Tensor]:
    """Each block a unit of its own, made on the meta device, as large models are."""
    from torch.distributed.fsdp import fully_shard

    with torch.device("meta"):
        model = Reader()
    for block in (*model.blocks, model):
        fully_shard(block)
    model.to_empty(device="cpu")
    whole = Reader().state_dict()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            local: Tensor = parameter.to_local()  # type: ignore[attr-defined]
            local.copy_(whole[name].chunk(2)[rank] if len(whole[name]) > 1 else whole[name][rank:])
    found = gradients(model, slice(2 * rank, 2 * rank + 2))
    return {name: x.full_tensor() for name, x in found.items()}  # type: ignore[attr-defined]


def pipeline(rank: int) -> dict[str, Tensor]:
    """Two stages that send activations forward and their gradients back, as a pipeline's hooks do."""
    model = Reader()
    state = torch.empty(4, 5, 16)
    if rank == 0:
        out = model.blocks[0](model.embed(IMAGES), WORDS, LENGTHS)
        dist.send(out.detach(), 1)
        dist.recv(state, 1)
        out.backward(state)
    else:
        dist.recv(state, 0)
        state.requires_grad_()
        model.loss(model.blocks[1](state, WORDS, LENGTHS), IMAGES).backward()
        assert state.grad is not None
        dist.send(state.grad, 0)
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("wrapped", [ddp, fsdp, pipeline])
def test_two_ranks_have_the_gradients_of_one_process(wrapped: Callable[[int], dict[str, Tensor]], tmp_path: Path):
    wanted = gradients(Reader())

    def work() -> None:
        sys.stderr = (tmp_path / f"{os.environ['RANK']}.log").open("w")
        try:
            compare()
        except BaseException:
            traceback.print_exc()
            raise

    def compare() -> None:
        dist.init_process_group("gloo")
        rank = dist.get_rank()
        found = wrapped(rank)
        if wrapped is not pipeline:
            assert found.keys() == wanted.keys()
        assert len(found) > 5
        for name, grad in found.items():
            torch.testing.assert_close(grad, wanted[name], msg=lambda text, name=name: f"{name}: {text}")
        dist.barrier()
        dist.destroy_process_group()

    pids = in_ranks(work, 2)
    ended = [ended_well(pid) for pid in pids]
    assert all(ended), "".join(log.read_text() for log in sorted(tmp_path.glob("*.log")))
