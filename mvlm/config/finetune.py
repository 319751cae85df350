"""Configuration of a fine-tuning run: that of a pretraining run, and the task's settings."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from mvlm.config.groups import ObjectiveSettings, WeightSettings
from mvlm.config.pretrain import GROUPS as RUN_GROUPS
from mvlm.config.pretrain import PretrainConfig
from mvlm.config.ranges import AT_LEAST_0, AT_LEAST_1
from mvlm.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class StartSettings:
    """The task and the weights that it starts from. A resumed run keeps these, but for `checkpoint`."""

    resume_may_change: ClassVar[bool] = False

    task: str
    """Name of the task."""
    checkpoint: Path
    """Pretrained model: a run folder, one of its checkpoints, or an exported folder. A run with checkpoints of its own
    resumes without it, so the model may then be gone or lie elsewhere."""
    image_size: int | None = None
    """Side of the images in pixels. Position embeddings are resized. Default: the pretrained model's."""
    question_length: int | None = None
    """Longest text in tokens, [CLS] and [SEP] included. Default: the pretrained model's."""
    lr_head: Annotated[float, AT_LEAST_0]
    """Peak learning rate of the task's head, which starts from random weights."""
    questions_per_image: Annotated[int, AT_LEAST_1] = 1
    """Questions about one image that a batch has together (vqa, entailment, pairs). With more than 1, a batch encodes
    each of its images once."""
    random_weights: bool = False
    """Baseline: start from random weights of the pretrained model's architecture."""
    freeze: Literal["none", "encoders", "all"] = "none"
    """Weights that stay as they are: none, those of both encoders, or all but the head's."""


@dataclass(frozen=True, kw_only=True)
class TaskOptions:
    """Options of the tasks, saved with a task's weights. A task reads those that name it."""

    resume_may_change: ClassVar[bool] = False

    blind: Literal["no", "image", "text"] = "no"
    """Baseline: train and evaluate without the image (uniform grey) or without the text (every word is [MASK])."""
    min_count: Annotated[int, AT_LEAST_1] = 1
    """An answer is listed if it is the most frequent one of this many training questions or more (vqa; VQA v2: 9)."""
    answers: Literal["classifier", "masked"] = "classifier"
    """Form of vqa: a classifier over the list of answers, or the answer's words masked and predicted, as in
    pretraining."""
    answer_list: Path | None = None
    """A JSON list of answers (vqa), all of them to training questions. Default: those of the training split."""
    rerank: Annotated[int, AT_LEAST_1] = 32
    """Candidates of each query that ITM re-ranks in evaluations (retrieval; 128 for Flickr30k, 256 for COCO)."""
    lengths: Annotated[int, AT_LEAST_1] = 5
    """Number of lengths that caption tries in evaluations: it writes a caption for each of the image's likeliest."""
    iterations: Annotated[int, AT_LEAST_1] = 10
    """Passes of mask-predict (caption)."""
    choose_by: Literal["itm", "likelihood"] = "likelihood"
    """Figure that chooses among captions of different lengths: a token's mean log-likelihood, or ITM's log-odds, whose
    head judges features that it was not trained on, because caption trains the encoders without it."""

    def plain(self) -> dict[str, Any]:
        """The options alone, as plain values for JSON."""
        values = {option.name: getattr(self, option.name) for option in fields(TaskOptions)}
        return {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig(TaskOptions, StartSettings, PretrainConfig):
    """Configuration of a fine-tuning run. `model` follows from the checkpoint."""

    def __post_init__(self) -> None:
        # First: what else is wrong with such a setting is of no use.
        defaults = {setting.name: setting.default for setting in fields(self)} | {"lr_pixels": 0.0}
        given = [name for name in PRETRAINING_ONLY if getattr(self, name) != defaults[name]]
        if given:
            flags = ", ".join("--" + name.replace("_", "-") for name in given)
            raise ConfigError(f"wanted no settings of pretraining alone, got {flags}; leave them out")
        super().__post_init__()

    @property
    def options(self) -> TaskOptions:
        """The options of the task among the settings."""
        return TaskOptions(**{option.name: getattr(self, option.name) for option in fields(TaskOptions)})


_NOT_READ = (ObjectiveSettings, WeightSettings)
PRETRAINING_ONLY = (
    *(setting.name for group in _NOT_READ for setting in fields(group)),
    *("tokenizer", "lr_pixels"),
    *("optimizer", "lr_muon"),
    *("compile", "cuda_graphs"),
)
"""Settings that fine-tuning does not read. It refuses other values than their defaults, and a rate of pixels but 0."""
GROUPS: tuple[type, ...] = (StartSettings, TaskOptions, *(group for group in RUN_GROUPS if group not in _NOT_READ))
"""Groups of settings, in the order of --help."""
