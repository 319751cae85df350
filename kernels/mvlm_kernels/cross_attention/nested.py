"""Jagged nested tensors as packed rows and their bounds, and back, without copies."""

from typing import Any

import torch
from torch import Tensor


def any_nested(*tensors: Any) -> bool:
    """True if one of the arguments is a nested tensor."""
    return any(isinstance(x, Tensor) and x.is_nested for x in tensors)


def as_packed(
    q: Any, k: Any, v: Any, cu_q: Tensor | None, cu_k: Tensor | None, max_q: int | None, max_k: int | None
) -> tuple[tuple[Tensor, Tensor, Tensor], dict[str, Any]]:
    """q, k and v with packed rows in place of nested ones, and the bounds of both sides by their names as arguments.

    A nested tensor is (batch, ragged length, heads, width) of layout ``torch.jagged``. The bound of its lengths is the
    one that torch keeps with it, if it keeps one. Raises ValueError for other nested tensors, and for k and v with
    different offsets.
    """
    if any_nested(q):
        q, cu_q, max_q = _rows("q", q, cu_q, max_q)
    if any_nested(k, v):
        if not (any_nested(k) and any_nested(v) and k.offsets() is v.offsets()):
            raise ValueError(
                "k and v must be nested with the same offsets, got others; make v by "
                "torch.nested.nested_tensor_from_jagged(values, k.offsets())"
            )
        v = _rows("v", v, cu_k, max_k)[0]
        k, cu_k, max_k = _rows("k", k, cu_k, max_k)
    return (q, k, v), {"cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k, "max_len_q": max_q, "max_len_k": max_k}


def like(rows: Tensor, q: Any) -> Tensor:
    """Packed output rows as a nested tensor with the lengths of a nested q; as they are for another q."""
    if not q.is_nested:
        return rows
    return torch.nested.nested_tensor_from_jagged(rows, q.offsets(), max_seqlen=_longest(q))


def _rows(name: str, x: Any, cu_seqlens: Tensor | None, longest: int | None) -> tuple[Tensor, Tensor, int | None]:
    """Rows (T, heads, width), offsets (batch + 1,), and the bound of the lengths that the host knows."""
    if x.layout != torch.jagged or x.dim() != 4 or getattr(x, "_ragged_idx", 1) != 1 or x.lengths() is not None:
        raise ValueError(
            f"{name} must be a contiguous jagged nested tensor (batch, ragged length, heads, width), got layout "
            f"{x.layout} and {x.dim()} dimensions; call .transpose(1, 2) or .contiguous() on another one"
        )
    if cu_seqlens is not None:
        raise ValueError(f"cu_seqlens must be None where {name} is nested, got a tensor")
    return x.values(), x.offsets(), _longest(x) if longest is None else longest


def _longest(x: Tensor) -> int | None:
    # Without waiting for the device: torch's public getter would read the offsets if it keeps no bound.
    return getattr(x, "_maybe_max_seqlen", None)
