"""Kernels of other libraries beside ours: their launches by name, trips and warps by hand, and the committed table."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mvlm_benchmarks.kernels import bounds, others

ROOT = Path(__file__).parents[3]


def test_arguments_of_a_launch_are_in_the_kernels_order() -> None:
    kernel = SimpleNamespace(__name__="norm", arg_names=["X", "BIAS", "N"])
    assert others.launch(kernel, (7,), 4, N=3, X="x") == (kernel, (7,), ("x", None, 3), {"num_warps": 4})
    with pytest.raises(TypeError, match="norm has no arguments EPS: it is of another version"):
        others.launch(kernel, (7,), 4, X="x", EPS=1e-6)


def test_rows_are_the_trips_of_backward_loops_alone() -> None:
    assert others.loops({"M": 100, "rows_per_program": 13}, (8,), {}) == (12.5,)
    assert others.loops({"n_rows": 100, "rows_per_program": 13}, (8,), {}) == (12.5,)
    assert others.loops({"M": 100}, (100,), {}) == ()


def test_fewest_instructions_without_a_spill_count(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = {1: (5, 64), 2: (9, 0), 4: (7, 0), 8: (8, 0)}  # instructions and bytes spilled, by warps

    def machine(launched: Any, *_: Any) -> dict[str, int]:
        return dict(zip(("instructions", "spilled"), counts[launched[0][3]["num_warps"]], strict=True))

    monkeypatch.setattr(bounds, "machine", machine)
    launched: Any = [("kernel", (1,), (), {"num_warps": 4})]
    assert others.fewest(launched, (1, 2, 4, 8), "sm_90", None) == {"instructions": 7, "spilled": 0, "warps": 4}
    assert others.fewest(launched, (), "sm_90", None)["warps"] == 4


def test_the_committed_table_has_both_passes_of_every_peer() -> None:
    """Bytes of a value follow from the dtypes: a norm alone in bfloat16 reads and writes two, its gradient six."""
    table = json.loads((ROOT / "benchmarks" / "results" / "bounds-others.json").read_text())["rows"]
    names = [(peer.what, name, peer.name) for peer in others.PEERS for name in ("forward", "backward")]
    assert [(row["what"], row["pass"], row["whose"]) for row in table] == names
    alone = [row for row in table if row["what"] == "LayerNorm alone, bfloat16"]
    assert [row["bytes_theirs"] for row in alone] == pytest.approx([4, 6], rel=0.02)
    for row in table:
        assert not any(count["spilled"] for machine in row["machine"].values() for count in machine.values())
