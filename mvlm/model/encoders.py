"""The encoders: a ViT for images, a RoBERTa for text, and the cross-modality encoders; and the grid of patches.

The ViT (pre-norm, as in timm) and the RoBERTa (post-norm, as in transformers) compute the same as those libraries on
the same weights (tests/mvlm/weights/test_load.py). A block of a cross-modality encoder attends to its own stream, and
to the other encoder's output. Patches are cut, joined and masked here; the loader draws the masks.

Shape legend: B batch, N patches, K masked or visible patches, L rows, M rows of the other stream, T packed rows,
C width, H heads, D head width, P patch side, S image side.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mvlm.config.model import MaskVLMConfig
from mvlm.device import compute_dtype
from mvlm.model.attention import Attend, Attention, Branch, FeedForward, Residual, add_norm
from mvlm.model.packing import Packing
from mvlm_kernels.dispatch import without_autocast


class ImageBlock(nn.Module):
    """Pre-norm block of self-attention and feed-forward, as in ViT."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attention = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = FeedForward(width)

    def forward(self, rows: Residual, attend: Attend) -> Residual:
        """Compute the block: rows (B, 1+N, C) in and out. attend: computes the self-attention."""
        x, normalised = add_norm(self.norm1, rows.x, None if rows.y is None else Branch(rows.y))
        x, normalised = add_norm(self.norm2, x, attend(self.attention, normalised))
        return Residual(x, self.mlp(normalised))


class BaseImageEncoder(nn.Module):
    """Base of the image encoders: normalised pixels, sinusoidal positions. Subclasses have a `mask_token` (C,)."""

    mask_token: nn.Parameter

    def __init__(self, config: MaskVLMConfig) -> None:
        super().__init__()
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.tensor(config.image_mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(config.image_std).view(3, 1, 1), persistent=False)
        self.output_positions: Tensor | None
        self.register_buffer("output_positions", _output_positions(config), persistent=False)

    def normalize(self, images: Tensor) -> Tensor:
        """Images (B, 3, S, S), uint8 or float in 0..1 -> (x - mean) / std of x in 0..1, in the parameters' dtype."""
        scale = 255 if images.dtype == torch.uint8 else 1
        return (images.to(self.mean.dtype) / scale - self.mean) / self.std

    def add_output_positions(self, x: Tensor, visible_ids: Tensor | None = None) -> Tensor:
        """Add sines of row and column to features x, if the configuration says so.

        x is (B, 1+N, C), or (B, 1+K, C) of the patches visible_ids int64 (B, K).
        """
        if self.output_positions is None:
            return x
        sines = self.output_positions.to(x.dtype)
        return x + (sines if visible_ids is None else sines[F.pad(1 + visible_ids, (1, 0))])

    def forward(self, images: Tensor, masked: Tensor | None = None) -> Tensor:
        """images uint8 or float in 0..1 (B, 3, S, S); masked bool (B, N), True = replaced by the mask token.

        Returns features (B, 1+N, C), [CLS] first.
        """
        raise NotImplementedError

    def forward_visible(self, images: Tensor, visible_ids: Tensor) -> Tensor:
        """Encode only the patches visible_ids int64 (B, K) -> (B, 1+K, C), [CLS] first, without output positions."""
        raise NotImplementedError

    def with_mask_tokens(self, x: Tensor, visible_ids: Tensor) -> Tensor:
        """Put features x (B, 1+K, C) of `forward_visible` at their patches, mask tokens at others -> (B, 1+N, C)."""
        raise NotImplementedError


