"""Bytes of a step by kind: each operation has one kind, and the kinds add up."""

from collections import Counter
from typing import Any
from unittest.mock import patch

import pytest
import torch

from mvlm.config.model import MaskVLMConfig
from mvlm.model.maskvlm import MaskVLM
from mvlm_benchmarks.step.traffic import KINDS, REST, Traffic, count, kind_of, rows


@pytest.mark.parametrize(
    "name, kind",
    [
        ("addmm", "products"),
        ("add_layer_norm_backward", "norms"),
        ("gelu_backward", "GELU"),
        ("_scaled_dot_product_flash_attention_for_cpu", "attention"),
        ("cross_attention_backward", "attention"),
        ("_to_copy", "casts and copies"),
        ("_fused_adamw_", "optimizer"),
        ("add", REST),
    ],
)
def test_an_operation_has_the_kind_of_its_name(name: str, kind: str) -> None:
    assert kind_of(name) == kind


def test_bytes_and_operations_against_a_count_by_hand() -> None:
    a, b = torch.zeros(4, 8), torch.zeros(8, 16)
    with Traffic() as traffic:
        c = a @ b
        c.T.to(torch.bfloat16)  # the view is free
        _ = c + c[:1].expand(4, 16)  # an expanded dimension counts once
    assert traffic.bytes == {
        "products": 4 * (4 * 8 + 8 * 16 + 4 * 16),
        "casts and copies": 4 * 16 * (4 + 2),
        REST: 4 * (64 + 16 + 64),
    }
    assert traffic.flops == 2 * 4 * 8 * 16


def test_what_is_only_written_and_what_is_not_selected_is_not_read() -> None:
    table, ids, out = torch.zeros(1000, 4), torch.tensor([3, 5]), torch.zeros(6)
    with Traffic() as traffic:
        out.copy_(torch.ones(6))  # the ones are filled, written once, then read; `out` is written
        table.new_zeros(5)
        torch.zeros_like(out)
        table.index_select(0, ids)
        torch.nn.functional.embedding(ids, table)
        torch.ops.aten._foreach_zero_([out])
    assert traffic.bytes["casts and copies"] == 4 * 12 + 4 * 5 + 4 * 6 + 2 * (2 * 4 * 8 + 2 * 8)
    assert traffic.bytes[REST] + traffic.bytes["optimizer"] == 4 * 6 + 4 * 6


def test_an_optimizer_reads_four_tensors_and_writes_three_of_them() -> None:
    weight = torch.nn.Parameter(torch.zeros(100, 10))
    optimizer = torch.optim.AdamW([weight], fused=True)
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    with Traffic() as traffic:
        optimizer.step()
    # Weight, gradient and two moments are read; weight and moments are written. The rest is the count of the steps.
    assert traffic.bytes["optimizer"] == pytest.approx(7 * 4 * 1000, abs=20)


@pytest.mark.slow
def test_a_step_has_operations_of_every_kind() -> None:
    counted: Counter[str] = Counter()
    gelu_outputs: set[int] = set()

    class ByName(Traffic):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            counted[func.name().partition(".")[0]] += 1
            out = super().__torch_dispatch__(func, types, args, kwargs)
            if func.name().startswith("mvlm_kernels::gelu_backward"):
                gelu_outputs.add(sum(1 for x in out[:2] if x.numel()))
            return out

    with patch("mvlm_benchmarks.step.traffic.Traffic", ByName):
        table = rows(count("tiny", 4))
    assert [row["kind"] for row in table] == [*KINDS, REST]
    assert all(row["operations"] > 0 and row["gigabytes"] >= 0 for row in table)
    # A GPU computes the GELU again in backward. It reads h and the gradient, and writes both of their results.
    assert gelu_outputs == {2}
    # The optimizer's state is two tensors a parameter, which only the first step of a run fills with zeros.
    parameters = len(list(MaskVLM(MaskVLMConfig.preset("tiny")).parameters()))
    assert counted["aten::_fused_adamw_"] == 1
    assert counted["aten::zeros_like"] < parameters
