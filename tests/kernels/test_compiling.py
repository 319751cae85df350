"""Compiled and exported modules that use every op: one graph for all sizes, the same values and gradients."""

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.export import Dim

from mvlm_kernels import gather_patches, masked_pixel_loss, place_tokens
from mvlm_kernels.layers import AddLayerNorm, CrossAttention, GeluLinear

pytestmark = [
    pytest.mark.slow,
    pytest.mark.plain_empty,
    pytest.mark.filterwarnings("ignore:<class .torch.autograd.function.Function.> should not:DeprecationWarning"),
]
Inputs = tuple[Tensor, Tensor, Tensor, Tensor]


class Reader(nn.Module):
    """A masked autoencoder that reads a caption: all layers once."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Linear(192, 32)
        self.mask, self.cls, self.positions = (nn.Parameter(torch.randn(*n, 32)) for n in ((), (), (17,)))
        self.norm = AddLayerNorm(32)
        self.attend = CrossAttention(32, 4, context_width=16, kv_heads=2, dropout=dropout)
        self.feed = GeluLinear(32, 32)
        self.head = nn.Linear(32, 192)

    def forward(self, images: Tensor, ids: Tensor, words: Tensor, exists: Tensor) -> Tensor:
        x = self.embed(gather_patches(images, ids, 8, mean=(0.5,) * 3, std=(0.2,) * 3))
        x, normed = self.norm(place_tokens(x, self.mask, self.positions, self.cls, visible_ids=ids))
        x, normed = self.norm(x, self.attend(normed, words, key_mask=exists))
        x = (x + self.feed(normed))[:, 1 : 1 + ids.shape[1]]
        return masked_pixel_loss(self.head(x), images, ids, 8)


def inputs(batch: int, length: int, patches: int) -> Inputs:
    """images, ids of visible patches, words, and the mask of the words that exist."""
    draw = torch.Generator().manual_seed(length)
    ids = torch.stack([torch.randperm(16, generator=draw)[:patches] for _ in range(batch)])
    exists = torch.rand(batch, length, generator=draw) < 0.7
    exists[:, 0] = True
    images = torch.randint(0, 256, (batch, 3, 32, 32), dtype=torch.uint8, generator=draw)
    return images, ids, torch.randn(batch, length, 16, generator=draw), exists


@pytest.mark.extended
def test_dropout_draws_in_the_graph_that_holds_for_all_sizes():
    model, counter = Reader(dropout=0.5), CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    compiled, losses, graphs = torch.compile(model, fullgraph=True, backend=counter), [], []
    for sizes in ((2, 9, 5), (2, 9, 5), (3, 17, 7), (4, 70, 6)):
        losses.append(float(compiled(*inputs(*sizes)).detach()))
        graphs.append(counter.frame_count)
    assert graphs == [1, 1, 2, 2]
    assert losses[0] != losses[1]  # a new seed in each call
    torch._dynamo.reset()


def test_exported_program_takes_every_batch_and_length():
    model = Reader().eval()
    batch, length, patches = Dim("batch", min=1, max=999), Dim("length", min=1, max=128), Dim("patches", min=1, max=16)
    dynamic = ({0: batch}, {0: batch, 1: patches}, {0: batch, 1: length}, {0: batch, 1: length})
    program = torch.export.export(model, inputs(2, 9, 5), dynamic_shapes=dynamic, strict=False).module()
    for sizes in ((3, 17, 7), (1, 128, 16), (5, 1, 1)):
        x = inputs(*sizes)
        torch.testing.assert_close(program(*x), model(*x))