class ImageEncoder(BaseImageEncoder):
    """ViT over all patches. A learned mask token stands for each masked patch, as in SimMIM."""

    def __init__(self, config: MaskVLMConfig) -> None:
        super().__init__(config)
        self.patch_size = config.patch_size
        self.patch_projection = nn.Linear(config.patch_values, config.width)
        self.mask_token = nn.Parameter(torch.zeros(config.width))
        self.cls_token = nn.Parameter(torch.zeros(config.width))
        self.position = nn.Parameter(torch.zeros(1 + config.num_patches, config.width))
        self.resizing: Tensor | None = None
        """Matrix that interpolates `position` for images of another side (1+M, 1+N); None for the model's own."""
        self._of_sides: dict[tuple[int, torch.device], tuple[Tensor | None, Tensor | None]] = {}
        """`resizing` and `output_positions` of the sides and devices that have been used."""
        self.blocks = nn.ModuleList(ImageBlock(config.width, config.heads) for _ in range(config.image_layers))
        self.norm = nn.LayerNorm(config.width, eps=1e-6)

    def forward(self, images: Tensor, masked: Tensor | None = None) -> Tensor:
        x = self.run(self.embed(images, masked), lambda attention, y: attention(y, y))
        return self.add_output_positions(x)

    def resize(self, config: MaskVLMConfig) -> None:
        """Go on with images of the side in `config`, which has the other sizes of the encoder. No parameter changes.

        Positions are interpolated whenever they are read, so their gradient is one of the parameter. Its moments and
        averages go on as they are, and checkpoints keep their shapes.
        """
        key = config.num_patches, self.position.device
        if key not in self._of_sides:
            # resize_positions is linear in the positions: of the identity, it gives its own matrix.
            own, side = len(self.position), config.image_size // config.patch_size
            matrix = None if own == 1 + side**2 else resize_positions(torch.eye(own), side).to(key[1])
            sines = _output_positions(config)
            self._of_sides[key] = matrix, None if sines is None else sines.to(key[1], self.mean.dtype)
        self.resizing, self.output_positions = self._of_sides[key]

    def positions(self) -> Tensor:
        """Position embeddings (1+N, C) of [CLS] and of the N patches of an image of the present side."""
        if self.resizing is None:
            return self.position
        with without_autocast(self.position.device):
            return self.resizing.to(self.position.dtype) @ self.position

    def embed(self, images: Tensor, masked: Tensor | None = None) -> Tensor:
        """Embed [CLS] and the patches, with positions: the input of the blocks (B, 1+N, C)."""
        x = self.patch_projection(patchify(self.normalize(images), self.patch_size))  # (B, N, C)
        if masked is not None:
            x = torch.where(masked.unsqueeze(-1), self.mask_token.to(x.dtype), x)
        cls = self.cls_token.to(x.dtype).expand(x.shape[0], 1, -1)  # len(x) would be a constant of an exported program
        return torch.cat([cls, x], dim=1) + self.positions()

    def forward_visible(self, images: Tensor, visible_ids: Tensor) -> Tensor:
        """Encode only the patches visible_ids int64 (B, K), as in MAE (He et al. 2022) and FLIP (Li et al. 2023)."""
        x = self.embed(images)
        index = F.pad(1 + visible_ids, (1, 0)).unsqueeze(-1)  # (B, 1+K, 1), [CLS] too, also where no patch is visible
        return self.run(x.gather(1, index.expand(-1, -1, x.shape[-1])), lambda attention, y: attention(y, y))

    def with_mask_tokens(self, x: Tensor, visible_ids: Tensor) -> Tensor:
        """Put features x (B, 1+K, C) of `forward_visible` at their patches, mask tokens at others -> (B, 1+N, C).

        Positions are added to all rows again, as for MAE's decoder.
        """
        index, positions = F.pad(1 + visible_ids, (1, 0)).unsqueeze(-1), self.positions()  # (B, 1+K, 1), (1+N, C)
        hidden = self.mask_token.to(x.dtype).expand(len(x), len(positions), -1)
        return self.add_output_positions(hidden.scatter(1, index.expand(-1, -1, x.shape[-1]), x) + positions)

    def run(self, x: Tensor, attend: Attend) -> Tensor:
        """Run the blocks and the last norm over embedded rows (B, L, C) -> (B, L, C)."""
        rows = Residual(x)
        for block in self.blocks:
            rows = block(rows, attend)
        return add_norm(self.norm, rows.x, None if rows.y is None else Branch(rows.y), out_dtype=x.dtype)[1]


