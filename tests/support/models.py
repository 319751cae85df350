"""Micro models, random tensors and batches, and run configurations for the tests of `mvlm`.

Reference formulas, here and in the tests, are plain Python or numpy in float64. They share no code with the library.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mvlm.config.model import MaskVLMConfig
from mvlm.config.pretrain import PretrainConfig
from mvlm.distributed.world import World
from mvlm.model.maskvlm import MaskVLM
from mvlm.objectives.pretraining import ALL
from mvlm.objectives.step import Objective
from mvlm_dataloading import Batch, Masks

MICRO: dict[str, Any] = {
    "image_size": 32,
    "patch_size": 8,
    "mask_block": 16,
    "width": 16,
    "heads": 2,
    "image_layers": 2,
    "text_layers": 2,
    "cross_layers": 2,
    "decoder_layers": 2,
    "vocab_size": 300,
    "mask_token_id": 4,
    "text_length": 12,
    "itc_width": 8,
    "image_mean": (0.5, 0.4, 0.3),
    "image_std": (0.5, 0.25, 0.2),
}

ALONE = World(rank=0, size=1, local_rank=0, device=torch.device("cpu"))


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    """Standard normal numbers, float64."""
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape))


def micro_config(**changes: Any) -> MaskVLMConfig:
    return MaskVLMConfig(**(MICRO | changes))


def micro_model(seed: int = 0, dtype: torch.dtype = torch.float64, **changes: Any) -> MaskVLM:
    """A micro model whose parameters, biases and norms included, are all random and large enough to matter."""
    model = MaskVLM(micro_config(**changes))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            if name == "log_scale":
                continue
            parameter.copy_((1 + 0.2 * noise if ".norm" in name and name.endswith("weight") else 0.3 * noise).float())
    return model.to(dtype)


def micro_batch(
    lengths: tuple[int, ...] = (7, 4, 12, 3, 9), seed: int = 0, config: MaskVLMConfig | None = None
) -> tuple[Batch, Masks]:
    """A random batch with captions of these lengths, and masks of about a third of the tokens and of random patches.

    As many patches are masked as the configuration says.
    """
    config = config or micro_config()
    rng = np.random.default_rng(seed)
    number, side = len(lengths), config.image_size
    starts = np.concatenate([[0], np.cumsum(lengths)])
    tokens = rng.integers(5, config.vocab_size, size=starts[-1])
    tokens[starts[:-1]] = 2
    tokens[starts[1:] - 1] = 3
    token_ids = []
    for start, length in zip(starts[:-1], lengths, strict=True):
        chosen = rng.choice(length - 2, size=max(1, round(0.3 * (length - 2))), replace=False)
        token_ids += sorted((start + 1 + chosen).tolist())
    blocks, in_a_block = (side // config.mask_block) ** 2, (config.mask_block // config.patch_size) ** 2
    masked = round(config.image_mask_ratio * blocks) * in_a_block
    patch_ids = [np.sort(rng.choice(blocks * in_a_block, masked, replace=False)) for _ in lengths]
    batch = Batch(
        images=torch.from_numpy(rng.integers(0, 256, size=(number, 3, side, side), dtype=np.uint8)),
        tokens=torch.from_numpy(tokens.astype(np.int64)),
        cu_seqlens=torch.from_numpy(starts.astype(np.int32)),
        max_length=max(lengths),
        image_id=torch.arange(number) + 100,
        text_id=torch.arange(number) + 200,
        sample_id=torch.arange(number),
    )
    return batch, Masks(patch_ids=torch.from_numpy(np.stack(patch_ids)), token_ids=torch.tensor(token_ids))


def weighted(*weights: float) -> tuple[Objective, ...]:
    """The objectives of pretraining with the weights of MLM, MIM, ITC and ITM."""
    return tuple(replace(x, weight=weight) for x, weight in zip(ALL, weights, strict=True))


class Largest(TorchDispatchMode):
    """Context that finds the number of elements of the largest tensor that an operation returns."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.elements = max([self.elements, *(x.numel() for x in tree_leaves(out) if isinstance(x, torch.Tensor))])
        return out


def pretrain_config(data: Path, out: Path, **changes: Any) -> PretrainConfig:
    """Configuration of a run of a few steps of the micro model."""
    settings: dict[str, Any] = {
        "data": data,
        "out": out,
        "max_steps": 2,
        "batch_size": 8,
        "lr_encoder": 1e-3,
        "lr_cross": 2e-3,
        "lr_pixels": 3e-3,
        "warmup_steps": 2,
        "crop_scale": (0.5, 1.0),
        "device": "cpu",  # some tests compare digit for digit
        "model": micro_config(),
    }
    return PretrainConfig(**(settings | changes))


def uniform_of_pair(seed: int, step: int, stream: int, row: int, column: int) -> float:
    """The uniform number in (0, 1) that makes the Gumbel noise of one pair, by SplitMix64 on Python's integers."""
    golden, mask = 0x9E3779B97F4A7C15, (1 << 64) - 1

    def mix(x: int) -> int:
        x &= mask
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
        return x ^ (x >> 31)

    key = mix(seed * golden + step * 0xBF58476D1CE4E5B9 + stream * 0x94D049BB133111EB)
    bits = mix(mix(key + row * golden) + column * golden)
    return ((bits >> 41) + 0.5) / 2**23
