"""Settings of a pretraining run, in groups.

A group is a dataclass. It says whether a resumed run may change its settings. A new setting is one line in its group:
the command line, config.json and the resume check follow from it.
"""

from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from mvlm.config.model import ImageAttentionBackend, MaskVLMConfig, TextAttentionBackend
from mvlm.config.ranges import ABOVE_0, AT_LEAST_0, AT_LEAST_1, DECAY, FRACTION, Range, check_ranges
from mvlm.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """Folders and device of the run. A resumed run may change these."""

    resume_may_change: ClassVar[bool] = True  # the loader's fingerprint decides whether `data` is the same data

    data: Path
    """Folder of shards that `mvlm data` wrote."""
    out: Path
    """Folder of the run: configuration, metrics, checkpoints."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: the GPU when there is one."""
    resume: bool = False
    """Continue from the newest checkpoint in `out`, or start when there is none."""


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """Batches and augmentation. A resumed run keeps these."""

    resume_may_change: ClassVar[bool] = False

    batch_size: Annotated[int, AT_LEAST_1]
    """Pairs a step: the global batch, over all ranks and microbatches."""
    crop_scale: tuple[float, float]
    """Share of the image's area that a random crop keeps, smallest and largest."""
    flip: Annotated[float, FRACTION] = 0.0
    """Probability of a mirror image. 0 by default, because captions say left and right."""
    color_jitter: Annotated[float, FRACTION] = 0.0
    """Brightness, contrast and saturation are each multiplied by a number from 1 - this to 1 + this."""
    randaugment: Annotated[int, Range(0, 14)] = 0
    """RandAugment operations an image."""
    randaugment_magnitude: Annotated[int, Range(0, 30)] = 9
    """Magnitude of RandAugment's operations, 0 to 30."""
    tokenizer: Path | None = None
    """A tokenizer.json; by default the data set's own, or a BPE trained on the training captions."""
    seed: int = 0
    """Seed of weights, order, crops, masks and negatives."""
    eval_images: Annotated[int, AT_LEAST_0] = 0
    """Evaluate during training on this many images from the start of the validation split; 0 for all."""


@dataclass(frozen=True, kw_only=True)
class ScheduleSettings:
    """Length of the run and course of the learning rate. A resumed run keeps these. Steps count optimizer updates."""

    resume_may_change: ClassVar[bool] = False

    max_steps: Annotated[int, AT_LEAST_1]
    """Length of the run; the learning rate reaches its end value here."""
    warmup_steps: Annotated[int, AT_LEAST_0]
    """Steps over which the learning rates rise linearly to their peaks."""
    lr_end: Annotated[float, AT_LEAST_0] = 0.1
    """Last learning rate, as a share of the peak."""
    reconstruction_first: Annotated[int, AT_LEAST_0] = 0
    """Steps at the start with MLM and MIM alone; ITC and ITM join after them."""


@dataclass(frozen=True, kw_only=True)
class OptimizerSettings:
    """AdamW and what surrounds an update. A resumed run keeps these."""

    resume_may_change: ClassVar[bool] = False

    lr_encoder: Annotated[float, AT_LEAST_0]
    """Peak learning rate of the two encoders."""
    lr_cross: Annotated[float, AT_LEAST_0]
    """Peak learning rate of the text cross-modality encoder and of the LM, ITC and ITM heads."""
    lr_pixels: Annotated[float, AT_LEAST_0]
    """Peak learning rate of the modules that rebuild pixels: image cross-modality encoder, decoder, pixel head."""
    weight_decay: Annotated[float, AT_LEAST_0] = 0.05
    """AdamW's decay, on matrices only: never on norms, biases and embeddings."""
    beta2: Annotated[float, DECAY] = 0.98
    """AdamW's second-moment decay."""
    clip_norm: Annotated[float, ABOVE_0] = 1.0
    """Largest gradient norm over all parameters."""
    ema_decay: Annotated[float, DECAY] = 0.0
    """Decay of an exponential moving average of the weights, which evaluation and export then use; 0 for none, 0.999 is
    usual."""
    skip_spikes: bool = False
    """Also skip an update whose loss is more than 6 standard deviations above the last 128 of the same objectives."""


