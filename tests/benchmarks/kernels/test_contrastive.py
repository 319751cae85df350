"""The contrastive losses of the benchmark are one loss, and the counts of its table are those of its definitions."""

import importlib
import re

import pytest

from mvlm_benchmarks.kernels import contrastive


@pytest.mark.slow
def test_all_implementations_have_one_loss():
    """Where a rank has all pairs: InfoNCE, and the sigmoid loss."""
    pairs = contrastive.Pairs(12, 12, 8)
    for name, loss in contrastive.contenders(pairs).items():
        sigmoid = "sigmoid" in name or "SigLip" in name
        wanted = contrastive.two_directions(pairs, 5, draw=False, sigmoid=sigmoid)
        assert loss().item() == pytest.approx(wanted.item(), rel=1e-5), name


@pytest.mark.slow
def test_the_table_counts_products(monkeypatch, capsys):
    monkeypatch.setattr(
        "sys.argv", ["contrastive", "--rows", "256", "--columns", "512", "--width", "8", "--repeats", "1"]
    )
    contrastive.main()
    printed = capsys.readouterr().out
    rows = re.findall(r"^(\D.*?)  +(\d+\.\d\d) +\d+ +\d+ +\d+\.\d\d$", printed, re.M)
    products = {name: float(number) for name, number in rows}
    assert products["contrastive_terms"] == products["contrastive_terms, with draws"] == 4
    assert products["two directions, logits kept"] == 6
    assert products["two directions, blocks of 128 rows"] == 8


def test_kernels_multiply_as_often_as_torch_and_move_less():
    """A logit is in no memory forward, and backward its gradient is written once and read twice: 12 bytes."""
    kernels = importlib.import_module("mvlm_kernels.contrastive_loss.triton")
    for draw, sigmoid in ((False, False), (True, False), (False, True)):
        by_torch, found = (
            contrastive.count_on_gpu(by, 512, 32768, 256, draw, sigmoid) for by in (contrastive.reference, kernels)
        )
        assert found[0] == by_torch[0] == 4
        assert 12 < found[1] < by_torch[1] / 4
        assert found[2] < by_torch[2] / 4
        assert found[3] < by_torch[3] / 4
        assert found[4] <= by_torch[4]
