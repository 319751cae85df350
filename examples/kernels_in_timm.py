"""Kernels in a timm model: a ViT that takes uint8 images, and that embeds only the patches which it is asked for.

    python examples/kernels_in_timm.py

Prints what was swapped, the largest difference from the original (rounding, below 1e-4), and the shape of the embedding
of a quarter of the patches, as MAE's encoder needs it.
"""

import timm
import torch
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from mvlm_kernels.integrations.timm import swap

torch.manual_seed(0)
vit = timm.create_model("test_vit", img_size=96).eval()  # pretrained=True works as well: the state dict stays the same
images = torch.randint(0, 256, (4, 3, 96, 96), dtype=torch.uint8)

# Before: images become float32, four times as large, and are normalised in a pass of their own.
mean = torch.tensor(IMAGENET_DEFAULT_MEAN).view(3, 1, 1)
std = torch.tensor(IMAGENET_DEFAULT_STD).view(3, 1, 1)
with torch.no_grad():
    wanted = vit((images / 255 - mean) / std)

# After: one op reads the bytes, normalises them and cuts the patches.
report = swap(vit, mean=IMAGENET_DEFAULT_MEAN, std=IMAGENET_DEFAULT_STD)
print(report)
with torch.no_grad():
    found = vit(images)
    difference = (found - wanted).abs().max().item()
    print(f"the logits differ by {difference:.0e}")

    # A masked autoencoder's encoder sees a quarter of the patches. The others are never read.
    visible = torch.rand(4, 36).argsort(dim=1)[:, :9]
    tokens = vit.get_submodule("patch_embed")(images, visible)  # (4, 9, width)
    print(f"embedded patches: {tuple(tokens.shape)}")

report.undo()
print(f"after undo: {type(vit.get_submodule('patch_embed')).__name__}")
