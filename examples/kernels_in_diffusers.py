"""Blocks of a diffusion transformer (DiT) whose gate, norm, scale and shift (AdaLN-Zero) are one call of an op.

    pip install diffusers
    python examples/kernels_in_diffusers.py

Prints the blocks' class and the largest difference from their own forward (rounding, below 1e-5). Without diffusers a
small block with the same parts stands in.
"""

from typing import Any

import torch
from torch import Tensor, nn

from mvlm_kernels import add_layer_norm


class SmallBlock(nn.Module):
    """A DiT block in plain torch, with the names and the call of diffusers' BasicTransformerBlock."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.labels = nn.Embedding(classes, width)
        self.norm1: Any = nn.Module()
        self.norm1.emb, self.norm1.silu, self.norm1.linear = self.embed, nn.SiLU(), nn.Linear(width, 6 * width)
        self.norm3 = nn.LayerNorm(width, 1e-6, elementwise_affine=False)
        self.mixing = nn.MultiheadAttention(width, 2, batch_first=True)
        self.ff = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU("tanh"), nn.Linear(4 * width, width))

    def embed(self, timestep: Tensor, labels: Tensor, **_: object) -> Tensor:
        return torch.cos(timestep[:, None] / (1 + torch.arange(self.labels.embedding_dim))) + self.labels(labels)

    def attn1(self, n: Tensor) -> Tensor:
        return self.mixing(n, n, n, need_weights=False)[0]

    def forward(self, x: Tensor, timestep: Tensor, class_labels: Tensor) -> Tensor:
        shift, scale, gate, shift2, scale2, gate2 = (v[:, None] for v in vectors(self, timestep, class_labels))
        x = x + gate * self.attn1(self.norm3(x) * (1 + scale) + shift)
        return x + gate2 * self.ff(self.norm3(x) * (1 + scale2) + shift2)


def make_block(width: int, classes: int) -> Any:
    try:
        from diffusers.models.attention import BasicTransformerBlock  # pyright: ignore[reportMissingImports]
    except ImportError:
        return SmallBlock(width, classes)
    options = {"activation_fn": "gelu-approximate", "norm_type": "ada_norm_zero", "norm_elementwise_affine": False}
    return BasicTransformerBlock(width, 2, width // 2, num_embeds_ada_norm=classes, norm_eps=1e-6, **options)


def vectors(block: Any, timestep: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
    """Shift, scale and gate of attention, then of the feed-forward layer, each (B, C): slices of one tensor."""
    norm = block.norm1
    return norm.linear(norm.silu(norm.emb(timestep, labels, hidden_dtype=torch.float32))).chunk(6, dim=1)


def fused(blocks: Any, x: Tensor, timestep: Tensor, labels: Tensor) -> Tensor:
    """Two calls a block: each adds the gated output of a layer, and normalises and modulates the input of the next."""
    y: Any = None
    gate: Any = None
    for block in blocks:
        shift, scale, gate1, shift2, scale2, gate2 = vectors(block, timestep, labels)
        x, n = add_layer_norm(x, y, None, None, 1e-6, gate=gate, scale=scale, shift=shift)
        x, n = add_layer_norm(x, block.attn1(n), None, None, 1e-6, gate=gate1, scale=scale2, shift=shift2)
        y, gate = block.ff(n), gate2
    return x + gate[:, None] * y


torch.manual_seed(0)
blocks = nn.ModuleList(make_block(64, 10) for _ in range(3)).eval()  # in training diffusers drops labels at random
x, timestep, labels = torch.randn(4, 36, 64, requires_grad=True), torch.tensor([7, 40, 300, 999]), torch.arange(4)
leaves = [x, *(p for p in blocks.parameters() if p.requires_grad)]

wanted = x
for block in blocks:
    wanted = block(wanted, timestep=timestep, class_labels=labels)
found = fused(blocks, x, timestep, labels)
results = [(out, *torch.autograd.grad(out.square().sum() / 100, leaves)) for out in (found, wanted)]
differences = [(a - b).abs().max().item() for a, b in zip(*results, strict=True)]
print(f"{type(blocks[0]).__name__}: outputs differ by {differences[0]:.0e}, gradients by {max(differences[1:]):.0e}")
