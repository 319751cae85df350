"""Models explained: which calls the kernels would compute, on a GPU that is not there."""

from typing import Any

import pytest
import timm
import torch
from torch import nn
from transformers import BertConfig, BertModel, GPT2Config, GPT2Model, ViTConfig, ViTModel

from mvlm_kernels import explain_model
from mvlm_kernels.integrations.blocks import swap_blocks
from mvlm_kernels.integrations.calls import ModelExplanation
from mvlm_kernels.integrations.transformers import swap
from mvlm_kernels.layers import AddLayerNorm, CrossAttention, GeluLinear

SIZES: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
IDS, EXISTS = torch.zeros(2, 9, dtype=torch.long), (torch.arange(9) < torch.tensor([[9], [4]])).long()
TEXTS = {"input_ids": IDS, "attention_mask": EXISTS}


@pytest.fixture(autouse=True)
def compiling(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that compiles kernels: the suite interprets them, which is a reason against each."""
    monkeypatch.setattr("mvlm_kernels.dispatch.interpreting", lambda: False)


def bert() -> BertModel:
    return BertModel(BertConfig(vocab_size=99, **SIZES)).bfloat16().train()


def ops(found: ModelExplanation) -> list[tuple[str, bool]]:
    return [(call.op, not call.reasons) for call in found.calls]


def test_an_unswapped_model_is_explained_as_swapped_and_stays_as_it_is():
    model = bert()
    state, before = torch.get_rng_state(), model.config._attn_implementation
    found = explain_model(model, TEXTS, as_if="sm_90")
    layer = [("cross_attention", True), ("add_layer_norm", True), ("add_layer_norm", True)]
    assert ops(found) == layer * 2
    assert [call.path for call in found.calls[:2]] == [
        f"encoder.layer.0.attention.{part}" for part in ("self", "output")
    ]
    assert found.calls[0].shape == (2, 9, 2, 16)
    assert str(found).splitlines()[0] == "6 of 6 calls by kernels on sm_90"
    assert model.config._attn_implementation == before
    assert not any("Swapped" in str(type(part).__mro__) for part in model.modules())
    assert torch.equal(torch.get_rng_state(), state)  # its dropout draws from a copy


def test_a_swapped_model_is_explained_as_it_is():
    model = bert()
    report = swap(model)
    for found in (explain_model(model, (IDS, EXISTS), as_if="sm_90"), report.explain(TEXTS, as_if="sm_90")):
        assert ops(found) == [("cross_attention", True)] * 2
    report.undo()
    assert swap_blocks(model).explain(IDS, as_if="sm_90").fused == explain_model(model, IDS, as_if="sm_90").calls
    assert len(explain_model(model, IDS).fused) == 0  # of its own device, the CPU


@pytest.mark.parametrize("gpu, reason", [("sm_75", "compute capability 8.0"), ("sm_90", "197 queries")])
def test_a_swap_that_gains_nothing_says_why(gpu: str, reason: str):
    """Of ViT-B/16's lengths: all 197 patches attend to all."""
    model = ViTModel(ViTConfig(**SIZES)).bfloat16()
    images = torch.zeros(1, 3, 224, 224, dtype=torch.bfloat16)
    found = swap(model).explain(images, as_if=gpu)
    assert ops(found) == [("cross_attention", False)] * 2
    assert all(any(reason in text for text in call.reasons) for call in found.calls)
    assert "own code: 2 x cross_attention" in str(found)


def test_masks_and_dropout_that_no_op_computes_are_reasons():
    causal = GPT2Model(GPT2Config(vocab_size=99, n_embd=32, n_layer=1, n_head=2)).bfloat16()
    found = explain_model(causal, IDS, as_if="sm_90")
    assert [call.op for call in found.calls] == ["cross_attention"]
    assert "causal" in str(found.calls[0].reasons)
    dropping = timm.create_model("test_vit", img_size=64, proj_drop_rate=0.5).bfloat16().train()
    found = explain_model(dropping, torch.zeros(1, 3, 64, 64, dtype=torch.bfloat16), as_if="sm_90")
    assert {op for op, fused in ops(found) if fused} == {"gather_patches", "add_layer_norm"}
    assert {call.op for call in found.calls if "dropout" in str(call.reasons)} == {"gelu_linear"}


def test_a_model_without_known_parts_has_no_calls():
    found = explain_model(nn.Sequential(nn.Linear(3, 4)), torch.randn(2, 3), as_if="sm_90")
    assert not found.calls
    assert "no module is swapped" in str(found)
    with pytest.raises(ValueError, match="as_if"):
        explain_model(bert(), TEXTS, as_if="H100")


class OwnBlock(nn.Module):
    """A block of someone's own model, made of our layers."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.attention = AddLayerNorm(64, kind="rms"), CrossAttention(64, 4)
        self.up, self.down = nn.Linear(64, 256), GeluLinear(256, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x, normed = self.norm(x)
        x, normed = self.norm(x, self.attention(normed))
        return x + self.down(self.up(normed))


def test_layers_of_a_model_of_ones_own_are_explained():
    model = OwnBlock().bfloat16()
    x = torch.randn(2, 17, 64, dtype=torch.bfloat16)
    found = explain_model(model, x, as_if="sm_90")
    assert ops(found) == [
        ("add_layer_norm", True), ("cross_attention", True), ("add_layer_norm", True), ("gelu_linear", True)
    ]  # fmt: skip
    assert [call.path for call in found.calls] == ["norm", "attention", "norm", "down"]
    assert not ops(explain_model(nn.Linear(64, 4), torch.randn(2, 64), as_if="sm_90"))
