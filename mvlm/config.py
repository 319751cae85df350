"""What a run is made of: the sizes of the model, the recipe, and the presets of both."""

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from mvlm.errors import ConfigError

FORMAT_VERSION = 2  # of config.json
PRESETS = ("tiny", "small", "base")
SelfBackend = Literal["auto", "triton", "sdpa", "flash-attn", "xformers", "products"]
CrossBackend = Literal["auto", "triton", "sdpa", "products"]
"""What computes attention of images alone, and attention with text on one side; mvlm/backends.py has the rule."""
SIZES = (
    "image_size",
    "patch_size",
    "mask_block",
    "width",
    "heads",
    "image_layers",
    "text_layers",
    "cross_layers",
    "decoder_layers",
    "vocab_size",
    "itc_width",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class MaskVLMConfig:
    """Sizes and choices of one MaskVLM. Lengths are in tokens, image sides in pixels."""

    image_size: int = 224
    """Side of the square input image."""
    patch_size: int = 16
    """Side of a patch; divides `mask_block`."""
    width: int = 768
    """Feature width of both encoders and of all cross-modality blocks."""
    heads: int = 12
    """Attention heads; the width of one head is width / heads."""
    image_layers: int = 12
    """Self-attention blocks of the image encoder (ViT, pre-norm)."""
    text_layers: int = 12
    """Self-attention blocks of the text encoder (RoBERTa, post-norm)."""
    cross_layers: int = 3
    """Blocks of each of the two cross-modality encoders."""
    decoder_layers: int = 3
    """Blocks of the image decoder."""
    vocab_size: int = 50265
    """Rows of the word embedding and of the LM head; a tokenizer may use fewer."""
    mask_token_id: int = 50264
    """Id of [MASK], which replaces every masked token."""
    text_length: int = 40
    """Longest caption, [CLS] and [SEP] included."""
    itc_width: int = 256
    """Width of the contrastive embeddings."""
    temperature: float = 0.07
    """Where the learned contrastive temperature starts."""
    cross_norm: Literal["post", "pre"] = "post"
    """LayerNorm after each residual sum (post, the paper) or before each sub-layer (pre)."""
    initialization: Literal["normal", "xavier"] = "normal"
    """Weights of linear layers: trunc_normal(0.02), made for widths near 768, or Xavier's, which follows the width."""
    pixel_initialization: Literal["normal", "xavier"] = "normal"
    """The same for what rebuilds pixels: the image cross-modality encoder, the decoder, the pixel head."""
    mask_block: int = 32
    """Side of the square blocks that are masked together; divides `image_size`."""
    image_mask_ratio: float = 0.6
    """Share of the blocks that is masked, rounded to a whole number of blocks."""
    drop_masked: bool = False
    """Masked patches skip the image encoder and are mask tokens only behind it, as in MAE: a cheaper, other method."""
    text_mask_ratio: float = 0.3
    """Share of a caption's ordinary tokens that is masked; at least one is."""
    image_mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    """Subtracted from pixels in 0..1, by channel."""
    image_std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    """Divides them afterwards."""

    def __post_init__(self) -> None:
        for name in SIZES:
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.text_length < 3:
            raise ConfigError(f"text_length must be at least 3 ([CLS], a token, [SEP]), got {self.text_length}")
        if self.image_size % self.mask_block:
            raise ConfigError(
                f"mask_block must divide image_size: wanted a divisor of {self.image_size}, got {self.mask_block}"
            )
        if self.mask_block % self.patch_size:
            raise ConfigError(
                f"patch_size must divide mask_block: wanted a divisor of {self.mask_block}, got {self.patch_size}"
            )
        if self.width % self.heads:
            raise ConfigError(f"heads must divide width: wanted a divisor of {self.width}, got {self.heads}")
        if self.cross_norm not in ("post", "pre"):
            raise ConfigError(f'cross_norm must be "post" or "pre", got {self.cross_norm!r}')
        for name in ("initialization", "pixel_initialization"):
            if getattr(self, name) not in ("normal", "xavier"):
                raise ConfigError(f'{name} must be "normal" or "xavier", got {getattr(self, name)!r}')
        if not 0 <= self.mask_token_id < self.vocab_size:
            raise ConfigError(f"mask_token_id must be in [0, {self.vocab_size}), got {self.mask_token_id}")
        blocks = (self.image_size // self.mask_block) ** 2
        if not 1 <= round(self.image_mask_ratio * blocks) <= blocks:
            raise ConfigError(
                f"image_mask_ratio must hide 1 to {blocks} of {blocks} blocks, got {self.image_mask_ratio}"
            )
        if not 0 <= self.text_mask_ratio <= 1:
            raise ConfigError(f"text_mask_ratio must be in [0, 1], got {self.text_mask_ratio}")
        if not 0.001 <= self.temperature <= 0.5:
            raise ConfigError(f"temperature must be in [0.001, 0.5], got {self.temperature}")

    @property
    def num_patches(self) -> int:
        """Patches of one image."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def patch_values(self) -> int:
        """Values of one patch: channels x side x side."""
        return 3 * self.patch_size**2

    @classmethod
    def preset(cls, name: str, **changes: Any) -> "MaskVLMConfig":
        """The named preset, with fields replaced by `changes`. ConfigError for an unknown name.

        `base` is ViT-B/16 at 224 px with RoBERTa-base, as in the paper (about 335 M parameters); `small` has half the
        width; `tiny` (about 10 M) trains on two CPU cores.
        """
        if name == "base":
            config = cls()
        elif name == "small":
            config = cls(width=384, heads=6)
        elif name == "tiny":
            config = cls(
                image_size=96,
                width=192,
                heads=3,
                image_layers=6,
                text_layers=6,
                cross_layers=2,
                decoder_layers=2,
                vocab_size=2048,
                mask_token_id=4,
                text_length=24,
                cross_norm="pre",  # these two: measured, docs/demo.md
                initialization="xavier",
            )
        else:
            raise ConfigError(f"unknown preset: wanted one of {', '.join(PRESETS)}, got {name!r}")
        return replace(config, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return asdict(self)


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
    """Minutes between checkpoints; one more is written at the end."""
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
    """Also skip an update whose loss is more than 6 standard deviations above the last 128."""
    preemption_file: Path | None = None
    """When this file appears, the run finishes its step, saves and ends, as after SIGTERM or SIGUSR1."""
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
        for name in ("max_steps", "batch_size", "accumulate", "log_every", "keep_checkpoints"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.compile and (self.accumulate > 1 or self.plan != "fast"):
            raise ConfigError("compile: wanted --plan fast and --accumulate 1 beside it, got others")
        for name in ("max_bad_steps", "keep_every_steps", "eval_every_minutes", "eval_pictures"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} must be at least 0, got {getattr(self, name)}")
        if not 0 <= self.ema_decay < 1:
            raise ConfigError(f"ema_decay must be in [0, 1), got {self.ema_decay}")
        if self.stall_minutes <= 0:
            raise ConfigError(f"stall_minutes must be above 0, got {self.stall_minutes}")
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