class TextBlock(nn.Module):
    """Post-norm block of self-attention and feed-forward, as in RoBERTa."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention = Attention(width, heads)
        self.norm1 = nn.LayerNorm(width, eps=1e-5)
        self.mlp = FeedForward(width)
        self.norm2 = nn.LayerNorm(width, eps=1e-5)

    def forward(self, rows: Residual, attend: Attend) -> Residual:
        """Compute the block: packed rows (T, C) in and out. attend: computes the self-attention."""
        normalised = rows.x if rows.y is None else rows.y
        x, normalised = add_norm(self.norm1, rows.x, attend(self.attention, normalised), post_norm=True)
        return Residual(*add_norm(self.norm2, x, self.mlp.branch(normalised), post_norm=True))


class TextEncoder(nn.Module):
    """RoBERTa encoder without token type embeddings.

    RoBERTa has only one type, so its embedding is a constant that the position embeddings can absorb.
    """

    def __init__(self, config: MaskVLMConfig) -> None:
        super().__init__()
        self.words = nn.Embedding(config.vocab_size, config.width)
        self.position = nn.Parameter(torch.zeros(config.text_length, config.width))
        self.norm = nn.LayerNorm(config.width, eps=1e-5)
        self.blocks = nn.ModuleList(TextBlock(config.width, config.heads) for _ in range(config.text_layers))

    def forward(self, tokens: Tensor, packing: Packing) -> Tensor:
        """Packed tokens int64 (T,) -> features (T, C)."""
        return self.run(tokens, packing.position, lambda attention, x: attention.packed(x, packing))

    def run(self, tokens: Tensor, position: Tensor, attend: Attend) -> Tensor:
        """Embed tokens and run the blocks; `attend` computes self-attention.

        tokens and their positions int64 (T,) -> (T, C), or padded (B, L) -> (B, L, C).
        """
        rows = self.embed(tokens, position)
        for block in self.blocks:
            rows = block(rows, attend)
        return rows.x

    def embed(self, tokens: Tensor, position: Tensor) -> Residual:
        """Embed tokens with their positions, int64 (T,) or (B, L): the input of the blocks (T, C) or (B, L, C)."""
        # F.embedding, not index_select: its backward is deterministic on CUDA.
        embedded = F.embedding(position, self.position)
        return Residual(*add_norm(self.norm, self.words(tokens), Branch(embedded), post_norm=True))


SelectRows = Callable[[Tensor], Tensor]
"""Selects some rows of a stream, possibly repeated: (..., L, C) -> (..., selected rows, C)."""


class CrossBlock(nn.Module):
    """Self-attention, cross-attention to the other encoder's output, and feed-forward, each with a residual sum.

    `norm="post"` normalises after each sum, as in the paper; `norm="pre"` normalises before each sub-layer.
    """

    def __init__(self, width: int, heads: int, norm: Literal["post", "pre"]) -> None:
        super().__init__()
        self.pre = norm == "pre"
        self.self_attention = Attention(width, heads)
        self.norm1 = nn.LayerNorm(width, eps=1e-5)
        self.cross_attention = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-5)
        self.mlp = FeedForward(width)
        self.norm3 = nn.LayerNorm(width, eps=1e-5)

    def forward(
        self,
        rows: Residual,
        attend_self: Attend,
        attend_cross: Attend,
        select: SelectRows | None = None,
        select_between: SelectRows | None = None,
        keys: Tensor | None = None,
    ) -> Residual:
        """Compute the block: rows (B, L, C), or packed (T, C) -> the same shape, or fewer rows.

        Args:
            attend_self: computes self-attention; called with this block's module and x, or the norm of x.
            attend_cross: computes cross-attention; called with this block's module and the rows after self-attention.
            select: for an `attend_self` that returns some rows only: selects the same rows of x.
            select_between: selects rows after self-attention, for `attend_cross` and all that follows.
            keys: (B, V, C), rows that `attend_self` attends to in place of x; with pre-norm they are normalised as x.
        """
        post = not self.pre
        x, y = rows
        if self.pre:
            x, y = add_norm(self.norm1, x, None if y is None else Branch(y))
        if keys is not None:
            attend_self = partial(attend_self, keys=add_norm(self.norm1, keys, None)[1] if self.pre else keys)
        branch = attend_self(self.self_attention, x if y is None else y)
        x = x if select is None else select(x)
        x, y = add_norm(self.norm2 if self.pre else self.norm1, x, branch, post_norm=post)
        if select_between is not None:
            same, x = x is y, select_between(x)
            y = x if same else select_between(y)
        branch = attend_cross(self.cross_attention, y)
        x, y = add_norm(self.norm3 if self.pre else self.norm2, x, branch, post_norm=post)
        if self.pre:
            return Residual(x, self.mlp(y))
        return Residual(*add_norm(self.norm3, x, self.mlp.branch(y), post_norm=True))

    def keys_values(self, memory: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (..., H, D) of the cross-attention, from rows (..., C) of the other stream."""
        return self.cross_attention.keys_values(memory)


