"""Settings of runs, in groups. `RunConfig` has those of every run; `PretrainConfig` and `FinetuneConfig` add their own.

A group is a dataclass, made by `settings`, which says whether a resumed run may change its settings. It may change how
a step is computed, which changes results by rounding alone (`way_of`). The model's settings are in no group: a resumed
run may never change them. From the group follow the box of --help, the section of docs/reference/configuration.md, the
resume check, and the recipe of a model card: the settings that a resume keeps, and how steps are computed.

To add a setting, add one line to its group, with its type, range, default and docstring. The command line, config.json,
the card and the resume check follow; only the code that reads the setting is missing then. A setting may be an int,
float, bool, str, Path, Literal, tuple, or one of these or None (`mvlm.config.json_files`). To add a group, add it to
the bases of a configuration too.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, dataclass_transform, get_args

from mvlm.config.model import ImageAttentionBackend, MaskVLMConfig, TextAttentionBackend
from mvlm.config.ranges import (
    ABOVE_0,
    AT_LEAST_0,
    AT_LEAST_1,
    COMPARES,
    DECAY,
    FRACTION,
    NO_FLAG,
    TORCH_SEED,
    Range,
    check_values,
)
from mvlm.errors import ConfigError
from mvlm_dataloading.urls import intact, is_remote, normal_url, shown

Kind = TypeVar("Kind", bound=type)
Learning = Literal["full", "lora", "frozen"]
_RESUME_MAY_CHANGE: dict[type, bool] = {}
"""For each group of settings, whether a resumed run may change them."""
_WAYS: set[type] = set()
"""Groups that say how steps are computed."""


@dataclass_transform(frozen_default=True, kw_only_default=True)
def settings(*, resume_may_change: bool, way: bool = False) -> Callable[[Kind], Kind]:
    """Decorator that makes a class a group of settings: a frozen dataclass with keyword arguments only.

    Args:
        resume_may_change: True if a resumed run may change the settings.
        way: True if the settings say how steps are computed, which changes results by rounding alone.
    """

    def make(kind: Kind) -> Kind:
        group = dataclass(frozen=True, kw_only=True)(kind)
        _RESUME_MAY_CHANGE[group] = resume_may_change
        if way:
            _WAYS.add(group)
        return group

    return make


def groups_of(config: type) -> list[type]:
    """Groups of a configuration, in the order of --help and config.json."""
    return [base for base in reversed(config.__mro__) if base in _RESUME_MAY_CHANGE]


def resume_may_change(name: str) -> bool:
    """True if a resumed run may change this setting. Model settings may never change."""
    return any(may and name in group.__annotations__ for group, may in _RESUME_MAY_CHANGE.items())


def of_recipe(name: str) -> bool:
    """True if a setting is in a run's recipe: a resumed run may not change it, or it says how steps are computed."""
    return not resume_may_change(name) or any(name in group.__annotations__ for group in _WAYS)


def way_of(config: "RunConfig") -> dict[str, Any]:
    """Settings that say how the steps of a run are computed: name -> plain value for JSON."""
    names = [name for group in groups_of(type(config)) if group in _WAYS for name in group.__annotations__]
    return {name: getattr(config, name) for name in names}


@settings(resume_may_change=True)  # `data` may move; the loader compares fingerprints of the data themselves
class RunSettings:
    """Folders, device and memory of the run. A resumed run may change these; another device changes rounding."""

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
    extend_to: Annotated[int, AT_LEAST_1] | None = None
    """With `resume`: go on to this step, with the moments as they are. Where the learning rate falls before the old
    end, it rises again behind that, as at the start."""


@settings(resume_may_change=False)
class DataSettings:
    """Batches and augmentation. A resumed run keeps these."""

    batch_size: Annotated[int, AT_LEAST_1]
    """Pairs per step: the global batch, over all ranks and microbatches."""
    crop_scale: tuple[float, float]
    """Smallest and largest share of the image's area that a random crop keeps."""
    flip: Annotated[float, FRACTION] = 0.0
    """Probability of a horizontal flip. 0 by default, because captions say left and right."""
    randaugment: Annotated[int, Range(0, 14)] = 0
    """Number of RandAugment operations per image; 0 for none."""
    randaugment_magnitude: Annotated[int, Range(0, 30), NO_FLAG] = 9
    """Magnitude of RandAugment's operations, 0 to 30."""
    seed: Annotated[int, TORCH_SEED] = 0
    """Seed of initial weights, sample order, crops, masks and negatives."""
    eval_images: Annotated[int, AT_LEAST_0] = 0
    """Images for evaluations during training, from the start of the validation split; 0 for all."""


