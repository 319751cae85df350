"""Image-text retrieval: fine-tuning with ITC and ITM alone, over the global batch.

All pairs of a batch that share the image or the caption text are right answers of one another: ITC's target gives them
equal shares (ALBEF), and ITM never draws one as a negative. Evaluation is that of `mvlm.evaluation.retrieval`, so
`mvlm eval retrieval` takes a fine-tuned run as it takes a pretraining run.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from mvlm.config.finetune import FinetuneConfig
from mvlm.device import autocast
from mvlm.distributed.global_batch import backward_global
from mvlm.distributed.parallel import Parallel
from mvlm.distributed.stopwatch import Stopwatch
from mvlm.distributed.world import World
from mvlm.errors import ConfigError
from mvlm.evaluation.retrieval import encode_split, rank_all, recall
from mvlm.evaluation.workspace import Workspace
from mvlm.model.implementation import Implementation
from mvlm.model.maskvlm import MaskVLM
from mvlm.objectives.losses import Losses
from mvlm.objectives.pretraining import ITC, ITM
from mvlm.tasks.task import Task, TaskOptions
from mvlm_dataloading import Batch, DataError, Dataset, Masks

T = TypeVar("T")
OBJECTIVES = ITC(shared_positives=True), ITM()
OF_OTHER_TASKS = {"question_id": "vqa", "pairID": "entailment", "identifier": "pairs"}
"""Fields of metadata that only questions of another task have."""


@dataclass(frozen=True)
class _Network:
    """Stands for the data-parallel pretraining network that `backward_global` wants, and calls that inside a task.

    task: the data-parallel wrapper of the whole task.
    """

    task: Parallel

    @property
    def model(self) -> MaskVLM:
        return self.task.model.model

    @property
    def alone(self) -> Stopwatch:
        return self.task.alone

    def __call__(self, function: Callable[[Any], T], last: bool = True) -> T:
        return self.task(lambda task: function(task.model), last)


class Retrieval(Task):
    """Retrieval of captions for an image and of images for a caption. It has no head of its own."""

    name = "retrieval"
    main = "mean_r1"
    whole_batch = True
    # 10 passes over the 145,000 captions of Flickr30k
    recipe: ClassVar = {"max_steps": 5_700, "flip": 0.5, "lr_cross": 1e-5, "rerank": 128}
    unused = ("image_encoder.mask_token", "image_decoder", "pixel_head", "language_head")

    def __init__(self, model: MaskVLM, options: TaskOptions, state: dict[str, Any]) -> None:
        if model.config.contrastive != "softmax":
            raise ConfigError(
                f"checkpoint: wanted a model with the paper's ITC, whose target right answers share, got contrastive "
                f"{model.config.contrastive}; fine-tune another model"
            )
        super().__init__(model, options, state)

    @classmethod
    def make_state(cls, train: Dataset, options: TaskOptions) -> dict[str, Any]:
        """No state. DataError if the data are questions of another task, ConfigError if a modality is to be hidden."""
        if options.blind != "no":
            raise ConfigError(f"blind: wanted no, got {options.blind}; retrieval without a modality is chance")
        known = [OF_OTHER_TASKS[name] for name in train.metadata(0) if name in OF_OTHER_TASKS]
        if known:
            raise DataError(
                f"{train.where(0)}: wanted images with captions, found a sample of the task {known[0]}; "
                f"name a data set of images and captions"
            )
        return {}

    @classmethod
    def has_head(cls, options: TaskOptions) -> bool:
        """False: the task adds no weights to the model's."""
        return False

    def backward(
        self,
        parallel: Parallel,
        microbatches: Sequence[tuple[Batch, Masks]],
        targets: Sequence[Tensor],
        world: World,
        config: FinetuneConfig,
        step: int | Tensor,
    ) -> Losses:
        """Compute the losses of the global batch, equal on all ranks, and the parameters' gradients."""
        return backward_global(
            _Network(parallel),  # pyright: ignore[reportArgumentType]
            [(batch, None) for batch, _ in microbatches],  # nothing is masked
            world,
            seed=config.seed,
            step=step,
            plan=config.plan,
            objectives=OBJECTIVES,
            autocast=partial(autocast, world.device, config.precision),
        )

    @torch.no_grad()
    def evaluate(
        self, dataset: Dataset, precision: str, implementation: Implementation, workspace: Workspace
    ) -> tuple[dict[str, float], list[dict[str, Any]]]:
        """Recall at k on a split in per cent, after re-ranking by ITC and ITM together, and an empty list.

        The best `rerank` candidates of ITC are re-ranked. `tr_` is image to text, `ir_` text to image, and `mean_r1`
        the mean of both R@1. The list is that of predictions in other tasks.

        EvaluationStopped if the workspace asks for an early end.
        """
        features = encode_split(self.model, dataset, self.tokenizer, precision, workspace)
        ranks = rank_all(self.model, features, self.options.rerank, precision, workspace=workspace, answers=False)
        figures = {f"{name}_{r}": value for name, found in ranks.items() for r, value in recall(found.itm).items()}
        return {"mean_r1": (figures["tr_r1"] + figures["ir_r1"]) / 2, **figures}, []