class CrossEncoder(nn.Module):
    """A stack of cross-modality blocks. With pre-norm, a last LayerNorm follows."""

    def __init__(self, width: int, heads: int, layers: int, norm: Literal["post", "pre"]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(CrossBlock(width, heads, norm) for _ in range(layers))
        self.norm = nn.LayerNorm(width, eps=1e-5) if norm == "pre" else nn.Identity()

    def forward(
        self,
        x: Tensor,
        memory: Tensor,
        key_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        first_row_only: bool = False,
        keys: Tensor | None = None,
    ) -> Tensor:
        """Run the blocks: x (B, L, C) attends to itself and to memory (B, M, C). Returns (B, L, C).

        key_mask and memory_mask are bool (B, L) and (B, M), True = the row exists; None = all exist. With
        `first_row_only` it returns the first row (B, 1, C), and the last block computes no other. With `keys` (B, V,
        C), x attends to these rows in every block, and not to itself.
        """

        def attend_self(attention: Attention, y: Tensor, keys: Tensor | None = None) -> Branch:
            return attention(y, y if keys is None else keys, key_mask)

        def attend_self_first(attention: Attention, y: Tensor) -> Branch:
            return attention(first_row(y), y, key_mask)

        def attend_cross(attention: Attention, y: Tensor) -> Branch:
            return attention(y, memory, memory_mask)

        *early, last = self.layers
        rows = Residual(x)
        for block in early:
            rows = block(rows, attend_self, attend_cross, keys=keys)
        if first_row_only:
            return self.finish(last(rows, attend_self_first, attend_cross, select=first_row))
        return self.finish(last(rows, attend_self, attend_cross, keys=keys))

    def finish(self, rows: Residual) -> Tensor:
        """Features (..., C) from the output of the last block; with pre-norm, its last sum and the norm after it."""
        if not isinstance(self.norm, nn.LayerNorm):
            return rows.x
        return add_norm(self.norm, rows.x, None if rows.y is None else Branch(rows.y), out_dtype=rows.x.dtype)[1]

    @property
    def layers(self) -> list[CrossBlock]:
        """The blocks as a list of `CrossBlock`."""
        return [block for block in self.blocks if isinstance(block, CrossBlock)]


def first_row(x: Tensor) -> Tensor:
    """Select the first row of each sequence: (B, L, C) -> (B, 1, C)."""
    return x[:, :1]


class KeyValueCache:
    """Key/value cache for cross-attention: keys and values of one encoder's output, computed once for each layer.

    Args:
        rows: features (B, 1+N, C), or packed (T, C).
        packing: layout of packed rows; None for rows that are not packed.
    """

    def __init__(self, rows: Tensor, packing: Packing | None = None) -> None:
        self.rows = rows.to(compute_dtype(rows))
        self.packing = packing
        self._cached: dict[CrossBlock, tuple[Tensor, Tensor]] = {}

    def keys_values(self, block: CrossBlock) -> tuple[Tensor, Tensor]:
        """Keys and values for a block: (B, 1+N, H, D) or (T, H, D) each."""
        if block not in self._cached:
            self._cached[block] = block.keys_values(self.rows)
        return self._cached[block]


def masked_patches(patch_ids: Tensor, num_patches: int) -> Tensor:
    """Mask of the masked patches: patch_ids int64 (B, K) -> bool (B, N), True = masked.

    Neighbours in memory are the images, not the patches, as the kernel of `place_tokens` reads them.
    """
    mask = torch.zeros(num_patches, len(patch_ids), dtype=torch.bool, device=patch_ids.device)
    return mask.scatter_(0, patch_ids.t(), True).t()


def visible_patches(patch_ids: Tensor, num_patches: int) -> Tensor:
    """Indices of the patches that are not masked: masked patch_ids int64 (B, K) -> int64 (B, N-K), ascending."""
    # A stable sort of the flags keeps the indices ascending, with a shape that the host knows.
    visible = ~masked_patches(patch_ids, num_patches)  # (B, N), True = not masked
    return visible.byte().argsort(dim=1, descending=True, stable=True)[:, : num_patches - patch_ids.shape[1]]


def visible_rows(patch_ids: Tensor, num_patches: int) -> Tensor:
    """Rows of [CLS] and of the patches that are not masked: masked patch_ids int64 (B, K) -> int64 (B, 1+N-K)."""
    return F.pad(1 + visible_patches(patch_ids, num_patches), (1, 0))


def patchify(images: Tensor, patch_size: int) -> Tensor:
    """Cut images (B, 3, S, S) into patches (B, N, 3*P*P), in row-major order; values of a patch in (c, y, x) order."""
    rows = images.unflatten(3, (-1, patch_size)).unflatten(2, (-1, patch_size))  # (B, 3, S/P, P, S/P, P)
    return rows.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def unpatchify(patches: Tensor, patch_size: int) -> Tensor:
    """The inverse of `patchify`: (B, N, 3*P*P) -> (B, 3, S, S)."""
    side = round(patches.shape[1] ** 0.5)
    grid = patches.unflatten(2, (3, patch_size, patch_size)).unflatten(1, (side, side))  # (B, S/P, S/P, 3, P, P)
    return grid.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)


