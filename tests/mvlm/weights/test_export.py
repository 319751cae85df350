# torch and transformers type the children of a module as Tensor or Module, whatever they are.
# pyright: reportCallIssue=false, reportAttributeAccessIssue=false, reportArgumentType=false
# pyright: reportOptionalMemberAccess=false
"""Exported encoders in the models of timm and transformers."""

import pytest
import torch

import mvlm.weights as weights
from support.encoders import (
    assert_same_image_features,
    assert_same_text_features,
    hf_text,
    hf_vit,
    normalized,
    timm_vit,
)
from support.models import micro_batch, micro_model


@pytest.mark.parametrize("library", ["timm", "transformers"])
def test_an_exported_image_encoder_computes_the_same_and_loads_back(library):
    model, images = micro_model(3), micro_batch()[0].images
    if library == "timm":
        tensors, theirs = weights.export_timm_vit(model), timm_vit()
        theirs.load_state_dict(tensors)
        assert_same_image_features(model, theirs)
    else:
        theirs, tensors = hf_vit(), weights.export_hf_vit(model)
        theirs.load_state_dict(tensors)
        with torch.no_grad():
            found = theirs(normalized(model.config, images)).last_hidden_state
        torch.testing.assert_close(found, model.encode_image(images).detach(), rtol=0, atol=1e-10)
    other = micro_model(4)
    weights.load_image_weights(other, tensors)
    for name, parameter in model.image_encoder.named_parameters():
        if name != "mask_token":
            assert torch.equal(other.image_encoder.get_parameter(name), parameter), name


@pytest.mark.parametrize("kind", ["Roberta", "Bert"])
def test_an_exported_text_encoder_computes_the_same_in_transformers(kind):
    model = micro_model(3)
    theirs = hf_text(kind, max_position_embeddings=14 if kind == "Roberta" else 12)
    export = weights.export_hf_roberta if kind == "Roberta" else weights.export_hf_bert
    theirs.load_state_dict(export(model))
    assert_same_text_features(model, theirs)
