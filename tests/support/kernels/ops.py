"""Every op of the library once or more, as rows of one table: a call, the same in plain torch, and its inputs.

`tests/kernels/test_ops.py` and its neighbours ask the same properties of each row.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from mvlm_kernels import add_layer_norm, cross_attention, gather_patches, gelu_linear, masked_pixel_loss, place_tokens

REGISTERED = {"gelu_linear": "gelu"}
"""Names under torch.ops where they are not those of the functions."""
VALUES: dict[str, Any] = {"mean": [0.1, 0.2, 0.3], "std": [0.3, 0.5, 0.7]}


class Row(NamedTuple):
    """ours and plain take the tensors, which get gradients, and the constants by name."""

    op: str
    ours: Callable[..., Any]
    plain: Callable[..., Any]
    tensors: tuple[Tensor, ...]
    constants: dict[str, Any]

    def leaves(self) -> list[Tensor]:
        return [x.detach().clone().requires_grad_() for x in self.tensors]

    def cast(self, dtype: torch.dtype, device: str = "cpu") -> "Row":
        """The row with tensors of another dtype, and everything on another device."""
        constants = tree_map_only(Tensor, lambda x: x.to(device), self.constants)
        return self._replace(tensors=tuple(x.to(device, dtype) for x in self.tensors), constants=constants)

    def mixed(self) -> "Row":
        """The row as under autocast: bfloat16 activations, and float32 parameters, streams and pixels."""
        narrow = {"cross_attention": {0, 1, 2}, "add_layer_norm": {1}}.get(self.op, {0})
        types = (torch.bfloat16 if i in narrow else torch.float32 for i in range(len(self.tensors)))
        return self._replace(tensors=tuple(x.to(dtype) for x, dtype in zip(self.tensors, types, strict=True)))


def attention_in_torch(
    q: Tensor, k: Tensor, v: Tensor, *, key_lengths: Any = None, key_mask: Any = None, key_index: Any = None
) -> Tensor:
    exists = torch.ones(k.shape[:2], dtype=torch.bool) if key_mask is None else key_mask
    if key_lengths is not None:
        exists = exists & (torch.arange(k.shape[1]) < key_lengths[:, None])
    if key_index is not None:
        k, v, exists = k[key_index], v[key_index], exists[key_index]
    k, v = (x.repeat_interleave(q.shape[2] // k.shape[2], 2) for x in (k, v))
    s = torch.einsum("bqhd,bkhd->bhqk", q, k) * q.shape[-1] ** -0.5
    s = s.masked_fill(~exists[:, None, None], -torch.inf)
    return torch.einsum("bhqk,bkhd->bqhd", s.softmax(-1), v)


def packed_attention_in_torch(
    q: Tensor, k: Tensor, v: Tensor, *, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, **_: Any
) -> Tensor:
    bounds = zip(cu_seqlens_q.tolist(), cu_seqlens_q.tolist()[1:], cu_seqlens_k.tolist(), cu_seqlens_k.tolist()[1:])  # noqa: B905
    return torch.cat([attention_in_torch(q[None, a:b], k[None, c:d], v[None, c:d])[0] for a, b, c, d in bounds])


def patches_in_torch(x: Tensor, patch_ids: Tensor | None, patch: int) -> Tensor:
    x = x.double() / 255 if x.dtype == torch.uint8 else x
    patches = F.unfold(x, patch, stride=patch).transpose(1, 2)  # (B, N, C*P*P)
    if patch_ids is None:
        return patches
    return torch.stack([rows[ids] for rows, ids in zip(patches, patch_ids.long(), strict=True)])


def gathered_in_torch(
    x: Tensor,
    patch_ids: Any = None,
    size: int = 4,
    mean: Sequence[float] = (0.0,) * 3,
    std: Sequence[float] = (1.0,) * 3,
) -> Tensor:
    mean_c11, std_c11 = (torch.tensor(values, dtype=x.dtype)[:, None, None] for values in (mean, std))
    return patches_in_torch((x - mean_c11) / std_c11, patch_ids, size)


def placed_in_torch(
    tokens: Tensor, mask_token: Tensor, positions: Tensor, cls_token: Tensor, *, masked: Any = None,
    visible_ids: Any = None, with_unmasked: bool = False,
) -> Tensor:  # fmt: skip
    batch, count = len(tokens), len(positions) - 1
    patches = tokens
    if visible_ids is not None:
        chosen = (visible_ids[..., None] == torch.arange(count)).to(tokens.dtype)  # (B, K, N)
        patches = torch.einsum("bkn,bkc->bnc", chosen, tokens)
        masked = chosen.sum(1) == 0
    found = [patches] if with_unmasked else []
    found.append(patches if masked is None else torch.where(masked[:, :, None], mask_token, patches))
    first = (cls_token + positions[0]).expand(batch, 1, -1)
    return torch.cat([torch.cat([first, x + positions[1:]], 1) for x in found])


def loss_in_torch(pred: Tensor, *, images: Tensor, patch_ids: Any, kind: str = "l1", reduction: str = "mean") -> Tensor:
    size = {"l1": torch.abs, "mse": torch.square}[kind](pred - patches_in_torch(images, patch_ids, 4))
    return size.mean() if reduction == "mean" else size.mean(2)


def norm_in_torch(x: Tensor, y: Tensor, w: Tensor, b: Tensor, y_bias: Any = None, post_norm: bool = False) -> Any:
    total = x + y if y_bias is None else x + y + y_bias
    normalised = F.layer_norm(total, total.shape[-1:], w, b, 1e-5)
    return (normalised if post_norm else total), normalised


def rows(number: int = 0) -> dict[str, Row]:
    """The table in float64. Another `number` has other sizes; with 4, sizes are equal only where they have to be."""
    draw = torch.Generator().manual_seed(number)
    batch, count, side = 2 + number, 3 + number, 8 + 4 * (number % 2)
    patches = (side // 4) ** 2

    def rand(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw, dtype=torch.float64)

    def ints(high: int, *shape: int) -> Tensor:
        return torch.randint(0, high, shape, generator=draw)

    images = torch.randint(0, 256, (batch, 3, side, side), dtype=torch.uint8, generator=draw)
    ids, masked = ints(patches, batch, count), torch.rand(batch, patches, generator=draw) < 0.5
    visible = torch.stack([torch.randperm(patches, generator=draw)[:3] for _ in range(batch)])
    exists = torch.rand(batch, 130 + number, generator=draw) < 0.5
    exists[:, 0] = True
    cu_q = torch.tensor([0, *range(3, 3 * batch, 3), 3 * batch + 2])
    cu_k = torch.tensor([0, *range(5, 5 * batch, 5), 5 * batch + 4])
    placed = (rand(batch, patches, 12), rand(12), rand(1 + patches, 12), rand(12))
    norm = (rand(batch, count, 8), rand(batch, count, 8), rand(8), rand(8))
    pixels: dict[str, Any] = {"images": images, "patch_ids": ids}

    def loss(pred: Tensor, *, images: Tensor, patch_ids: Any, **options: Any) -> Tensor:
        return masked_pixel_loss(pred, images, patch_ids, 4, **options)

    def gather(x: Tensor, *, patch_ids: Any = None, size: int = 4, **options: Any) -> Tensor:
        return gather_patches(x, patch_ids, size, **options)

    def normalised(x: Tensor, y: Tensor, w: Tensor, b: Tensor, y_bias: Any = None, **options: Any) -> Any:
        return add_layer_norm(x, y, w, b, y_bias=y_bias, **options)

    def gelu(h: Tensor, w: Tensor, b: Tensor | None = None, h_bias: Tensor | None = None) -> Tensor:
        return gelu_linear(h, w, b, h_bias=h_bias)

    return {
        "attention": Row(
            "cross_attention", cross_attention, attention_in_torch,
            (rand(batch, 4, 2, 32), rand(batch, 5, 2, 32), rand(batch, 5, 2, 32)),
            {"key_lengths": 1 + ints(5, batch)},
        ),
        "attention, long keys": Row(
            "cross_attention", cross_attention, attention_in_torch,
            (rand(batch + 1, 5, 4, 8), rand(batch, 130 + number, 2, 8), rand(batch, 130 + number, 2, 8)),
            {"key_mask": exists, "key_index": ints(batch, batch + 1)},
        ),
        "attention, packed": Row(
            "cross_attention", cross_attention, packed_attention_in_torch,
            (rand(3 * batch + 2, 2, 16), rand(5 * batch + 4, 2, 16), rand(5 * batch + 4, 2, 16)),
            {"cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k, "max_len_q": 8, "max_len_k": 16},
        ),
        "patches": Row(
            "gather_patches", gather, gathered_in_torch, (rand(batch, 3, side, side),), {"patch_ids": ids, **VALUES},
        ),
        "patches, all": Row("gather_patches", gather, gathered_in_torch, (rand(batch, 3, side, side),), {}),
        "patches, whole images": Row(
            "gather_patches", gather, gathered_in_torch, (rand(batch, 3, side, side),), {"size": side},
        ),
        "patches, whole images by ids": Row(
            "gather_patches", gather, gathered_in_torch, (rand(batch, 3, side, side),),
            {"size": side, "patch_ids": ids * 0, **VALUES},
        ),
        "loss": Row("masked_pixel_loss", loss, loss_in_torch, (rand(batch, count, 48),), {**pixels, "kind": "mse"}),
        "loss, l1 of each patch": Row(
            "masked_pixel_loss", loss, loss_in_torch, (rand(batch, count, 48),), {**pixels, "reduction": "none"},
        ),
        "tokens": Row("place_tokens", place_tokens, placed_in_torch, placed, {}),
        "tokens, masked": Row("place_tokens", place_tokens, placed_in_torch, placed, {"masked": masked}),
        "tokens, both": Row(
            "place_tokens", place_tokens, placed_in_torch, placed, {"masked": masked, "with_unmasked": True},
        ),
        "tokens, visible": Row(
            "place_tokens", place_tokens, placed_in_torch, (rand(batch, 3, 12), *placed[1:]),
            {"visible_ids": visible},
        ),
        "norm": Row("add_layer_norm", normalised, norm_in_torch, (*norm, rand(8)), {}),
        "post-norm": Row("add_layer_norm", normalised, norm_in_torch, norm, {"post_norm": True}),
        "gelu": Row(
            "gelu_linear", gelu, lambda h, w, b: F.linear(F.gelu(h), w, b),
            (rand(batch, count, 8), rand(4, 8), rand(4)), {},
        ),
        "gelu of rows": Row(
            "gelu_linear", gelu, lambda h, w: F.linear(F.gelu(h), w), (rand(count, 8), rand(4, 8)), {},
        ),
        "gelu with its bias": Row(
            "gelu_linear", gelu, lambda h, w, b, h_bias: F.linear(F.gelu(h + h_bias), w, b),
            (rand(batch, count, 8), rand(4, 8), rand(4), rand(8)), {},
        ),
    }  # fmt: skip


ROWS = rows()


def total(outputs: Any) -> Tensor:
    """A scalar of all outputs, whose gradient is another in each element."""
    found = [x.square().sum() if x.dim() else x for x in distinct(outputs)]
    return sum(found[1:], found[0])


def distinct(outputs: Any) -> list[Tensor]:
    return list({id(x): x for x in tree_leaves(outputs) if isinstance(x, Tensor)}.values())


def loss_and_gradients(function: Callable[..., Any], row: Row, leaves: Iterable[Tensor] | None = None) -> list[Tensor]:
    """Outputs, and the gradients of their total."""
    inputs = row.leaves() if leaves is None else list(leaves)
    outputs = function(*inputs, **row.constants)
    grads = torch.autograd.grad(total(outputs), inputs, allow_unused=True, materialize_grads=True)
    return [*tree_leaves(outputs), *grads]
