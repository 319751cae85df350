"""Attention kernels broken on purpose: the checks of this suite must notice each one, or they prove nothing.

A mutant is a copy of the kernels' source with one line changed, loaded in place of the original. Each is a plausible
mistake: a dropped mask, an off-by-one length, an unwritten tile, splits that overwrite each other.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from mvlm_kernels import cross_attention, dispatch, use_backend
from mvlm_kernels.cross_attention.cases import SIDES, Shape
from support.kernels import mutants
from support.kernels.attention import check_kernels, check_rows_in_front
from support.kernels.combinations import check, draw_call
from triton_proof.allocations import Poison

pytestmark = pytest.mark.slow


class Mutant(NamedTuple):
    """old -> new at the first occurrence after ``after`` in a module. ``check`` must then raise AssertionError."""

    module: str
    after: str
    old: str
    new: str
    check: Callable[[], None]
    multiprocessors: int  # of the simulated GPU: so many that work is split


PACKAGE = "mvlm_kernels.cross_attention"
# Each module imports those above it, so all of them are loaded again around a mutant.
MODULES = {
    "tile_io": ("existing_keys", "key_rows", "key_sequence", "readers_of", "sum_splits", "_elements", "kept"),
    "short_kv": ("short_kv_forward", "reader_backward", "short_kv_backward"),
    "long_kv": ("reader_backward_of_keys", "long_kv_backward"),
    "short_q": ("short_q_forward", "short_q_combine", "queries_backward", "short_q_backward", "short_q_backward_dq"),
    "launch": ("_new", "partials"),
}
MODULE_OF = {f"def {function}": module for module, functions in MODULES.items() for function in functions}


def attention(
    after: str, old: str, new: str, case: str, heads: int = 1, multiprocessors: int = 12,
    checked: Callable[[Shape], None] = check_kernels, seed: int = 0,
) -> Mutant:  # fmt: skip
    check = lambda: checked(replace(SIDES[case], heads=heads, seed=seed))  # noqa: E731
    return Mutant(MODULE_OF[after], after, old, new, check, multiprocessors)


def combined(after: str, old: str, new: str, number: int) -> Mutant:
    """A mutant that a drawn combination of features must notice."""
    drawn = draw_call(number)

    def check_on_kernels() -> None:
        with use_backend("triton"):
            check(drawn, cross_attention, lse=True)

    return Mutant(MODULE_OF[after], after, old, new, check_on_kernels, 0)


SHORT, LONG = 194, 5  # grouped heads, an index, dropout, of both kernel families
MUTANTS = {
    "columns past the head's width read": combined("def _elements", "if D == BLOCK_D", "if D > 0", SHORT),
    "keys of a quad in another order": combined("def kept", "tl.join(even, odd)", "tl.join(odd, even)", SHORT),
    "dropout of another head": combined("def kept", "h.to(tl.int32)", "(h * 0).to(tl.int32)", SHORT),
    "dropout of another sequence": combined("def kept", "b.to(tl.int32)", "(b * 0).to(tl.int32)", LONG),
    "dropout of the first tile everywhere": combined("def kept", "n0 // 4", "n0 * 0", LONG),
    "dropped probabilities leave the sum": combined(
        "def short_kv_forward", "tl.sum(p, 1)", "tl.sum(p * kept(dropout, b, h, rm, 0, False, BLOCK_N, ACC), 1)", SHORT
    ),
    "values of the query's head": combined(
        "def short_kv_forward", "v, kb, k_start, h // GROUP", "v, kb, k_start, h * 0", SHORT
    ),
    "gradient of one query head of the group": combined(
        "def short_kv_backward", "range(first * GROUP, last * GROUP)", "range(first * GROUP, last * GROUP, 2)", SHORT
    ),
    "another reader of the group": combined(
        "def short_kv_backward", "order_ptr + at // GROUP", "order_ptr + first", SHORT
    ),
    "dV without the dropout": combined("def reader_backward", "used = pt * factors", "used = pt", SHORT),
    "dP without the dropout": combined("def reader_backward", "dpt = dpt * factors", "dpt = dpt", SHORT),
    "long dV without the dropout": combined("def reader_backward_of_keys", "used = pt * factors", "used = pt", LONG),
    "dQ without the dropout": combined("def short_q_backward_dq", "dpt = dpt * kept(", "kept(", LONG),
    "long keys of the query's head": combined(
        "def short_q_forward", "k, kb, k_start, h // GROUP", "k, kb, k_start, h", LONG
    ),
    "length off by one": attention("def existing_keys", "rn < klen", "rn <= klen", "lengths"),
    "length ignored": attention("def key_rows", "if keys[0] is not None", "if False", "lengths"),
    "mask dropped": attention("def existing_keys", "if keys[1] is not None", "if False", "mask"),
    "mask word of the wrong key": attention("def existing_keys", "rn // 64", "rn // 128", "long-mask"),
    "padded values read": attention("def short_kv_forward", "v[2], exists", "v[2], rn < k_rows", "lengths"),
    "last query tile unwritten": attention(
        "def short_kv_forward", "tl.cdiv(q_len, BLOCK_M)", "q_len // BLOCK_M", "lengths"
    ),
    "store past the keys": attention("def short_kv_backward", "rn < stored", "rn <= stored", "lengths"),
    "store past the long keys": attention("def long_kv_backward", "rn < stored", "rn <= stored", "long-index"),
    "delta dropped": attention("def reader_backward", "pt * (dpt - delta[None, :])", "pt * dpt", "lengths"),
    "index ignored": attention("def key_sequence", "tl.load(keys[4] + b)", "tl.load(keys[4])", "index"),
    "order ignored in forward": attention("def short_q_forward", "tl.load(order_ptr + b)", "b * 0", "long-index"),
    "order ignored in dQ": attention("def short_q_backward_dq", "tl.load(order_ptr + b)", "b * 0", "long-index"),
    **{
        f"gradient of another key sequence, {case}": attention(
            "def readers_of", "return tl.load(spans_ptr + 3 * kb)", "return kb", case, seed=seed
        )
        # Seeds that draw an order of readers which is not the order of their keys.
        for case, seed in (("index", 4), ("long-index", 4))
    },
    "reader chunk too long": attention("def readers_of", "tl.minimum(last, first + chunk)", "last", "index", 2),
    "splits without partials": attention(
        "def short_kv_backward", "split.to(tl.int64) * partial_size", "kb * 0", "lengths"
    ),
    "first split forgotten": attention("def sum_splits", "range(num_splits)", "range(1, num_splits)", "lengths"),
    **{
        f"rows outside unwritten, {case}": attention(
            "def _new", "out.zero_() if packed", "out if packed", case, multiprocessors=0, checked=check_rows_in_front
        )
        for case in ("packed-q", "packed-k", "long-packed-q", "long-packed-k")
    },
    "rows outside of partial sums unwritten": attention(
        "def partials", "partial.zero_() if packed", "partial if packed", "packed-k"
    ),
    "online softmax without shrinking": attention(
        "def short_q_forward", "total * shrink + tl.sum", "total + tl.sum", "long-mask", multiprocessors=1
    ),
    "split weights swapped": attention(
        "def short_q_combine", "x * weight[:, None]", "x * shrink[:, None]", "long-lengths"
    ),
    "padded keys' gradient unwritten": attention(
        "def short_q_backward", "BLOCK_N, stored", "BLOCK_N, klen", "long-lengths"
    ),
    "unfinished output as delta": attention("def queries_backward", "widen(out_tile, ACC) * ", "", "long-lengths"),
    "delta of other queries": attention("def reader_backward_of_keys", "widen(out_tile, ACC) * ", "", "long-index"),
}


@pytest.mark.extended
@pytest.mark.parametrize("mutant", MUTANTS.values(), ids=MUTANTS.keys())
def test_broken_attention_kernel_is_caught(
    mutant: Mutant, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, poison: Poison
):
    monkeypatch.setattr(dispatch, "multiprocessors", lambda device: mutant.multiprocessors)
    mutant.check()
    poison.check()
    others = [f"{PACKAGE}.{name}" for name in MODULES if name != mutant.module]
    module = f"{PACKAGE}.{mutant.module}"

    def run() -> None:
        mutant.check()
        poison.check()

    # A wrong value may overflow. The comparison must see it, and not numpy's warning, which a GPU does not give.
    with (
        np.errstate(all="ignore"),
        mutants.mutant(module, mutant.after, mutant.old, mutant.new, tmp_path, others),
        pytest.raises((AssertionError, RuntimeError)),
    ):
        run()
    poison.buffers.clear()
