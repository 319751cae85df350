"""What a pretraining run is made of, and the recipe of each preset."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from mvlm.config.model import CrossBackend, MaskVLMConfig, SelfBackend, check_finite
from mvlm.errors import ConfigError

FORMAT_VERSION = 2  # of config.json
NOT_NEGATIVE = (
    "lr_encoder",
    "lr_cross",
    "lr_pixels",
    "lr_end",
    "warmup_steps",
    "reconstruction_first",
    "weight_decay",
    "eval_every_steps",
    "eval_every_minutes",
    "eval_pictures",
    "checkpoint_every_minutes",
    "checkpoint_every_steps",
    "keep_every_steps",
    "max_bad_steps",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class PretrainConfig:
    """One pretraining run. Steps count optimizer updates."""

    data: Path
    """Folder of shards that `mvlm data` wrote."""
    out: Path
    """Folder of the run: configuration, metrics, checkpoints."""
    max_steps: int
    """Length of the run; the learning rate falls to its end value here."""
    batch_size: int
    """Pairs a step: of the global batch, over all ranks and microbatches."""
    lr_encoder: float
    """Peak learning rate of the two encoders."""
    lr_cross: float
    """Peak learning rate of the text cross-modality encoder and of the heads for words, ITC and ITM."""
    lr_pixels: float
    """Peak learning rate of what rebuilds pixels: the image cross-modality encoder, the decoder, the pixel head."""
    lr_end: float = 0.1
    """Last learning rate, as a share of the peak."""
    warmup_steps: int
    """Steps over which the learning rates rise linearly to their peaks."""
    reconstruction_first: int = 0
    """Steps at the start with MLM and MIM alone; ITC and ITM join after them."""
    weight_decay: float = 0.05
    """AdamW's decay, on matrices only: never on norms, biases and embeddings."""
    beta2: float = 0.98
    """AdamW's second-moment decay."""
    clip_norm: float = 1.0
    """Largest gradient norm over all parameters."""
    crop_scale: tuple[float, float]
    """Share of the picture's area that a random crop keeps, smallest and largest."""
    flip: float = 0.0
    """Probability of a mirror image: captions say left and right, so none by default."""
    color_jitter: float = 0.0
    """Brightness, contrast and colour are each multiplied by a number from 1 - this to 1 + this."""
    randaugment: int = 0
    """RandAugment operations a picture."""
    randaugment_magnitude: int = 9
    """Their magnitude, 0 to 30."""
    tokenizer: Path | None = None
    """A tokenizer.json; without it the data set's own, or a BPE trained on the training captions."""
    image_weights: Path | None = None
    """A safetensors file with a pretrained ViT of timm or transformers, from which the image encoder starts."""
    text_weights: Path | None = None
    """The same with a RoBERTa or BERT of transformers for the text encoder; `tokenizer` has to be its own."""
    seed: int = 0
    """Weights, order, crops, masks and negatives follow from it."""
    plan: Literal["fast", "plain"] = "fast"
    """How a step is computed, not what: `plain` is the specification, `fast` leaves out what nobody reads."""
    self_attention: SelfBackend = "auto"
    """What the fast plan computes self-attention of images with; `mvlm doctor` says what auto takes here, and why."""
    cross_attention: CrossBackend = "auto"
    """The same where text is on one side: in cross-attention, and in the text encoder."""
    compile: bool = False
    """torch.compile the step (one rank, no accumulation): a minute or more at the start, then faster on a GPU."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """auto: bf16 autocast where the processor computes in bf16, else fp32."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: the GPU when there is one."""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """Over several ranks: weights on each (DDP), or split over the ranks of a node (FSDP2; over several nodes HSDP)."""
    accumulate: int = 1
    """Microbatches a step on each rank. ITC and ITM still see the whole global batch."""
    checkpoint_activations: bool = False
    """Compute what is inside a block again in backward instead of keeping it: less memory, a third more work."""
    local_negatives: bool = False
    """Draw ITM's negatives within a rank's microbatch instead of from the global batch: no features travel."""
    log_every: int = 1
    """Steps between lines of metrics.jsonl."""
    eval_every_steps: int = 0
    """Steps between evaluations on the validation split; 0 for none."""
    eval_every_minutes: float = 0.0
    """Minutes between evaluations, besides those by steps; 0 for none. When they fall is not the same in every run."""
    eval_pictures: int = 0
    """Evaluate during training on the first so many pictures of the validation split; 0 for all."""
    checkpoint_every_minutes: float = 10.0
    """Minutes between checkpoints; 0 for none by time. One more is written at the end."""
    checkpoint_every_steps: int = 0
    """Steps between checkpoints, besides those by minutes; 0 for none."""
    keep_checkpoints: int = 2
    """Newest checkpoints to keep."""
    keep_every_steps: int = 0
    """Checkpoints at multiples of this are kept for good, besides the newest; 0 for none."""
    ema_decay: float = 0.0
    """Decay of an average of the weights (EMA), which evaluation and export then use; 0 for none, 0.999 is usual."""
    max_bad_steps: int = 10
    """Updates in a row that may be skipped as not finite (or as spikes); the run stops at the next."""
    skip_spikes: bool = False
    """Also skip an update whose loss is more than 6 standard deviations above the last 128 of the same objectives."""
    preemption_file: Path | None = None
    """When this file appears, the run finishes its step, saves and ends, as after SIGTERM or SIGUSR1. A run does not
    begin while it is there."""
    stall_minutes: float = 20.0
    """The run is ended, with the stacks of all threads, when a step or its data take longer than this."""
    wandb: bool = False
    """Send metrics to Weights & Biases too; WANDB_MODE=offline keeps them on this machine."""
    trackio: bool = False
    """Write metrics with trackio too, on this machine."""
    resume: bool = False
    """Go on from the newest checkpoint in `out`, or start when there is none."""
    model: MaskVLMConfig = field(default_factory=MaskVLMConfig)
    """Sizes of the model; the tokenizer decides `mask_token_id`."""

    def __post_init__(self) -> None:
        check_finite(self)
        for name in ("max_steps", "batch_size", "accumulate", "log_every", "keep_checkpoints"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.compile and (self.accumulate > 1 or self.plan != "fast"):
            raise ConfigError("compile: wanted --plan fast and --accumulate 1 beside it, got others")
        for name in NOT_NEGATIVE:
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} must be at least 0, got {getattr(self, name)}")
        for name in ("beta2", "ema_decay"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"{name} must be in [0, 1), got {getattr(self, name)}")
        for name in ("clip_norm", "stall_minutes"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"{name} must be above 0, got {getattr(self, name)}")
        if not -(2**63) <= self.seed < 2**64:  # what torch's generators take
            raise ConfigError(f"seed must be in [-2^63, 2^64), got {self.seed}")
        if not 0 < self.crop_scale[0] <= self.crop_scale[1] <= 1:
            raise ConfigError(f"crop_scale must be 0 < smallest <= largest <= 1, got {self.crop_scale}")
        for name, most in (("flip", 1), ("color_jitter", 1), ("randaugment", 14), ("randaugment_magnitude", 30)):
            if not 0 <= getattr(self, name) <= most:
                raise ConfigError(f"{name} must be in [0, {most}], got {getattr(self, name)}")

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return {name: str(v) if isinstance(v, Path) else v for name, v in asdict(self).items()}


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