@settings(resume_may_change=False)
class ScheduleSettings:
    """Length of the run, in optimizer steps, and learning rate schedule. A resumed run keeps these."""

    max_steps: Annotated[int, AT_LEAST_1]
    """Steps of the run. The learning rate reaches its last value at the end."""
    warmup_steps: Annotated[int, AT_LEAST_0]
    """Steps over which the learning rates rise linearly to their peaks."""
    lr_end: Annotated[float, AT_LEAST_0] = 0.1
    """Last learning rate, as a fraction of the peak."""
    schedule: Literal["cosine", "wsd"] = "cosine"
    """Learning rate behind the warm-up. cosine: it falls along half a cosine. wsd (warm-up, stable, decay): it stays at
    its peak and falls in the last `cooldown_steps`."""
    cooldown_steps: Annotated[int, AT_LEAST_0] | None = None
    """Steps in which the rate of `wsd` falls, by 1 - sqrt. Default: a fifth of the run. Only wsd reads it."""
    extensions: Annotated[tuple[int, ...], AT_LEAST_1, NO_FLAG] = ()
    """Steps at which the learning rate had fallen and rose again, ascending: the ends before `extend_to`."""


@settings(resume_may_change=False)
class OptimizerSettings:
    """Learning rates, AdamW, gradient clipping and weight averaging. A resumed run keeps these."""

    lr_encoder: Annotated[float, AT_LEAST_0]
    """Peak learning rate of the two encoders."""
    lr_cross: Annotated[float, AT_LEAST_0]
    """Peak learning rate of the text cross-modality encoder and of the LM, ITC and ITM heads."""
    weight_decay: Annotated[float, AT_LEAST_0] = 0.05
    """Weight decay, for matrices only: not for norms, biases and embeddings. It is relative to the learning rate."""
    beta2: Annotated[float, DECAY] = 0.98
    """AdamW's decay of the second moment."""
    clip_norm: Annotated[float, ABOVE_0] = 1.0
    """Gradients are scaled down to at most this norm, taken over all parameters."""
    ema_decay: Annotated[float, DECAY] = 0.0
    """Decay of an exponential moving average of the weights, for evaluation and export; 0 for none, 0.999 is usual."""


@settings(resume_may_change=False)
class PartSettings:
    """Learning of each part of the model, and its rate; heads always learn. A resumed run keeps these."""

    train_image: Learning = "full"
    """Learning of the image encoder. full: all weights. frozen: none. lora: adapters of low rank beside the frozen
    weights of its blocks; checkpoints then hold what learns alone, and need the model that the run starts from."""
    train_text: Learning = "full"
    """Learning of the text encoder, as for the image encoder."""
    train_cross: Learning = "full"
    """Learning of the cross-modality encoders and the image decoder, as for the image encoder. If all three parts are
    frozen, fine-tuning trains the task's head alone."""
    lr_image: Annotated[float, AT_LEAST_0] | None = None
    """Peak learning rate of the image encoder. Default: that of both encoders. With Muon, its matrices learn at
    `lr_muon` times `lr_image / lr_cross`."""
    lr_text: Annotated[float, AT_LEAST_0] | None = None
    """Peak learning rate of the text encoder, as for the image encoder."""
    lora_rank: Annotated[int, AT_LEAST_1] = 8
    """Rank of the adapters of `lora`."""
    lora_alpha: Annotated[float, ABOVE_0] = 8.0
    """The adapters of `lora` are scaled by `lora_alpha / lora_rank`."""

    @property
    def adapted(self) -> bool:
        """True if a part learns by adapters."""
        return "lora" in (self.train_image, self.train_text, self.train_cross)

    @property
    def all_frozen(self) -> bool:
        """True if no part of the model learns."""
        return self.train_image == self.train_text == self.train_cross == "frozen"


