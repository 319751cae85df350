"""Both implementations of the training step against their common interface."""

import pytest
import torch

from mvlm.model.maskvlm import IMPLEMENTATIONS
from support.models import micro_batch, micro_model


@pytest.mark.parametrize("plan", IMPLEMENTATIONS)
def test_unmasked_inputs_are_encoded_alike_with_and_without_the_masked_ones(plan: str) -> None:
    model, (batch, masks) = micro_model(), micro_batch()
    implementation = IMPLEMENTATIONS[plan]
    with torch.no_grad():
        streams = implementation.encode(model, batch, masks)
        image, text = implementation.encode_unmasked(model, batch)
    torch.testing.assert_close(image, streams.image, rtol=0, atol=1e-12)
    torch.testing.assert_close(text.rows, streams.text.rows, rtol=0, atol=1e-12)
