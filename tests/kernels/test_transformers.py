"""A BERT cross-attention layer gives the same output with attn_implementation="mvlm" as with transformers' own."""

from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")

from transformers import BertConfig  # noqa: E402
from transformers.masking_utils import create_bidirectional_mask  # noqa: E402
from transformers.models.bert.modeling_bert import BertCrossAttention, BertSelfAttention  # noqa: E402

from mvlm_kernels import use_backend  # noqa: E402
from mvlm_kernels.integrations.transformers import register  # noqa: E402


def config(implementation: str, **changes: Any) -> BertConfig:
    register()
    settings: dict[str, Any] = {
        "hidden_size": 64,
        "num_attention_heads": 2,
        "attention_probs_dropout_prob": 0.0,
        **changes,
    }
    made = BertConfig(**settings)
    made._attn_implementation = implementation
    return made


def outputs(layer_class: type, padding: torch.Tensor | None, **changes: Any) -> list[torch.Tensor]:
    """Output of one layer under SDPA and under ours, with the mask that transformers makes for each."""
    torch.manual_seed(0)
    hidden, encoded = torch.randn(3, 9, 64), torch.randn(3, 7, 64)
    cross = layer_class is BertCrossAttention
    found = []
    for implementation in ("sdpa", "mvlm"):
        made = config(implementation, **changes)
        torch.manual_seed(1)
        layer = layer_class(made).eval()
        extra: dict[str, Any] = {"encoder_hidden_states": encoded} if cross else {}
        mask = create_bidirectional_mask(config=made, inputs_embeds=hidden, attention_mask=padding, **extra)
        if implementation == "mvlm" and padding is not None:
            assert mask is not None
            assert mask.shape == padding.shape  # never (batch, 1, queries, keys)
        found.append(layer(hidden, attention_mask=mask, **extra)[0])
    return found


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_cross_attention_with_key_padding(backend: Any):
    padding = torch.arange(7) < torch.tensor([[7], [3], [1]])
    with use_backend(backend):
        torch.testing.assert_close(*outputs(BertCrossAttention, padding.long()))
        torch.testing.assert_close(*outputs(BertCrossAttention, None))


def test_self_attention_and_what_the_op_leaves_to_sdpa():
    padding = (torch.arange(9) < torch.tensor([[9], [3], [5]])).long()
    torch.testing.assert_close(*outputs(BertSelfAttention, padding))
    torch.testing.assert_close(*outputs(BertSelfAttention, padding, num_attention_heads=4))  # width 16
