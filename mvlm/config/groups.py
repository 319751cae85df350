"""Settings of a pretraining run, in groups. `mvlm.config.pretrain` puts them together.

A group is a dataclass. Its `resume_may_change` says whether a resumed run may change its settings. The model's settings
are in no group: a resumed run may never change them.

To add a setting, add one line to its group, with its type, range, default and docstring. The command line, config.json
and the resume check follow; only the code that reads the setting is missing then. A setting may be an int, float, bool,
str, Path, Literal, tuple of a fixed length, or one of these or None (`mvlm.config.json_files`). To add a group, add it
to the bases of `PretrainConfig` too.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from mvlm.config.model import ImageAttentionBackend, TextAttentionBackend
from mvlm.config.ranges import ABOVE_0, AT_LEAST_0, AT_LEAST_1, DECAY, FRACTION, Range


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """Folders, device and memory of the run. A resumed run may change these; another device changes rounding."""

    resume_may_change: ClassVar[bool] = True  # `data` may move; the loader compares fingerprints of the data themselves

    data: Path
    """Data set: a folder of shards written by `mvlm data`."""
    out: Path
    """Run folder, for the configuration, metrics and checkpoints."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device to train on. auto: the GPU if there is one, else the CPU."""
    keep_images_mb: Annotated[int, AT_LEAST_0] = 512
    """Megabytes of memory for decoded training images, on a CPU. If all fit, they are decoded once, not every epoch."""
    resume: bool = False
    """Continue from the newest checkpoint in `out`; start a new run if there is none."""


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """Batches and augmentation. A resumed run keeps these."""

    resume_may_change: ClassVar[bool] = False

    batch_size: Annotated[int, AT_LEAST_1]
    """Pairs per step: the global batch, over all ranks and microbatches."""
    crop_scale: tuple[float, float]
    """Smallest and largest share of the image's area that a random crop keeps."""
    flip: Annotated[float, FRACTION] = 0.0
    """Probability of a horizontal flip. 0 by default, because captions say left and right."""
    randaugment: Annotated[int, Range(0, 14)] = 0
    """RandAugment operations per image."""
    randaugment_magnitude: Annotated[int, Range(0, 30)] = 9
    """Magnitude of RandAugment's operations, 0 to 30."""
    tokenizer: Path | None = None
    """A tokenizer.json. Default: the data set's own, or else a BPE trained on the training captions."""
    seed: int = 0
    """Seed of initial weights, sample order, crops, masks and negatives."""
    eval_images: Annotated[int, AT_LEAST_0] = 0
    """Images for evaluations during training, from the start of the validation split; 0 for all."""


@dataclass(frozen=True, kw_only=True)
class ObjectiveSettings:
    """Weights of the losses. A resumed run keeps these."""

    resume_may_change: ClassVar[bool] = False

    mlm_weight: Annotated[float, AT_LEAST_0] = 1.0
    """Weight of masked language modelling in the loss; 0 leaves it out."""
    mim_weight: Annotated[float, AT_LEAST_0] = 1.0
    """Weight of masked image modelling; 0 leaves it out."""
    itc_weight: Annotated[float, AT_LEAST_0] = 1.0
    """Weight of the image-text contrastive loss; 0 leaves it out."""
    itm_weight: Annotated[float, AT_LEAST_0] = 1.0
    """Weight of the image-text matching loss; 0 leaves it out. Its negatives are drawn by ITC's similarity, so it needs
    ITC."""


@dataclass(frozen=True, kw_only=True)
class ScheduleSettings:
    """Length of the run, in optimizer steps, and learning rate schedule. A resumed run keeps these."""

    resume_may_change: ClassVar[bool] = False

    max_steps: Annotated[int, AT_LEAST_1]
    """Steps of the run. The learning rate reaches its last value at the end."""
    warmup_steps: Annotated[int, AT_LEAST_0]
    """Steps over which the learning rates rise linearly to their peaks."""
    lr_end: Annotated[float, AT_LEAST_0] = 0.1
    """Last learning rate, as a fraction of the peak."""


@dataclass(frozen=True, kw_only=True)
class OptimizerSettings:
    """The optimizer, gradient clipping and weight averaging. A resumed run keeps these."""

    resume_may_change: ClassVar[bool] = False

    optimizer: Literal["adamw", "muon"] = "adamw"
    """AdamW for all parameters, or Muon for the matrices of all blocks and AdamW for the rest."""
    lr_muon: Annotated[float, AT_LEAST_0] = 0.01
    """Peak learning rate of Muon's matrices, in whichever part of the model. Without Muon nothing reads it."""
    lr_encoder: Annotated[float, AT_LEAST_0]
    """Peak learning rate of the two encoders."""
    lr_cross: Annotated[float, AT_LEAST_0]
    """Peak learning rate of the text cross-modality encoder and of the LM, ITC and ITM heads."""
    lr_pixels: Annotated[float, AT_LEAST_0]
    """Peak learning rate of the modules that reconstruct pixels: image cross-modality encoder, decoder, pixel head."""
    weight_decay: Annotated[float, AT_LEAST_0] = 0.05
    """Weight decay, for matrices only: not for norms, biases and embeddings. It is relative to the learning rate."""
    beta2: Annotated[float, DECAY] = 0.98
    """AdamW's decay of the second moment."""
    clip_norm: Annotated[float, ABOVE_0] = 1.0
    """Gradients are scaled down to at most this norm, taken over all parameters."""
    ema_decay: Annotated[float, DECAY] = 0.0
    """Decay of an exponential moving average of the weights, for evaluation and export; 0 for none, 0.999 is usual."""


