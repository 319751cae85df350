"""Both passes of ``contrastive_terms``, a block of logits at a time: each block is computed once a pass.

Shape legend: n rows (images), G columns (captions), E width, R and C rows and columns of a block.
"""

from collections.abc import Callable, Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from mvlm_kernels.arguments import compute_dtype
from mvlm_kernels.contrastive_loss.noise import gumbel_noise

BLOCK = {"cpu": 1 << 18}
"""Logits of a block, by type of device: 1 MiB in a processor's cache. All made of them takes up to 7 times as much."""
BLOCK_ELSEWHERE = 1 << 21
"""Logits of a block on a GPU, which a few hundred launches compute."""
ROWS = 1024
"""Most rows of a block. Every block adds to the gradients of its rows and columns, so it should be no narrow strip."""
LOWEST = float("-inf")


def blocks(rows: int, columns: int, logits: int, multiple: int = 1) -> Iterator[tuple[slice, slice]]:
    """Rows and columns of blocks of about so many logits. The width of all but the last is a multiple of `multiple`."""
    height = max(1, min(rows, ROWS))
    width = max(1, logits // height // multiple) * multiple
    for c in range(0, columns, width):
        for r in range(0, rows, height):
            yield slice(r, r + height), slice(c, c + width)


class Pairs:
    """Right pairs of the loss, and matching pairs, which are no negatives: those that share an image or a text."""

    def __init__(
        self, rows: Tensor, columns: int, image_id: Tensor | None, text_id: Tensor | None, shared: bool,
        sigmoid: bool, dtype: torch.dtype,
    ) -> None:  # fmt: skip
        self.rows, self.columns, self.shared = rows, torch.arange(columns, device=rows.device), shared
        self._ids = [x.contiguous() for x in (image_id, text_id) if x is not None] or [self.columns]
        ones = torch.ones(columns, dtype=dtype, device=rows.device)
        # Both directions of InfoNCE weigh a right pair, and the sigmoid loss has it once.
        self.share = ones / 2 if sigmoid else ones / _number_of_matches(self._ids) if shared else ones

    def blocks(self) -> Iterator[tuple[slice, slice]]:
        """Blocks of this device, in the order in which sums are added up."""
        return blocks(len(self.rows), len(self.columns), BLOCK.get(self.rows.device.type, BLOCK_ELSEWHERE))

    def matches(self, r: slice, c: slice) -> Tensor:
        """bool (R, C), True = row and column share an image or a text."""
        found = [x[self.rows[r], None] == x[c] for x in self._ids]
        return found[0] if len(found) == 1 else found[0] | found[1]

    def weights(self, matches: Tensor, r: slice, c: slice) -> Tensor:
        """(R, C), weights of the logits of shared right pairs; 0 elsewhere."""
        return matches * (self.share[self.rows[r], None] + self.share[c])

    def own(self, r: slice, c: slice) -> tuple[Tensor, Tensor, Tensor]:
        """Column int64 in the block of each row's own pair, whether it lies inside, and its weight: (R, 1) each."""
        rows, columns = self.rows[r, None], self.columns[c]
        inside = (rows >= columns[0]) & (rows <= columns[-1])
        return (rows - columns[0]).clamp(0, len(columns) - 1), inside, inside * 2 * self.share[rows]


def _number_of_matches(ids: list[Tensor]) -> Tensor:
    """Number of pairs that match each pair, itself included: int64 (G,), from one or two kinds of ids int64 (G,)."""
    places, counts = zip(*map(_place_and_count, ids), strict=True)
    if len(ids) == 1:
        return counts[0]
    both = _place_and_count(places[0] * len(places[0]) + places[1])[1]  # pairs that share image and text
    return counts[0] + counts[1] - both


def _place_and_count(x: Tensor) -> tuple[Tensor, Tensor]:
    ordered = x.sort().values
    first = torch.searchsorted(ordered, x)
    return first, torch.searchsorted(ordered, x, right=True) - first


def forward(
    image: Tensor, text: Tensor, log_scale: Tensor, bias: Tensor | None, rows: Tensor, image_id: Tensor | None,
    text_id: Tensor | None, shared: bool, keys: Tensor | None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Terms (n,), log-sum-exp of columns (G,) and of rows (n,), and what has no gradient.

    That is the largest logit, and the largest of a right pair, of rows (2, n) and of columns (2, G); and the draws: of
    rows the columns int64 (n,), of columns scores (G,) and rows int64 (G,).
    """
    dtype = compute_dtype(image.dtype, text.dtype)
    pairs = Pairs(rows, len(text), image_id, text_id, shared, bias is not None, dtype)
    options = {"dtype": dtype, "device": image.device}
    of_rows, of_columns = (torch.full((2, len(x)), LOWEST, **options) for x in (image, text))
    score, column_score = (torch.full((len(x),), LOWEST, **options) for x in (image, text))
    total, right, column_total = (torch.zeros(len(x), **options) for x in (image, image, text))
    (top, best), (column_top, column_best) = of_rows, of_columns
    drawn, column_drawn, scale = rows.clone(), pairs.columns.clone(), log_scale.exp().to(dtype)
    for r, c in pairs.blocks():
        x = _product(image[r], text[c].T).mul_(scale)
        matches = pairs.matches(r, c) if shared or keys is not None else None
        if keys is not None:
            own, other = rows[r, None], pairs.columns[c]
            _draw(score[r], drawn[r], 1, x, matches, gumbel_noise(keys[0], own, other), other)
            _draw(column_score[c], column_drawn[c], 0, x, matches, gumbel_noise(keys[1], other, own), rows[r])
        x = x if bias is None else x.add_(bias)
        if matches is not None and shared:
            right[r] += (pairs.weights(matches, r, c) * x).sum(1)
            of_right = x.masked_fill(~matches, LOWEST)
            _maximum(best[r], of_right.amax(1))
            _maximum(column_best[c], of_right.amax(0))
        else:
            place, inside, weight = pairs.own(r, c)
            own = x.gather(1, place)
            right[r] += (own * weight).squeeze(1)
            _maximum(best[r], own.masked_fill(~inside, LOWEST).squeeze(1))
        if bias is None:
            _add_exponentials(top[r], total[r], x, 1)
            _add_exponentials(column_top[c], column_total[c], x, 0)
        else:
            _maximum(top[r], x.amax(1))
            _maximum(column_top[c], x.amax(0))
            total[r] -= F.logsigmoid(x.neg_()).sum(1)  # of all pairs as wrong ones, which `right` corrects
    if not shared:
        column_best.index_copy_(0, rows, best)
    lse = total if bias is not None else total.log_().add_(top)
    column_lse = column_total if bias is not None else column_total.log_().add_(column_top)
    return lse - right, column_lse, lse, of_rows, of_columns, drawn, column_score, column_drawn


def backward(
    grad: Tensor, column_grad: Tensor, image: Tensor, text: Tensor, log_scale: Tensor, bias: Tensor | None,
    rows: Tensor, image_id: Tensor | None, text_id: Tensor | None, shared: bool, lse: Tensor, column_lse: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of image, text, log_scale and bias (0 for InfoNCE), from those of terms (n,) and of columns (G,)."""
    pairs = Pairs(rows, len(text), image_id, text_id, shared, bias is not None, lse.dtype)
    scale = log_scale.exp().to(lse.dtype)

    def of_block(r: slice, c: slice) -> tuple[Tensor, Tensor | None]:
        x = _product(image[r], text[c].T).mul_(scale)
        if bias is None:
            dx = torch.sub(x, lse[r, None]).exp_().mul_(grad[r, None])
            dx += x.sub_(column_lse[c]).exp_().mul_(column_grad[c])
        else:
            dx = x.add_(bias).sigmoid_().mul_(grad[r, None])
        if shared:
            dx -= pairs.weights(pairs.matches(r, c), r, c).mul_(grad[r, None])
        else:
            place, _, weight = pairs.own(r, c)
            dx.scatter_(1, place, dx.gather(1, place) - weight * grad[r, None])
        return dx, None if bias is None else dx.sum()

    return gradients(image, text, scale, log_scale, pairs.blocks(), of_block)


def gradients(
    image: Tensor, text: Tensor, scale: Tensor, log_scale: Tensor, of_blocks: Iterable[tuple[slice, slice]],
    of_block: Callable[[slice, slice], tuple[Tensor, Tensor | None]],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of image, text, log_scale and bias from those of the logits.

    of_block: gradients of the logits of a block (R, C), before they are divided by scale, and their sum if a bias
    learns. They are in the dtype of scale, or rounded to that of both embeddings.
    """
    d_image, d_text = (torch.zeros(x.shape, dtype=scale.dtype, device=x.device) for x in (image, text))
    d_bias = torch.zeros(log_scale.shape, dtype=scale.dtype, device=scale.device)
    for r, c in of_blocks:
        dx, of_bias = of_block(r, c)
        if of_bias is not None:
            d_bias += of_bias
        _add_product(d_image[r], dx, text[c])
        _add_product(d_text[c], dx.T, image[r])
    # A logit is its own derivative by log_scale: sum dx x = sum image d_image.
    d_image, d_text = d_image.mul_(scale), d_text.mul_(scale)
    d_scale = (d_image * image).sum().reshape(log_scale.shape)
    return d_image.to(image.dtype), d_text.to(text.dtype), d_scale.to(log_scale.dtype), d_bias


def _maximum(most: Tensor, x: Tensor) -> None:
    torch.maximum(most, x, out=most)


def _add_exponentials(top: Tensor, total: Tensor, x: Tensor, dim: int) -> None:
    """Add exponentials of x (R, C) over a dimension to sums that are divided by exp(top), the largest logit so far."""
    most = torch.maximum(top, x.amax(dim))
    total.mul_((top - most).exp_()).add_((x - most.unsqueeze(dim)).exp_().sum(dim))
    top.copy_(most)


def _draw(
    score: Tensor, drawn: Tensor, dim: int, x: Tensor, matches: Tensor | None, noise: Tensor, numbers: Tensor
) -> None:
    """Keep the largest noisy logits of pairs that do not match, and their numbers; the first of equal ones."""
    assert matches is not None
    noisy = noise.add_(x) if noise.dtype == x.dtype else noise + x
    most, place = noisy.masked_fill_(matches, LOWEST).max(dim)
    better = most > score
    drawn.copy_(torch.where(better, numbers[place], drawn))
    score.copy_(torch.where(better, most, score))


def _in_16_bits(a: Tensor, b: Tensor) -> bool:
    """True for products of bfloat16 on a GPU, whose sums are float32. Other products are in float32 or float64."""
    return a.is_cuda and a.dtype == b.dtype == torch.bfloat16


def _product(a: Tensor, b: Tensor) -> Tensor:
    if _in_16_bits(a, b):
        return torch.mm(a, b, out_dtype=torch.float32)
    dtype = compute_dtype(a.dtype, b.dtype)
    return torch.mm(a.to(dtype), b.to(dtype))


def _add_product(out: Tensor, dx: Tensor, x: Tensor) -> None:
    if _in_16_bits(x, x):
        out += torch.mm(dx.to(x.dtype), x, out_dtype=torch.float32)
    else:
        out.addmm_(dx.to(out.dtype), x.to(out.dtype))
