"""The readers of each key sequence: key_index inverted."""

import torch
from torch import Tensor


def invert_key_index(key_index: Tensor, sequences: int) -> tuple[Tensor, Tensor]:
    """Invert key_index once, for all calls of :func:`mvlm_kernels.cross_attention` that share it (``key_readers``).

    Args:
        key_index: (B,) int32 or int64; query sequence b reads key sequence key_index[b].
        sequences: B', number of key sequences.

    Returns:
        order (B,) and spans (B', 3), int64. A row of spans is a key sequence r, first and last: the query sequences
        order[first:last], ascending, read r. Key sequences with more readers come first, so that the programs of a
        grid with most work start first. An index outside [0, B') counts as the nearest one, so that exactly one program
        writes the gradient of each query sequence. That gradient is NaN.
    """
    if not isinstance(key_index, Tensor) or key_index.dim() != 1 or key_index.dtype not in (torch.int32, torch.int64):
        got = (
            f"{key_index.dtype} {tuple(key_index.shape)}" if isinstance(key_index, Tensor) else type(key_index).__name__
        )
        raise ValueError(f"key_index must be int32 or int64 (query sequences,), got {got}")
    if sequences < 1:
        raise ValueError(f"sequences must be at least 1, got {sequences}")
    sorted_index, order = torch.sort(key_index.long().clamp(0, sequences - 1), stable=True)
    bounds = torch.arange(sequences + 1, device=key_index.device)
    first, last = torch.searchsorted(sorted_index, bounds).unfold(0, 2, 1).unbind(1)
    rank = torch.argsort(first - last, stable=True)  # most readers first
    return order, torch.stack([rank, first[rank], last[rank]], dim=1)