@dataclass(frozen=True, kw_only=True)
class WeightSettings:
    """Pretrained weights to start from. A resumed run keeps these, and reads its checkpoint in their place."""

    resume_may_change: ClassVar[bool] = False

    initial_model: Path | None = None
    """A trained model of this architecture to go on from, on this run's data: a run, one of its checkpoints or an
    exported folder. Its tokenizer comes with it, and its position embeddings are resized where needed."""
    image_weights: Path | None = None
    """A safetensors file with a pretrained ViT of timm or transformers, for the image encoder."""
    text_weights: Path | None = None
    """A safetensors file with a RoBERTa or BERT of transformers, for the text encoder; `tokenizer` must be its own."""


@dataclass(frozen=True, kw_only=True)
class ComputeSettings:
    """Implementation and precision of a step. A resumed run keeps these."""

    resume_may_change: ClassVar[bool] = False

    plan: Literal["fast", "plain"] = "fast"
    """Implementation of the training step; both give the same losses and gradients. `plain` is the readable reference,
    `fast` the optimized one."""
    self_attention: ImageAttentionBackend = "auto"
    """Backend for attention between image patches. `mvlm doctor` prints the one that auto chooses, with the reasons."""
    cross_attention: TextAttentionBackend = "auto"
    """Backend for all attention that involves text: cross-attention, and self-attention of captions."""
    compile: bool = False
    """Compile the step with torch.compile (one rank, no accumulation). Takes a minute or more at the start."""
    cuda_graphs: bool = False
    """Replay steps from CUDA graphs (one GPU, no accumulation). For small batches: docs/guides/compiled_steps.md."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """auto: bf16 autocast if the device computes bf16 in hardware, else fp32."""
    deterministic: bool = False
    """Use only GPU kernels that give the same bits in every run, so that a resumed run equals an uninterrupted one bit
    for bit. Slower, by how much has not been measured. On a CPU runs repeat without it."""

    @property
    def fixed_shapes(self) -> bool:
        """True if a step sees few shapes, and its number as a tensor: compiled, or in CUDA graphs."""
        return self.compile or self.cuda_graphs


@dataclass(frozen=True, kw_only=True)
class ParallelSettings:
    """Ranks and microbatches. A resumed run keeps these."""

    resume_may_change: ClassVar[bool] = False

    parallel: Literal["ddp", "fsdp"] = "ddp"
    """Placement of weights on several ranks. ddp: all on each rank. fsdp: split over the ranks of a node (FSDP2); over
    several nodes, a copy on each node (HSDP)."""
    accumulate: Annotated[int, AT_LEAST_1] = 1
    """Microbatches per step on each rank. ITC and ITM still use the global batch."""
    checkpoint_activations: bool = False
    """Recompute the activations of each block in backward instead of keeping them: less memory, a third more work."""


@dataclass(frozen=True, kw_only=True)
class LoggingSettings:
    """Metrics and evaluation. A resumed run may change these."""

    resume_may_change: ClassVar[bool] = True

    log_every: Annotated[int, AT_LEAST_1] = 1
    """Steps between rows of metrics."""
    eval_every_steps: Annotated[int, AT_LEAST_0] = 0
    """Steps between evaluations on the validation split; 0 for none."""
    eval_every_minutes: Annotated[float, AT_LEAST_0] = 0.0
    """Minutes between further evaluations; 0 for none. Their steps differ from run to run."""
    wandb: bool = False
    """Also send metrics to Weights & Biases. WANDB_MODE=offline keeps them on this machine."""
    trackio: bool = False
    """Also log metrics with trackio, on this machine."""


@dataclass(frozen=True, kw_only=True)
class CheckpointSettings:
    """Times of checkpoints, and those to keep. A resumed run may change these."""

    resume_may_change: ClassVar[bool] = True

    checkpoint_every_minutes: Annotated[float, AT_LEAST_0] = 10.0
    """Minutes between checkpoints; 0 for none by time. The end of the run always writes one."""
    checkpoint_every_steps: Annotated[int, AT_LEAST_0] = 0
    """Steps between further checkpoints; 0 for none."""
    keep_checkpoints: Annotated[int, AT_LEAST_1] = 2
    """Number of newest checkpoints to keep."""
    keep_every_steps: Annotated[int, AT_LEAST_0] = 0
    """Also write checkpoints at multiples of this step, and keep them for good; 0 for none."""


@dataclass(frozen=True, kw_only=True)
class SafetySettings:
    """Reasons to end a run early. A resumed run may change these."""

    resume_may_change: ClassVar[bool] = True

    max_bad_steps: Annotated[int, AT_LEAST_0] = 10
    """Largest number of consecutive skipped updates (not finite); the next one stops the run."""
    preemption_file: Path | None = None
    """Stop when this file appears: finish the step, save and end, as after SIGTERM or SIGUSR1. A run does not start
    while the file exists."""
    stall_minutes: Annotated[float, ABOVE_0] = 20.0
    """Limit in minutes for one step, its data, one part of an evaluation or one checkpoint. Beyond it the run writes
    the stacks of all threads and exits with code 3."""
