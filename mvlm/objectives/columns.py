"""Columns of the contrastive logits, of which each rank has computed the part of its own rows, merged over the ranks.

Shape legend: W ranks, n pairs of a rank, G pairs of the global batch.
"""

import torch
from torch import Tensor

from mvlm.distributed.collectives import AsyncOp, GlobalBatchLayout, return_from_owners, send_to_owners
from mvlm_kernels import ContrastiveTerms


def merge_columns(terms: ContrastiveTerms, layout: GlobalBatchLayout) -> tuple[Tensor, Tensor, Tensor]:
    """Merge the columns of this rank's own pairs, in the order of ranks.

    Returns:
        Log-sum-exp over all rows (n,), with gradients that return to every rank; whether the largest logit is that of a
        right pair, bool (n,); and the row that each column drew, int64 (n,), of equal scores the first.
    """
    dtype = terms.columns.dtype
    # In float64, which is exact for row numbers too, all of it travels in one collective.
    of_rows = terms.columns, *terms.column_best, terms.column_score, terms.column_drawn
    parts = torch.stack([x.double() for x in of_rows], dim=1)  # (G, 5)
    arrived = send_to_owners(parts.detach(), layout)
    parts = AsyncOp(parts, arrived.wait, lambda grad: return_from_owners(grad, layout)).wait()  # (W, n, 5)
    sums, top, best, score, drawn = parts.unbind(-1)
    first = torch.where(score == score.amax(0), drawn, torch.inf).amin(0)
    return sums.logsumexp(0).to(dtype), best.amax(0) >= top.amax(0), first.long()