def resize_positions(position: Tensor, side: int) -> Tensor:
    """Resize positions of a square grid, (1+N, C) or without [CLS] (N, C), to (1 + side^2, C).

    The interpolation is bicubic with antialiasing, as in timm. Without [CLS], its row is zero. ValueError if N is not a
    square number.
    """
    rows = len(position)
    cls_rows = 0 if round(rows**0.5) ** 2 == rows else 1
    old_side = round((rows - cls_rows) ** 0.5)
    if old_side**2 != rows - cls_rows:
        raise ValueError(f"wanted positions of a square grid, with or without [CLS], got {rows}")
    first = position[:1] if cls_rows else torch.zeros_like(position[:1])
    grid = position[cls_rows:]
    if old_side != side:
        square = grid.T.reshape(1, -1, old_side, old_side).to(torch.promote_types(grid.dtype, torch.float32))
        square = F.interpolate(square, size=(side, side), mode="bicubic", antialias=True, align_corners=False)
        grid = square.flatten(2)[0].T.to(position.dtype)
    return torch.cat([first, grid])


def _output_positions(config: MaskVLMConfig) -> Tensor | None:
    """Sines of the places of [CLS], which has none, and of the patches (1+N, C); None if the model adds none."""
    if not config.output_positions:
        return None
    return F.pad(sine_positions(config.image_size // config.patch_size, config.width), (0, 0, 1, 0))


def sine_positions(side: int, width: int) -> Tensor:
    """Fixed embeddings of the places of patches (side^2, width), float32, row by row, as in DETR (Carion et al. 2020).

    The first half of the channels tells the column, the second the row: the sines and then the cosines of the
    coordinate times width / 4 frequencies from 1 to 1/10,000. Coordinates of the image's edges are 0 and 2 pi, so a
    place has the same embedding whatever the grid. 4 divides the width.
    """
    quarter = width // 4
    frequencies = 10_000 ** -(torch.arange(quarter, dtype=torch.float64) / quarter)
    coordinates = 2 * math.pi * (torch.arange(side, dtype=torch.float64) + 0.5) / side
    angles = coordinates[:, None] * frequencies  # (side, width / 4)
    one_axis = torch.cat([angles.sin(), angles.cos()], dim=1)  # (side, width / 2)
    columns, rows = one_axis.repeat(side, 1), one_axis.repeat_interleave(side, dim=0)
    return torch.cat([columns, rows], dim=1).float()