FULL = PartSettings()
"""Settings of a run in which all weights of the model learn."""


@settings(resume_may_change=False)
class PrecisionSettings:
    """Precision of a step. A resumed run keeps it."""

    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """auto: bf16 autocast if the device computes bf16 in hardware, else fp32."""


@settings(resume_may_change=True, way=True)
class ComputeSettings:
    """Implementation of a step. A resumed run may change these, which changes rounding."""

    plan: Literal["fast", "plain"] = "fast"
    """Implementation of the training step; both give the same losses and gradients. `plain` is the readable reference,
    `fast` the optimized one."""
    self_attention: ImageAttentionBackend = "auto"
    """Backend for attention between image patches. `mvlm doctor` prints the one that auto chooses, with the reasons."""
    cross_attention: TextAttentionBackend = "auto"
    """Backend for all attention that involves text: cross-attention, and self-attention of captions."""
    deterministic: bool = False
    """Use only GPU kernels that give the same bits in every run, so that a resumed run equals an uninterrupted one bit
    for bit. Slower, by how much has not been measured. On a CPU runs repeat without it."""


@settings(resume_may_change=False)
class OwnSettings:
    """Python functions of your own, by name: FILE.py:NAME, or MODULE:NAME. A resumed run keeps these."""

    own_loss: str | None = None
    """Function of `Features` whose value is added to the loss, or an objective (docs/guides/own_ideas.md). Without
    capture. Fine-tuning has the loss of its task."""
    own_loss_sha256: Annotated[str | None, NO_FLAG] = None
    """SHA-256 of the file of `own_loss`. The run fills it in, and refuses another file."""
    own_masks: str | None = None
    """Function of `MaskDraw` that gives each batch its masks, in place of the loader's (docs/guides/own_ideas.md).
    Without capture."""
    own_masks_sha256: Annotated[str | None, NO_FLAG] = None
    """SHA-256 of the file of `own_masks`, as for `own_loss`."""


@settings(resume_may_change=True, way=True)
class ParallelSettings:
    """Ranks and microbatches. A resumed run may change these, which changes rounding."""

    parallel: Literal["ddp", "fsdp"] = "ddp"
    """Placement of weights on several ranks. ddp: all on each rank. fsdp: split over the ranks of a node (FSDP2); over
    several nodes, a copy on each node (HSDP)."""
    accumulate: Annotated[int, AT_LEAST_1] = 1
    """Microbatches per step on each rank. ITC and ITM still use the global batch."""
    checkpoint_activations: bool = False
    """Recompute the activations of each block in backward instead of keeping them: less memory, a third more work."""


@settings(resume_may_change=True)
class LoggingSettings:
    """Metrics and evaluation. A resumed run may change these."""

    log_every: Annotated[int, AT_LEAST_1] = 1
    """Steps between rows of metrics."""
    eval_every_steps: Annotated[int, AT_LEAST_0] = 0
    """Steps between evaluations on the validation split; 0 for none."""
    log_to: tuple[Literal["wandb", "trackio"], ...] = ()
    """Services that get the metrics too. wandb: Weights & Biases; WANDB_MODE=offline keeps them on this machine.
    trackio: on this machine."""
    artefacts: bool = False
    """Upload the best and the last checkpoint to Weights & Biases. A checkpoint is then also saved after each best
    evaluation. `mvlm report --upload` adds the report."""


@settings(resume_may_change=True)
class CheckpointSettings:
    """Times of checkpoints, and those to keep. A resumed run may change these."""

    checkpoint_every_steps: Annotated[int, AT_LEAST_0] = 0
    """Steps between checkpoints; 0 for one every ten minutes. The end of the run, and a request to stop, always write
    one."""
    keep_checkpoints: Annotated[int, AT_LEAST_0] = 2
    """Number of newest checkpoints to keep; 0 for all."""
    mirror: Path | None = None
    """A place of this run alone in an object store, s3://BUCKET/PATH. Checkpoints are copied there beside training, and
    --resume takes the newest of both places."""


