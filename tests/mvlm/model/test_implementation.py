"""Both implementations of the training step against their common interface."""

import inspect
from typing import get_type_hints

import pytest
import torch

from mvlm.model.implementation import Implementation
from mvlm.model.maskvlm import IMPLEMENTATIONS
from support.models import micro_batch, micro_model

FUNCTIONS = [name for name, member in vars(Implementation).items() if inspect.isfunction(member) and name[0] != "_"]


def test_the_interface_has_the_functions_of_a_step() -> None:
    assert FUNCTIONS == [
        "encode",
        "encode_unmasked",
        "encode_tokens",
        "language_loss",
        "image_loss",
        "conditioned_similarity",
        "fuse_pairs",
    ]


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("plan", IMPLEMENTATIONS)
def test_an_implementation_has_the_parameters_of_the_interface(plan: str, name: str) -> None:
    wanted, found = getattr(Implementation, name), getattr(IMPLEMENTATIONS[plan], name)
    _, *parameters = inspect.signature(wanted).parameters.values()  # without self
    assert list(inspect.signature(found).parameters.values()) == parameters
    assert get_type_hints(found) == get_type_hints(wanted)


@pytest.mark.parametrize("plan", IMPLEMENTATIONS)
def test_unmasked_inputs_are_encoded_alike_with_and_without_the_masked_ones(plan: str) -> None:
    model, (batch, masks) = micro_model(), micro_batch()
    implementation = IMPLEMENTATIONS[plan]
    with torch.no_grad():
        streams = implementation.encode(model, batch, masks)
        image, text = implementation.encode_unmasked(model, batch)
    torch.testing.assert_close(image, streams.image, rtol=0, atol=1e-12)
    torch.testing.assert_close(text.rows, streams.text.rows, rtol=0, atol=1e-12)
