"""Kernels in a plain torch model: three layers replaced, with the same weights, outputs and gradients.

    python examples/kernels_in_torch.py

Prints which backend runs here and why, then the largest differences from torch, which are rounding (below 1e-5).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mvlm_kernels import cross_attention, explain
from mvlm_kernels.layers import AddLayerNorm, CrossAttention, GeluLinear


class Block(nn.Module):
    """Image patches (B, 196, C) that read a caption (B, 24, C), of which only the tokens in `exists` (B, 24) exist."""

    def __init__(self, width: int = 128, heads: int = 4) -> None:
        super().__init__()
        self.read = nn.MultiheadAttention(width, heads, batch_first=True)
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, patches: Tensor, words: Tensor, exists: Tensor) -> Tensor:
        patches = patches + self.read(patches, words, words, key_padding_mask=~exists, need_weights=False)[0]
        return patches + self.down(F.gelu(self.up(self.norm(patches))))


class FusedBlock(nn.Module):
    """The same on the kernels: attention, the residual sum with its norm, and GELU with the linear layer after it."""

    def __init__(self, block: Block) -> None:
        super().__init__()
        self.read = CrossAttention.from_torch(block.read)
        self.norm = AddLayerNorm(block.norm.normalized_shape[0], block.norm.eps)
        self.up, self.down = block.up, GeluLinear(block.down.in_features, block.down.out_features)
        self.norm.load_state_dict(block.norm.state_dict())
        self.down.load_state_dict(block.down.state_dict())

    def forward(self, patches: Tensor, words: Tensor, exists: Tensor) -> Tensor:
        patches, normed = self.norm(patches, self.read(patches, words, key_mask=exists))
        return patches + self.down(self.up(normed))


torch.manual_seed(0)
device = "cuda" if torch.cuda.is_available() else "cpu"
block = Block().to(device)
fused = FusedBlock(block).to(device)
patches, words = torch.randn(8, 196, 128, device=device), torch.randn(8, 24, 128, device=device)
exists = torch.arange(24, device=device) < torch.randint(4, 25, (8, 1), device=device)

heads = [x.unflatten(-1, (4, 32)) for x in (patches, words, words)]
explanation = explain(cross_attention, *heads, key_mask=exists)
print(explanation)

inputs = patches.requires_grad_(), words.requires_grad_()
wanted, found = block(*inputs, exists), fused(*inputs, exists)
direction = torch.randn_like(wanted)
gradients = [torch.autograd.grad(out, inputs, direction) for out in (wanted, found)]
differences = {"output": (wanted - found).abs().max().item()}
for name, a, b in zip(("patches", "words"), *gradients, strict=True):
    differences[f"gradient of the {name}"] = (a - b).abs().max().item()
for name, difference in differences.items():
    print(f"{name}: differs by {difference:.0e}")
