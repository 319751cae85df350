"""Contenders of another method against the paper's losses on the same batch."""

import numpy as np
import pytest
import torch

from mvlm.model.maskvlm import MaskVLM
from mvlm_benchmarks.step.contenders import OTHER_METHODS, make_contenders, make_inputs
from support.benchmarks import micro_config


def test_another_method_shares_weights_and_the_losses_of_whole_images() -> None:
    torch.manual_seed(0)
    model = MaskVLM(micro_config())
    inputs = make_inputs(model, np.array([9, 7, 8]), torch.device("cpu"))
    fast, *others = (x.losses(inputs) for x in make_contenders(("fast", *OTHER_METHODS), model, optimizer=False))
    found = dict(zip(OTHER_METHODS, others, strict=True))
    for name in ("masked_rows", "itc_itm"):  # their images are whole but in MIM's pass
        for term in ("itc", "itm"):
            assert found[name][term].item() == pytest.approx(fast[term].item(), rel=1e-5)
    assert found["masked_rows"].mlm.item() == pytest.approx(fast.mlm.item(), rel=1e-5)
    assert found["masked_rows"].mim.item() != pytest.approx(fast.mim.item(), rel=1e-5)
    assert found["itc_itm"].total.item() == pytest.approx((fast.itc + fast.itm).item(), rel=1e-5)
