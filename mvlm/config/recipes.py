"""Recipes: the default settings of `mvlm pretrain PRESET` and of `mvlm finetune TASK`."""

from pathlib import Path

from mvlm.config.finetune import FinetuneConfig
from mvlm.config.model import MaskVLMConfig
from mvlm.config.pretrain import PretrainConfig


def pretrain_defaults(preset: str, data: Path, out: Path) -> PretrainConfig:
    """Make the recipe of a preset, for shards in `data` and a run folder `out`. ConfigError for an unknown preset."""
    model = MaskVLMConfig.preset(preset)
    if preset == "tiny":
        # Chosen on two CPU cores for a run of 10 minutes; docs/evidence/lab_log.md has the other trials.
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
    # The paper's recipe: 512 pairs, a learning rate of 3e-4 that falls to 3e-5 after a warm-up. The encoders have the
    # same rate as the rest, because they start from scratch here.
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


def finetune_defaults(task: str, checkpoint: Path, data: Path, out: Path) -> FinetuneConfig:
    """Make the recipe of a task, for a pretrained model, shards in `data` and a run folder `out`.

    The learning rates are for a `tiny` model on two CPU cores. For a model of the paper's size, ALBEF's are a start:
    1e-5 for the encoders, 2e-5 for the cross-modality encoders, 1e-4 for the head, over 5 to 10 epochs of batch 256.
    """
    return FinetuneConfig(
        task=task,
        checkpoint=checkpoint,
        data=data,
        out=out,
        max_steps=1200,
        warmup_steps=120,
        batch_size=64,
        lr_encoder=2e-4,
        lr_cross=3e-4,
        lr_pixels=0.0,
        lr_head=1e-3,
        lr_end=0.0,
        crop_scale=(0.8, 1.0),
    )
