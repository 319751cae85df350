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
    """`Block` on the kernels: attention, the residual sum with its norm, and GELU with the linear layer after it."""

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


def largest_difference(a: Tensor, b: Tensor) -> float:
    return (a - b).abs().max().item()


torch.manual_seed(0)
device = "cuda" if torch.cuda.is_available() else "cpu"
block = Block().to(device)
fused = FusedBlock(block).to(device)
patches = torch.randn(8, 196, 128, device=device, requires_grad=True)
words = torch.randn(8, 24, 128, device=device, requires_grad=True)
exists = torch.arange(24, device=device) < torch.randint(4, 25, (8, 1), device=device)  # captions of 4 to 24 tokens

# What would run here, and why? Attention takes the heads as a dimension of their own.
query, key, value = (x.unflatten(-1, (4, 32)) for x in (patches, words, words))
print(explain(cross_attention, query, key, value, key_mask=exists))

# The outputs, and the gradients in one direction.
wanted = block(patches, words, exists)
found = fused(patches, words, exists)
direction = torch.randn_like(wanted)
wanted_patches, wanted_words = torch.autograd.grad(wanted, (patches, words), direction)
found_patches, found_words = torch.autograd.grad(found, (patches, words), direction)

differences = {
    "output": largest_difference(wanted, found),
    "gradient of the patches": largest_difference(wanted_patches, found_patches),
    "gradient of the words": largest_difference(wanted_words, found_words),
}
for name, difference in differences.items():
    print(f"{name}: differs by {difference:.0e}")