@settings(resume_may_change=True)
class SafetySettings:
    """Reasons to end a run early. A resumed run may change these."""

    max_bad_steps: Annotated[int, AT_LEAST_0, NO_FLAG] = 10
    """Largest number of consecutive skipped updates (not finite); the next one stops the run."""
    failed_step_mb: Annotated[int, AT_LEAST_0, NO_FLAG] = 1000
    """Most megabytes of the first step that is not finite, which pretraining keeps in `out` for `mvlm replay`. Parts
    that do not fit are left out; 0 keeps no step."""
    preemption_file: Path | None = None
    """Stop when this file appears: finish the step, save and end, as after SIGTERM or SIGUSR1. A run does not start
    while the file exists."""
    stall_minutes: Annotated[float, ABOVE_0, NO_FLAG] = 20.0
    """Limit in minutes for one step, its data, one part of an evaluation or one checkpoint. Beyond it the run writes
    the stacks of all threads and exits with code 3."""


@dataclass(frozen=True, kw_only=True)
class RunConfig(  # a dataclass takes fields from its bases from last to first
    SafetySettings,
    CheckpointSettings,
    LoggingSettings,
    ParallelSettings,
    OwnSettings,
    ComputeSettings,
    PrecisionSettings,
    PartSettings,
    OptimizerSettings,
    ScheduleSettings,
    DataSettings,
    RunSettings,
):
    """Settings of every run, and the model's. ConfigError for invalid ones."""

    model: MaskVLMConfig = field(default_factory=MaskVLMConfig)
    """Configuration of the model. Pretraining takes `mask_token_id` from the tokenizer, fine-tuning all of it from the
    checkpoint."""

    def __post_init__(self) -> None:
        check_values(self)
        if self.artefacts and "wandb" not in self.log_to:
            raise ConfigError("artefacts: wanted --log-to wandb, which takes them, got none; give it")
        if self.mirror is not None and not str(self.mirror).startswith("s3:/"):
            raise ConfigError(f"mirror: wanted s3://BUCKET/PATH, got {shown(str(self.mirror))}; give another place")
        for name in (
            "data",
            "also_evaluate",
            "mirror",
        ):  # config.json and everything else that names it has no password
            place = getattr(self, name, None)
            if place is not None and is_remote(place):
                object.__setattr__(self, name, Path(normal_url(place)))
        ends = [*self.extensions, self.max_steps]
        if any(later <= end for end, later in pairwise(ends)):
            raise ConfigError(f"extensions: wanted ascending steps before max_steps {self.max_steps}, got {ends[:-1]}")
        if not 0 < self.crop_scale[0] <= self.crop_scale[1] <= 1:
            raise ConfigError(f"crop_scale must be 0 < smallest <= largest <= 1, got {self.crop_scale}")

    @property
    def fixed_shapes(self) -> bool:
        """True if steps need few different shapes, and the step's number as a tensor: a captured or compiled step."""
        return False

    def model_at(self, step: int) -> MaskVLMConfig:
        """Settings of the model, with the side of images and the share of masks after so many updates."""
        return self.model

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain values for JSON."""
        return {name: intact(v) if isinstance(v, Path) else v for name, v in asdict(self).items()}


# Of pretraining alone.


@settings(resume_may_change=False)
class ObjectiveSettings:
    """Weights of the losses, and the rate of the modules that only one of them trains. A resumed run keeps these."""

    # `NAME_weight` is the weight of the objective of this name (mvlm/objectives/pretraining.py). A further one has the
    # default 0: at 0 it leaves no trace in a run.

    mlm_weight: Annotated[float, AT_LEAST_0] = 1.0
    """Weight of masked language modelling in the loss; 0 leaves it out."""
    mim_weight: Annotated[float, AT_LEAST_0] = 1.0
    """Weight of masked image modelling; 0 leaves it out."""
    itc_weight: Annotated[float, AT_LEAST_0, COMPARES] = 1.0
    """Weight of the image-text contrastive loss; 0 leaves it out."""
    itm_weight: Annotated[float, AT_LEAST_0, COMPARES] = 1.0
    """Weight of the image-text matching loss; 0 leaves it out. Its negatives are drawn by ITC's similarity, so it needs
    ITC."""
    lr_pixels: Annotated[float, AT_LEAST_0]
    """Peak learning rate of the modules that reconstruct pixels: image cross-modality encoder, decoder, pixel head."""

    @property
    def objective_weights(self) -> dict[str, float]:
        """Weights of the objectives, by their names."""
        names = [field.name for field in fields(ObjectiveSettings) if field.name.endswith("_weight")]
        return {name.removesuffix("_weight"): getattr(self, name) for name in names}

    @property
    def comparing_weights(self) -> list[str]:
        """Settings of the weights above 0 of objectives that compare the pairs of a batch."""
        kinds = ObjectiveSettings.__annotations__
        return [n for n, kind in kinds.items() if COMPARES in get_args(kind) and getattr(self, n)]


@settings(resume_may_change=False)
class MuonSettings:
    """Muon in place of AdamW. A resumed run keeps these."""

    optimizer: Literal["adamw", "muon"] = "adamw"
    """AdamW for all parameters, or Muon for the matrices of all blocks and AdamW for the rest."""
    lr_muon: Annotated[float, AT_LEAST_0] = 0.01
    """Peak learning rate of Muon's matrices, in whichever part of the model. Without Muon nothing reads it."""


