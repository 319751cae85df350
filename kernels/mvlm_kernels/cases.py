"""What is counted by :mod:`mvlm_kernels.traffic` and timed by the benchmarks: each op at the paper's shapes.

A case knows its op, the usual torch composition, and by arithmetic the fewest bytes and the floating-point operations
of each pass. Images of 224 px in patches of 16, 116 of 196 masked, bfloat16 unless it says otherwise.
"""

import re
from dataclasses import dataclass
from typing import Any

import torch

from mvlm_kernels import pixel_cases
from mvlm_kernels.case import WIDTH, Case, Sizes, patch_ids
from mvlm_kernels.cross_attention import cross_attention
from mvlm_kernels.place_tokens import place_tokens


@dataclass(frozen=True)
class Gpu:
    """Peak rates from the data sheet: memory in bytes a second, dense bfloat16 in operations a second."""

    bandwidth: float
    flops: float
    source: str


GPUS = {
    "A100": Gpu(2.039e12, 312e12, "NVIDIA A100 Tensor Core GPU data sheet, SXM 80 GB"),
    "H100": Gpu(3.35e12, 989e12, "NVIDIA H100 Tensor Core GPU data sheet, SXM; 1,979 TFLOPS with sparsity"),
    "H200": Gpu(4.8e12, 989e12, "NVIDIA H200 Tensor Core GPU data sheet, SXM; 1,979 TFLOPS with sparsity"),
    "B200": Gpu(
        8.0e12, 2250e12, "NVIDIA HGX B200 data sheet: an eighth of 64 TB/s and of 36 PFLOPS with sparsity, halved"
    ),
}


def peak_rates(device_name: str) -> Gpu | None:
    """The data sheet's rates of this GPU; None for one that the table does not have.

    The table is of the SXM (A100: 80 GB) parts, so their PCIe, NVL and 40 GB relatives, and slices of them, have none.
    """
    if re.search(r"PCIe|NVL|40GB|MIG", device_name, re.IGNORECASE):
        return None
    found = re.search(rf"\b({'|'.join(GPUS)})\b", device_name)
    return GPUS[found.group(1)] if found else None


def _place(mode: str) -> Case:
    def inputs(sizes: Sizes, device: str):
        batch, patches = sizes["B"], sizes["N"]
        count = patches // 4 if mode == "visible" else patches
        tokens = torch.zeros(batch, count, WIDTH, dtype=torch.bfloat16, device=device, requires_grad=True)
        bf16: Any = {"dtype": torch.bfloat16, "device": device, "requires_grad": True}
        leaves = [
            tokens,
            torch.zeros(WIDTH, **bf16),
            torch.zeros(1 + patches, WIDTH, **bf16),
            torch.zeros(WIDTH, **bf16),
        ]
        masked = (torch.arange(batch, device=device)[:, None] + torch.arange(patches, device=device)) % 2 == 0
        return leaves, masked, patch_ids(batch, patches // 4, device, patches)

    def run(sizes: Sizes, device: str):
        leaves, masked, ids = inputs(sizes, device)
        options: Any = {"visible_ids": ids} if mode == "visible" else {"masked": masked}
        return leaves, lambda *x: place_tokens(*x, **options)

    def usual(sizes: Sizes, device: str):
        leaves, masked, _ = inputs(sizes, device)
        batch, patches = sizes["B"], sizes["N"]

        def place(tokens, mask_token, pos_embed, cls_token):
            if mode == "visible":  # MAE: append mask tokens, unshuffle by a gather
                fill = mask_token.expand(batch, patches - tokens.shape[1], -1)
                order = torch.zeros(batch, patches, dtype=torch.int64, device=tokens.device)
                x = torch.cat([tokens, fill], dim=1).gather(1, order[:, :, None].expand(-1, -1, WIDTH))
            else:  # SimMIM: blend with the mask
                w = masked[:, :, None].to(tokens.dtype)
                x = tokens * (1 - w) + mask_token.expand_as(tokens) * w
            return torch.cat([cls_token.expand(batch, 1, -1), x], dim=1) + pos_embed

        return leaves, place

    def minimum(sizes: Sizes) -> tuple[int, int]:
        batch, patches = sizes["B"], sizes["N"]
        row = 2 * WIDTH
        seen = patches // 4 if mode == "visible" else patches // 2
        written = patches // 4 if mode == "visible" else patches
        index = batch * (seen * 4 if mode == "visible" else patches)
        parameters = row * (patches + 3)
        whole = batch * (1 + patches) * row
        return batch * seen * row + index + parameters + whole, whole + index + batch * written * row + parameters

    what = "49 of 196 visible" if mode == "visible" else "half of 196 masked"
    samples = {"B": (2, 4), "N": (4, 8)}
    return Case("place_tokens", f"B256 width 768, {what}", {"B": 256, "N": 196}, samples, run, usual, minimum)


def _attention(queries: int, keys: int) -> Case:
    width = 64  # batch times heads is one size: programs of one head are alike

    def run(sizes: Sizes, device: str):
        shapes = [(sizes["B*H"], n, 1, width) for n in (queries, keys, keys)]
        leaves = [torch.zeros(s, dtype=torch.bfloat16, device=device, requires_grad=True) for s in shapes]
        return leaves, lambda q, k, v: cross_attention(q, k, v)

    def usual(sizes: Sizes, device: str):
        leaves, _ = run(sizes, device)

        def attend(q, k, v):
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
            p = ((q @ k.transpose(2, 3)) * width**-0.5).softmax(dim=-1)
            return (p @ v).transpose(1, 2).contiguous()

        return leaves, attend

    def minimum(sizes: Sizes) -> tuple[int, int]:
        per_row = sizes["B*H"] * width * 2
        lse = 4 * sizes["B*H"] * queries
        # Where every key of a query is seen at once, the backward does without the output.
        read = 3 * queries if keys <= 128 else 4 * queries
        return per_row * (2 * queries + 2 * keys) + lse, per_row * (read + 4 * keys) + lse

    def flops(sizes: Sizes) -> tuple[int, int]:
        product = 2 * sizes["B*H"] * queries * keys * width
        return 2 * product, 5 * product

    name = f"B256 H12 D64 {queries}x{keys}"
    return Case("cross_attention", name, {"B*H": 256 * 12}, {"B*H": (1, 2)}, run, usual, minimum, flops)


def cases() -> list[Case]:
    return [
        _attention(197, 32),
        _attention(32, 197),
        pixel_cases.gather(torch.uint8),
        pixel_cases.gather(torch.bfloat16),
        pixel_cases.masked("l1", False),
        pixel_cases.masked("mse", True),
        pixel_cases.linear("l1"),
        pixel_cases.linear("mse"),
        _place("masked"),
        _place("visible"),
    ]
