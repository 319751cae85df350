"""Packed sequences: rows of sequences of different lengths, one sequence after another, and their places when padded.

Shape legend: B sequences, T packed rows, L rows of a padded sequence.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from mvlm_kernels import registration

Made = TypeVar("Made")


class Layout(NamedTuple):
    """Places of packed rows (T, ...) among padded ones (B, L, ...)."""

    sequence_of_row: Tensor
    """int64 (T,), the sequence of each row; B for a padding row, which belongs to no sequence."""
    padded_index: Tensor
    """int64 (T,), place of each row among the padded rows (B*L,); B*L for a row without a place."""
    packed_index: Tensor
    """int64 (B*L,), row of each place; T where there is none. The inverse of padded_index."""
    exists: Tensor
    """bool (B, L), True = a row of the sequence, False = padding."""
    padding_rows: bool
    """False if there are surely no padding rows."""

    def pad(self, x: Tensor) -> Tensor:
        """Pad rows (T, ...) with zeros -> (B, L, ...)."""
        moved: Any = _MoveRows.apply(x, self.packed_index, self.padded_index, True, self.padding_rows)
        return moved.unflatten(0, self.exists.shape)

    def unpad(self, x: Tensor) -> Tensor:
        """The inverse of `pad`: (B, L, ...) -> (T, ...). Padding rows are zero."""
        moved: Any = _MoveRows.apply(x.flatten(0, 1), self.padded_index, self.packed_index, self.padding_rows, True)
        return moved


def layout_of(cu_seqlens: Tensor, longest: int, total: int) -> Layout:
    """Layout of `total` packed rows, of which cu_seqlens[b] to cu_seqlens[b + 1] are sequence b, padded to `longest`.

    cu_seqlens: int (B + 1,), rising from 0 on. Everything is computed on its device.
    """
    bounds, sequences = cu_seqlens.long(), len(cu_seqlens) - 1
    rows = torch.arange(total, device=bounds.device)
    sequence = torch.searchsorted(bounds[1:], rows, right=True)
    # The bounds have B + 1 entries, so padding rows (sequence B) have a start too.
    position = rows - bounds.index_select(0, sequence)
    has_place = (sequence < sequences) & (position < longest)
    padded_index = torch.where(has_place, sequence * longest + position, sequences * longest)
    positions = torch.arange(longest, device=bounds.device)
    exists = positions < bounds.diff()[:, None]
    packed_index = torch.where(exists, bounds[:-1, None] + positions, total).flatten()
    known = bounds.device.type == "cpu" and not torch.compiler.is_compiling()
    return Layout(sequence, padded_index, packed_index, exists, not known or int(bounds[-1]) < total)


class _MoveRows(torch.autograd.Function):
    """Row i of the result is row source[i] of x, or zeros if source[i] is past its end.

    `back` is the inverse of `source`. The gradient is therefore the opposite move: no sum, because each row has one
    place. `zeros` and `back_zeros` are False if surely no index is past the end.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, source: Tensor, back: Tensor, zeros: bool, back_zeros: bool) -> Tensor:
        ctx.save_for_backward(source, back)
        ctx.zeros, ctx.back_zeros = zeros, back_zeros
        # On a CPU a gather from rows with one of zeros behind them is ten times as fast as a scatter of rows.
        rows = torch.cat([x, x.new_zeros(1, *x.shape[1:])]) if zeros else x
        return rows.index_select(0, source)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, None, None, None, None]:
        source, back = ctx.saved_tensors
        return _MoveRows.apply(grads[0], back, source, ctx.back_zeros, ctx.zeros), None, None, None, None


_kept: Any = WeakIdKeyDictionary()  # tensor -> (its version, {key: what was made of it})


def kept_with(x: Tensor, key: Any, make: Callable[[], Made]) -> Made:
    """Result of `make` for the values of x, computed once for all calls with this key until x is written to or freed.

    Made anew where a graph is traced, and in a CUDA graph, whose replays have other values in the same tensor.
    """
    plain = registration.called_directly(x) and not x.is_inference()
    if not plain or (x.is_cuda and torch.cuda.is_current_stream_capturing()):
        return make()
    version, found = _kept.get(x, (None, {}))
    if version != x._version:
        found = {}
        _kept[x] = x._version, found
    if key not in found:
        with torch.inference_mode(False):  # what is made there could not be saved for a later backward pass
            found[key] = make()
    return found[key]
