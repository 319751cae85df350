"""Fifty steps of training with and without the swaps: the same losses."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

timm = pytest.importorskip("timm")
pytest.importorskip("transformers")

from transformers import BertConfig, BertForMaskedLM, BertLMHeadModel  # noqa: E402

from mvlm_kernels import use_backend  # noqa: E402
from mvlm_kernels.integrations import blocks  # noqa: E402
from mvlm_kernels.integrations import timm as for_timm  # noqa: E402
from mvlm_kernels.integrations import transformers as for_transformers  # noqa: E402
from mvlm_kernels.integrations.calls import SwapReport, recorded_calls  # noqa: E402

STEPS = 50
BERT: dict[str, Any] = {
    "vocab_size": 99, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128,
    "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
}  # fmt: skip


def padding(batch: int, length: int) -> Tensor:
    """bool (batch, length), True = the token exists."""
    return torch.arange(length) < torch.randint(2, length + 1, (batch, 1))


class Vit(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.vit = timm.models.VisionTransformer(
            img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=2, num_classes=5
        )

    def forward(self) -> Tensor:
        return nn.functional.cross_entropy(self.vit(torch.rand(4, 3, 32, 32)), torch.randint(5, (4,)))


class Bert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bert = BertForMaskedLM(BertConfig(**BERT))

    def forward(self) -> Tensor:
        ids, exists = torch.randint(99, (4, 12)), padding(4, 12)
        return self.bert(ids, exists.long(), labels=ids.masked_fill(~exists, -100)).loss


class Captioner(nn.Module):
    """BLIP's text decoder: causal self-attention, and cross-attention to an image's states."""

    def __init__(self) -> None:
        super().__init__()
        self.text = BertLMHeadModel(BertConfig(**BERT, is_decoder=True, add_cross_attention=True))
        self.image = nn.Linear(32, 64)

    def forward(self) -> Tensor:
        ids, image, exists = torch.randint(99, (4, 12)), self.image(torch.randn(4, 20, 32)), padding(4, 20)
        return self.text(ids, encoder_hidden_states=image, encoder_attention_mask=exists.long(), labels=ids).loss


def trained(build: Callable[[], nn.Module], swap: Callable[[nn.Module], SwapReport] | None) -> list[float]:
    torch.manual_seed(0)
    model = build().train()
    if swap is not None:
        assert swap(model).swapped
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for step in range(STEPS):
        torch.manual_seed(step)
        loss = model()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


@pytest.fixture(autouse=True)
def one_backend() -> Iterator[None]:
    with use_backend("torch"):
        yield


def both(swap: Callable[[nn.Module], SwapReport]) -> Callable[[nn.Module], SwapReport]:
    """The swap, and that of residual norms and feed-forward layers."""

    def swap_both(model: nn.Module) -> SwapReport:
        assert blocks.swap_blocks(model).swapped
        return swap(model)

    return swap_both


@pytest.mark.extended
@pytest.mark.slow
@pytest.mark.plain_empty
@pytest.mark.parametrize(
    "build, swap, fused",
    [
        (Vit, for_timm.swap, None),
        (Vit, both(for_timm.swap), None),
        (Bert, for_transformers.swap, 2 * STEPS),
        (Bert, both(for_transformers.swap), 2 * STEPS),
        (Captioner, for_transformers.swap, 2 * STEPS),
        (Captioner, both(for_transformers.swap), 2 * STEPS),
    ],
    ids=["vit", "vit-blocks", "bert", "bert-blocks", "captioner", "captioner-blocks"],
)
def test_losses_of_fifty_steps_are_equal(build: Callable[[], nn.Module], swap: Any, fused: int | None):
    wanted = trained(build, None)
    with recorded_calls() as calls:
        got = trained(build, swap)
    assert fused is None or sum(not call.reasons for call in calls) == fused
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
    assert wanted[-1] != wanted[0]
