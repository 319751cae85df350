"""Kernels in a model of diffusers: a small UNet whose image attends to a text.

    python examples/kernels_in_diffusers.py

Prints how many layers were swapped, which calls the op computed and why it left the others to SDPA, and the largest
difference from the original (rounding, below 1e-4).
"""

from collections import Counter
from contextlib import nullcontext

import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

from mvlm_kernels import use_backend
from mvlm_kernels.integrations.calls import recorded_calls
from mvlm_kernels.integrations.diffusers import swap

torch.manual_seed(0)
device = "cuda" if torch.cuda.is_available() else "cpu"
with torch.device(device):
    unet = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(32, 64),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=48,
        attention_head_dim=2,  # in this library the number of heads
        norm_num_groups=8,
    ).eval()  # or UNet2DConditionModel.from_pretrained(...)
    noisy, text = torch.randn(2, 4, 16, 16), torch.randn(2, 7, 48)

with torch.no_grad():
    wanted = unet(noisy, 10, encoder_hidden_states=text).sample
report = swap(unet)
print(f"{len(report.swapped)} layers swapped, {len(report.kept)} kept")

# Without a GPU a swapped model keeps diffusers' attention, which is as fast there. This asks for the op anyway.
anyway = nullcontext() if device == "cuda" else use_backend("torch")
with torch.no_grad(), anyway, recorded_calls() as calls:
    found = unet(noisy, 10, encoder_hidden_states=text).sample
choices = Counter((call.queries, call.keys, *call.reasons) for call in calls)
for (queries, keys, *reasons), number in choices.items():
    print(f"{number} calls of {queries} queries and {keys} keys: {'; '.join(reasons) or 'by the op'}")
difference = (found - wanted).abs().max().item()
print(f"samples differ by {difference:.0e}")