@settings(resume_may_change=False)
class WeightSettings:
    """Weights to start from, and the tokenizer. A resumed run keeps these, and reads its checkpoint in their place."""

    initial_model: Path | None = None
    """A trained model to go on from, on this run's data: a run, one of its checkpoints or an exported folder. Its
    tokenizer comes with it, and on the command line the settings of its model (--model.*) unless they are given. Its
    position embeddings are resized where needed."""
    keep_start: Annotated[float, AT_LEAST_0] = 0.0
    """Weight of a loss that keeps ITC's embeddings and probabilities near those of `initial_model`, which encodes each
    batch too; 0 for none. Without capture."""
    image_weights: Path | None = None
    """A safetensors file with a pretrained ViT of timm or transformers, for the image encoder. For an image tower, one
    with timm's names, open_clip's, or those of transformers' CLIP or SigLIP; timm: what timm downloads."""
    text_weights: Path | None = None
    """A safetensors file with a RoBERTa or BERT of transformers, for the text encoder; `tokenizer` must be its own."""
    text_tower: Path | None = None
    """A folder with a text encoder of transformers and its tokenizer.json, which runs as it is in place of ours: BERT,
    RoBERTa, XLM-R, DistilBERT, MPNet, ModernBERT, or the text half of CLIP or SigLIP."""
    tokenizer: Path | None = None
    """A tokenizer.json. Default: the data set's own, or else a BPE trained on captions of at most 65,536 samples."""


@settings(resume_may_change=True)
class ForgettingSettings:
    """Measurement of forgetting: retrieval on earlier data, before and after the run. A resumed run may change it."""

    also_evaluate: Path | None = None
    """A data set, such as the one that `initial_model` was trained on. Its validation split is ranked by ITC before the
    first step and after the last."""


@settings(resume_may_change=True)
class ClassesSettings:
    """Zero-shot classification at evaluations. A resumed run may change it."""

    classes: Path | None = None
    """A folder or a tar with a folder of images for each class, as ImageNet's `val`: at each evaluation they are
    classified, by ITC; with `eval_images` so many of them, evenly spread."""
    templates: Path | None = None
    """A file with a text a line that stands for a class, with {} for its name. Default: the name alone."""


@settings(resume_may_change=False)
class StageSettings:
    """Stages of a run, of different sides of images. A resumed run keeps these."""

    stages: tuple[str, ...] = ()
    """Sides of images by stage, as STEP:SIDE, such as 0:96 8000:224: the first 8,000 updates at 96 px, all others at
    224 px, the model's own side. STEP:SIDE:MASKED also sets `image_mask_ratio`. Default: one side."""


MAX_GRAPHS = 8
"""Most CUDA graphs at a time. Each keeps a copy of the gradients and its inputs. They share all other memory, a pool
that no eager step can use."""


@settings(resume_may_change=True, way=True)
class CaptureSettings:
    """Capture of the fast step. A resumed run may change it, which changes rounding."""

    capture: Literal["none", "compile", "cuda-graphs"] = "none"
    """compile: with torch.compile, which takes a minute or more at the start; on several ranks, with microbatches or
    checkpointed activations each block by itself. cuda-graphs: replay the steps (one GPU, no accumulation), for small
    batches. docs/guides/training.md says when."""
