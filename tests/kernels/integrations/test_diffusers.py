"""Diffusers models with swapped attention processors, compared with diffusers' own."""

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("diffusers")

from diffusers.models.attention_processor import (
    Attention,
    AttnProcessor,
    AttnProcessor2_0,
    FusedAttnProcessor2_0,
    JointAttnProcessor2_0,
)
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

from mvlm_kernels import use_backend
from mvlm_kernels.dispatch import ON_CPU
from mvlm_kernels.integrations.calls import AttentionCall, recorded_calls
from mvlm_kernels.integrations.diffusers import KernelAttnProcessor, swap


@pytest.fixture
def calls() -> Iterator[list[AttentionCall]]:
    with use_backend("torch"), recorded_calls() as found:
        yield found


def layer(**options: Any) -> Any:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"query_dim": 64, "cross_attention_dim": 48, "heads": 2, "dim_head": 32}
    return Attention(**(sizes | options)).eval()


def with_gradients(module: nn.Module, *args: Any, **kwargs: Any) -> list[Tensor]:
    module.zero_grad()
    out = module(*args, **kwargs)
    out = out if isinstance(out, Tensor) else out.sample
    out.square().sum().backward()
    return [out.detach(), *(p.grad.clone() for p in module.parameters() if p.grad is not None)]


def test_unet_gives_the_same_sample_and_gradients(calls: list[AttentionCall]):
    torch.manual_seed(0)
    unet: Any = UNet2DConditionModel(
        sample_size=16, block_out_channels=(32, 64), layers_per_block=1, cross_attention_dim=48, attention_head_dim=1,
        norm_num_groups=8, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip
    inputs: dict[str, Any] = {"encoder_hidden_states": torch.randn(2, 7, 48), "timestep": 3}
    inputs["encoder_attention_mask"] = torch.arange(7) < torch.tensor([[7], [4]])
    sample = torch.randn(2, 4, 16, 16)
    wanted, names = with_gradients(unet, sample, **inputs), set(unet.state_dict())
    report = swap(unet, padding_masks=True)
    assert len(report.swapped) > 4
    assert not report.kept
    torch.testing.assert_close(with_gradients(unet, sample, **inputs), wanted, rtol=1e-4, atol=1e-4)
    assert set(unet.state_dict()) == names
    assert {call.keys for call in calls if not call.reasons} == {7, 64}  # text, and the lowest level to itself
    assert all("256 rows" in str(call.reasons) for call in calls if call.keys == 256)
    report.undo()
    assert {type(p) for p in unet.attn_processors.values()} == {AttnProcessor2_0}


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"qk_norm": "layer_norm", "residual_connection": True, "rescale_output_factor": 2.0},
        {"cross_attention_norm": "layer_norm", "norm_num_groups": 8, "bias": True},
    ],
)
def test_every_option_of_a_layer_is_kept(options: dict[str, Any], backend: Any):
    attention, states, text = layer(**options), torch.randn(2, 64, 3, 4), torch.randn(2, 5, 48)
    wanted = with_gradients(attention, states, text)
    assert swap(attention).swapped
    with use_backend(backend), recorded_calls() as calls:
        torch.testing.assert_close(with_gradients(attention, states, text), wanted, rtol=1e-4, atol=1e-4)
    assert [call.reasons for call in calls] == [()]


@pytest.mark.parametrize("value", [-10000.0, -1.5])
def test_floating_masks_run_the_original_unless_they_are_said_to_be_padding(value: float, calls: list[AttentionCall]):
    attention, states, text = layer(), torch.randn(2, 9, 64), torch.randn(2, 5, 48)
    mask = torch.zeros(2, 1, 5)
    mask[1, :, 3:] = value
    wanted = attention(states, text, mask)
    swap(attention)
    assert torch.equal(attention(states, text, mask), wanted)
    assert "padding_masks=True" in calls[0].reasons[0]
    if value == -10000.0:
        swap_again = copy.deepcopy(attention)
        swap_again.set_processor(KernelAttnProcessor(padding_masks=True))
        torch.testing.assert_close(swap_again(states, text, mask), wanted)
        assert calls[1].reasons == ()


def test_masks_that_differ_between_queries_run_the_original(calls: list[AttentionCall]):
    attention, states, text = layer(), torch.randn(2, 9, 64), torch.randn(2, 5, 48)
    mask = torch.rand(4, 9, 5)
    wanted = attention(states, text, mask)
    swap(attention, padding_masks=True)
    assert torch.equal(attention(states, text, mask), wanted)
    assert "not one row of 5 keys" in calls[0].reasons[0]


def test_further_arguments_run_the_original(calls: list[AttentionCall]):
    attention, states, text = layer(), torch.randn(2, 9, 64), torch.randn(2, 5, 48)
    swap(attention)
    processor: Any = attention.processor
    processor(attention, states, text, beside=1.0)
    assert "there are further arguments: beside" in str(calls[0].reasons)


def test_a_cpu_keeps_the_original():
    attention, states, text = layer(), torch.randn(2, 9, 64), torch.randn(2, 5, 48)
    wanted = attention(states, text)
    swap(attention)
    with recorded_calls() as calls:
        assert torch.equal(attention(states, text), wanted)
    assert calls[0].reasons == (ON_CPU,)


def test_layers_that_cannot_be_swapped_are_kept_with_a_reason():
    model = nn.ModuleDict({
        "plain": layer(),
        "other": layer(processor=AttnProcessor()),
        "joint": layer(processor=JointAttnProcessor2_0()),
        "fused": layer(processor=FusedAttnProcessor2_0()),
        "grouped": layer(kv_heads=1),
    })  # fmt: skip
    report = swap(model)
    assert [part.path for part in report.swapped] == ["plain"]
    assert "must be an AttnProcessor2_0, got AttnProcessor" in str(report)
    assert "heads are grouped" in str(report)
    assert "swapped already" in str(swap(model))
