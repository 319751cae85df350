"""Configuration of a fine-tuning run: the settings of every run, and those of the task."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal

from mvlm.config.groups import RunConfig, settings
from mvlm.config.ranges import AT_LEAST_0, AT_LEAST_1, NO_FLAG
from mvlm.errors import ConfigError


@settings(resume_may_change=False)
class StartSettings:
    """The task and the weights that it starts from. A resumed run keeps these, but for `checkpoint`."""

    task: Annotated[str, NO_FLAG]
    """Name of the task, or the Python file of the user's own. The first word of the command names it."""
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


@settings(resume_may_change=False)
class TaskOptions:
    """Options of the tasks, saved with a task's weights. A task reads those that name it."""

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
    """Number of passes of mask-predict, each of which rewrites the least sure words (caption)."""
    choose_by: Literal["itm", "likelihood"] = "likelihood"
    """Figure that chooses among captions of different lengths: a token's mean log-likelihood, or ITM's log-odds, whose
    head judges features that it was not trained on, because caption trains the encoders without it."""

    def plain(self) -> dict[str, Any]:
        """The options alone, as plain values for JSON."""
        values = {option.name: getattr(self, option.name) for option in fields(TaskOptions)}
        return {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig(TaskOptions, StartSettings, RunConfig):
    """Configuration of a fine-tuning run. `model` follows from the checkpoint. ConfigError for invalid settings."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.random_weights and self.adapted:
            raise ConfigError(
                "random_weights: wanted no part with lora, as adapters need weights; leave one of them out"
            )
        if self.own_loss is not None:
            raise ConfigError(
                f"own_loss: wanted none in fine-tuning, whose loss is that of its task, got {self.own_loss}; write a "
                f"task of your own (docs/guides/tasks.md)"
            )

    @property
    def options(self) -> TaskOptions:
        """The options of the task among the settings."""
        return TaskOptions(**{option.name: getattr(self, option.name) for option in fields(TaskOptions)})
