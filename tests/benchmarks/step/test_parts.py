"""The parts of a step, as the FLOP count sees them."""

import torch

from mvlm.costs.flops import counter
from mvlm_benchmarks.step.flops import PartCounter
from mvlm_benchmarks.step.parts import mark_part


def test_innermost_part_counts_except_inside_itm() -> None:
    x = torch.ones(2, 2)
    with counter() as total:
        parts = PartCounter(total.get_total_flops)
        with parts:
            torch.mm(x, x)
            with mark_part("ITM"):
                torch.mm(x, x)
                with mark_part("MIM cross"):
                    torch.mm(x, x)
            with mark_part("MIM cross"):
                torch.mm(x, x)
                with mark_part("decoder"):
                    torch.mm(x, x)
                torch.mm(x, x)
            torch.mm(x, x)
        parts.close()
    assert parts.counts == {"other": 2 * 16, "ITM": 2 * 16, "MIM cross": 2 * 16, "decoder": 16}
