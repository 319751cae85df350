"""Recipes: the defaults of `mvlm pretrain PRESET`."""

from pathlib import Path

from mvlm.config.model import MaskVLMConfig
from mvlm.config.pretrain import PretrainConfig


def pretrain_defaults(preset: str, data: Path, out: Path) -> PretrainConfig:
    """The recipe of a preset, for shards in `data` and a run in `out`. ConfigError for an unknown name."""
    model = MaskVLMConfig.preset(preset)
    if preset == "tiny":
        # Chosen on two CPU cores for a run of 10 minutes; the table of what was tried is in docs/demo.md.
        return PretrainConfig(
            data=data,
            out=out,
            max_steps=640,
            batch_size=64,
            lr_encoder=7e-4,
            lr_cross=7e-4,
            lr_pixels=4e-4,
            lr_end=0.01,
            warmup_steps=60,
            crop_scale=(0.9, 1.0),
            model=model,
        )
    # The paper's recipe (512 pairs, 3e-4 to 3e-5 after a warm-up), for encoders that start from scratch as well.
    return PretrainConfig(
        data=data,
        out=out,
        max_steps=100_000,
        batch_size=512,
        lr_encoder=3e-4,
        lr_cross=3e-4,
        lr_pixels=3e-4,
        warmup_steps=5_000,
        crop_scale=(0.2, 1.0),
        randaugment=2,
        model=model,
    )
