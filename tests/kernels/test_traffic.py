"""Bytes that the kernels move, counted in the interpreter: within a few per cent of the fewest possible."""

import json

import pytest
import torch

from mvlm_kernels import cases, linear_pixel_loss, traffic
from mvlm_kernels.cases import Case
from mvlm_kernels.pixel_loss.tiling_bytes import linear_tiling_bytes

CASES = {f"{case.op} {case.shape}": case for case in cases.cases()}
DIRECT = [name for name, case in CASES.items() if case.moved is None]


@pytest.mark.slow
@pytest.mark.plain_empty
@pytest.mark.parametrize("name", DIRECT)
def test_kernels_move_few_bytes_beyond_the_minimum(name):
    case = CASES[name]
    forward, backward = traffic.moved(case)
    fewest_forward, fewest_backward = case.minimum(case.sizes)
    assert fewest_forward <= forward * 1.001
    assert forward <= 1.05 * fewest_forward
    assert backward <= 1.10 * fewest_backward


@pytest.mark.slow
@pytest.mark.plain_empty
@pytest.mark.parametrize("kind", ["l1", "mse"])
def test_bytes_of_linear_pixel_loss_follow_from_its_tiling(kind):
    """147 pixels, width 70 and 66 rows give partial tiles on every side."""
    bf16 = torch.bfloat16
    hidden, weight = torch.zeros(6, 11, 70, dtype=bf16), torch.zeros(147, 70, dtype=bf16)
    leaves = [x.requires_grad_() for x in (hidden, weight, torch.zeros(147, dtype=bf16))]
    images = torch.zeros(6, 3, 28, 28, dtype=torch.uint8)
    ids = torch.arange(11, dtype=torch.int32).expand(6, 11).contiguous()
    case = Case(
        "linear_pixel_loss", "", {}, {},
        lambda *_: (leaves, lambda h, w, b: linear_pixel_loss(h, w, b, images, ids, 7, kind=kind)),
        lambda *_: (leaves, lambda *_: leaves[0]), lambda _: (1, 1),
    )  # fmt: skip
    got = traffic.measure(case, {})
    for counted, implied in zip(got, linear_tiling_bytes(66, 147, 70, kind), strict=True):
        assert counted == pytest.approx(implied, rel=0.02)


@pytest.mark.plain_empty
def test_traffic_table_names_every_figure(tmp_path, monkeypatch, capsys):
    path = tmp_path / "traffic.json"
    monkeypatch.setattr("sys.argv", ["traffic", "--json", str(path), "--select", "linear_pixel_loss.*l1"])
    traffic.main()
    rows = json.loads(path.read_text())["rows"]
    assert [row["pass"] for row in rows] == ["forward", "backward"]
    for row in rows:
        assert {"op", "shape", "bytes_moved", "bytes_minimum", "ratio", "torch_bytes", "roofline_us"} <= set(row)
        assert set(row["roofline_us"]) == {"A100", "H100", "H200", "B200"}
        assert row["torch_bytes"] > row["bytes_minimum"]
    assert "NVIDIA H100" in capsys.readouterr().out