@dataclass(frozen=True, kw_only=True)
class WeightSettings:
    """Pretrained encoders to start from. A resumed run keeps these."""

    resume_may_change: ClassVar[bool] = False

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
    """Backend of the images' self-attention; `mvlm doctor` says what auto chooses here, and why."""
    cross_attention: TextAttentionBackend = "auto"
    """Backend of cross-attention and of the text encoder's self-attention."""
    compile: bool = False
    """torch.compile the step (one rank, no accumulation): a minute or more at the start, then faster on a GPU."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """auto: bf16 autocast where the processor computes in bf16, else fp32."""


@dataclass(frozen=True, kw_only=True)
class ParallelSettings:
    """Ranks and microbatches. A resumed run keeps these."""

    resume_may_change: ClassVar[bool] = False

    parallel: Literal["ddp", "fsdp"] = "ddp"
    """Over several ranks: weights on each (DDP), or split over the ranks of a node (FSDP2; over several nodes HSDP)."""
    accumulate: Annotated[int, AT_LEAST_1] = 1
    """Microbatches a step on each rank. ITC and ITM still see the whole global batch."""
    checkpoint_activations: bool = False
    """Recompute each block in backward instead of keeping its activations: less memory, a third more work."""
    local_negatives: bool = False
    """Draw ITM's negatives within a rank's microbatch instead of the global batch. No features are communicated, but
    the loss then depends on the number of ranks."""


@dataclass(frozen=True, kw_only=True)
class LoggingSettings:
    """Metrics and evaluation. A resumed run may change these."""

    resume_may_change: ClassVar[bool] = True

    log_every: Annotated[int, AT_LEAST_1] = 1
    """Steps between lines of metrics.jsonl."""
    eval_every_steps: Annotated[int, AT_LEAST_0] = 0
    """Steps between evaluations on the validation split; 0 for none."""
    eval_every_minutes: Annotated[float, AT_LEAST_0] = 0.0
    """Minutes between evaluations, in addition to those by steps; 0 for none. Their steps differ from run to run."""
    wandb: bool = False
    """Send metrics to Weights & Biases too; WANDB_MODE=offline keeps them on this machine."""
    trackio: bool = False
    """Write metrics with trackio too, on this machine."""


@dataclass(frozen=True, kw_only=True)
class CheckpointSettings:
    """Checkpoints. A resumed run may change these."""

    resume_may_change: ClassVar[bool] = True

    checkpoint_every_minutes: Annotated[float, AT_LEAST_0] = 10.0
    """Minutes between checkpoints; 0 for none by time. One more is written at the end."""
    checkpoint_every_steps: Annotated[int, AT_LEAST_0] = 0
    """Steps between checkpoints, in addition to those by minutes; 0 for none."""
    keep_checkpoints: Annotated[int, AT_LEAST_1] = 2
    """Newest checkpoints to keep."""
    keep_every_steps: Annotated[int, AT_LEAST_0] = 0
    """Checkpoints at multiples of this are kept for good, in addition to the newest; 0 for none."""


@dataclass(frozen=True, kw_only=True)
class SafetySettings:
    """Reasons to end a run early. A resumed run may change these."""

    resume_may_change: ClassVar[bool] = True

    max_bad_steps: Annotated[int, AT_LEAST_0] = 10
    """Updates in a row that may be skipped as not finite (or as spikes); the run stops at the next."""
    preemption_file: Path | None = None
    """When this file appears, the run finishes its step, saves and ends, as after SIGTERM or SIGUSR1. A run does not
    start while the file exists."""
    stall_minutes: Annotated[float, ABOVE_0] = 20.0
    """The run is ended, with the stacks of all threads, when a step or its data take longer than this."""


@dataclass(frozen=True, kw_only=True)
class PretrainConfig(  # a dataclass has the fields of its last base first
    SafetySettings,
    CheckpointSettings,
    LoggingSettings,
    ParallelSettings,
    ComputeSettings,
    WeightSettings,
    OptimizerSettings,
    ScheduleSettings,
    DataSettings,
    RunSettings,
):
    """One pretraining run: the settings of all groups, and the model's."""

    model: MaskVLMConfig = field(default_factory=MaskVLMConfig)
    """Sizes of the model; the tokenizer decides `mask_token_id`."""

    def __post_init__(self) -> None:
        check_ranges(self)
        if self.compile and (self.accumulate > 1 or self.plan != "fast"):
            raise ConfigError("compile: wanted --plan fast and --accumulate 1 with it, got others")
        if not -(2**63) <= self.seed < 2**64:  # what torch's generators take
            raise ConfigError(f"seed must be in [-2^63, 2^64), got {self.seed}")
        if not 0 < self.crop_scale[0] <= self.crop_scale[1] <= 1:
            raise ConfigError(f"crop_scale must be 0 < smallest <= largest <= 1, got {self.crop_scale}")

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return {name: str(v) if isinstance(v, Path) else v for name, v in asdict(self).items()}


GROUPS: tuple[type, ...] = PretrainConfig.__bases__[::-1]
"""The groups, in the order of --help and config.json."""


def resume_may_change(name: str) -> bool:
    """True for a setting that changes where, how fast or how often, but not what a run computes."""
    return any(name in {f.name for f in fields(group)} for group in GROUPS if group.resume_may_change)
