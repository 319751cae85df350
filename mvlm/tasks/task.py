"""A downstream task: a pretrained model with a head, its loss, its predictions, and their score.

A task of your own is one file with a subclass of `Task`, and commands take the file in place of a task's name
(docs/guides/tasks.md). A task of the library is such a file in `mvlm/tasks/` (`mvlm.tasks`).

A sample of a task's data set is one question: its text is the sample's caption, and all else is in the sample's
metadata.

Shape legend: B batch, C width, M masked tokens, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from operator import attrgetter, itemgetter
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mvlm.config.finetune import FinetuneConfig
from mvlm.config.finetune import TaskOptions as TaskOptions
from mvlm.config.model import MaskVLMConfig
from mvlm.device import autocast
from mvlm.distributed.coordination import run_on_all_ranks
from mvlm.distributed.parallel import Parallel
from mvlm.distributed.world import World
from mvlm.errors import ConfigError
from mvlm.evaluation.workspace import Workspace
from mvlm.inference.encode import BATCH, eval_loader
from mvlm.model.implementation import Implementation
from mvlm.model.maskvlm import IMPLEMENTATIONS, MaskVLM
from mvlm.objectives.losses import Losses
from mvlm_dataloading import Batch, DataError, Dataset, Masks, Tokenizer

GREY = 128
"""Value, of 0..255, of all pixels of the image that a model sees in place of a hidden one (`blind image`)."""


class TaskLosses(NamedTuple):
    """Loss of a batch, a scalar with a gradient, and its accuracy in 0..1, a scalar without."""

    total: Tensor
    accuracy: Tensor
    counted: int = 1
    """Denominator of the accuracy, such as a number of tokens, where it differs between batches of as many samples."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """Prediction for a sample with its score, as a report's page of right and wrong examples shows it."""

    sample: int
    text: str
    """The question, hypothesis or statement; empty for a caption."""
    predicted: str
    wanted: str
    """The right answer or answers, as the report shows them."""
    score: float
    """Score of this sample in per cent. The mean over all verdicts of a split is the task's main figure."""
    right: bool | None
    """True if the prediction counts as right; None if it is partly right, such as an answer of too few annotators."""
    label: str = ""
    """The right label, for a confusion matrix; empty for a task without labels."""


class Task(nn.Module):
    """A pretrained model with a head for a downstream task, its loss, its predictions and their score.

    A subclass defines `name`, `main`, and the methods that raise NotImplementedError here.

    Args:
        model: the pretrained model; its parameters are those of the task.
        options: settings, saved with the weights.
        state: everything else that predictions depend on, such as the list of answers; plain JSON, made by `make_state`
            from the training split and saved with the weights.
    """

    name: ClassVar[str]
    """Name on the command line."""
    main: ClassVar[str]
    """Figure by which models are compared and selected; higher is better."""
    bootstrapped_over: ClassVar[str] = ""
    """Plural noun of the units over which the intervals of `score` are bootstrapped, such as "images"; for results."""
    recipe: ClassVar[dict[str, Any]] = {}
    """Settings of the recipe `base` that the task sets otherwise: fields of `FinetuneConfig` to values.

    It is a literal, because it is read without running the file (`mvlm.tasks.stated`).
    """
    prediction_options: ClassVar[dict[str, str]] = {}
    """Options that change how predictions are made, with their help: `mvlm eval` has flags for them. A literal too."""
    whole_batch: ClassVar[bool] = False
    """True if the loss contrasts all pairs of the global batch. The task then has a `backward` and an `evaluate` of its
    own, and no `losses`, `predict` and `score` (`mvlm.tasks.retrieval`)."""
    reads_texts: ClassVar[bool] = True
    """False if it predicts from the image alone."""
    shares: ClassVar[bool] = False
    """True if the task takes batches that hold an image or text of several samples once (`Batch.image_of`)."""
    unused: ClassVar[tuple[str, ...]] = (
        "image_encoder.mask_token", "image_decoder", "pixel_head", "language_head", "image_projection",
        "text_projection", "log_scale", "matching_head",
    )  # fmt: skip
    """Submodules and parameters of the model that the task does not use, by dotted name. They are not trained."""

    def __init__(self, model: MaskVLM, options: TaskOptions, state: dict[str, Any]) -> None:
        super().__init__()
        self.model, self.options, self.state = model, options, state
        for part in self.unused:
            attrgetter(part)(model).requires_grad_(False)
        if model.logit_bias is not None:
            model.logit_bias.requires_grad_(False)
        for encoder in (model.image_cross, model.text_cross):
            # The last block computes [CLS] alone. The bias of the keys adds the same number to all scores of that row,
            # so its gradient is zero, and the fast implementation leaves it out.
            encoder.layers[-1].self_attention.key.bias.requires_grad_(False)

    def set_tokenizer(self, tokenizer: Tokenizer) -> None:
        """Set the model's tokenizer. It is called before the first loss or prediction."""
        self.tokenizer = tokenizer

    @classmethod
    def make_state(cls, train: Dataset, options: TaskOptions) -> dict[str, Any]:
        """Everything beside weights and options that predictions depend on, such as a list of answers, as plain JSON.

        DataError if the samples of the training split are not questions of this task.
        """
        raise NotImplementedError

    @classmethod
    def check_references(cls, validation: Dataset, state: dict[str, Any]) -> None:
        """Raise DataError, before training, for a validation split that the task cannot score. Optional.

        state: made by `make_state` from the training split.
        """

    @classmethod
    def check_split(cls, dataset: Dataset, state: dict[str, Any]) -> None:
        """Raise DataError for a split that `score` refuses, before it is predicted."""
        cls.check_references(dataset, state)

    @classmethod
    def has_head(cls, options: TaskOptions) -> bool:
        """True if the task adds weights to the model's, which can be trained alone."""
        return True

    @classmethod
    def longest_text(
        cls, state: dict[str, Any], options: TaskOptions, tokenizer: Tokenizer, config: MaskVLMConfig
    ) -> int:
        """Most tokens that a sample's text may have. ConfigError if they are too few for any."""
        return config.text_length

    @classmethod
    def example(cls, samples: int) -> tuple[dict[str, Any], Sequence[Tensor]]:
        """State and targets of `samples` invented samples, in the published data set's sizes, for `mvlm plan --task`.

        ConfigError from a task that defines none.
        """
        raise ConfigError(f"task: wanted one with an example to plan with, got {cls.name}; define its `example`")

    def targets(self, dataset: Dataset) -> Sequence[Tensor]:
        """Targets of all samples of a split, for `losses`: tensors (samples, ...).

        Empty if a batch has all that the loss needs.
        """
        return ()

    def loader_options(self) -> dict[str, Any]:
        """Keyword arguments by which the task's data loaders differ from those of pretraining.

        `strip`, the number of images side by side in a sample's image, is passed on to `Augment`.
        """
        return {}

    def backward(
        self,
        parallel: Parallel,
        microbatches: Sequence[tuple[Batch, Masks]],
        targets: Sequence[Tensor],
        world: World,
        config: FinetuneConfig,
        step: int | Tensor,
    ) -> Losses:
        """Compute the loss of the global batch, and the parameters' gradients.

        The losses have no gradient. Their `accuracy` is NaN if nothing was judged.

        Args:
            targets: `targets` of the whole training split, on the device.
            step: number of the optimizer step.
        """
        number, implementation = len(microbatches), IMPLEMENTATIONS[config.plan]
        shares = []
        for place, (batch, masks) in enumerate(microbatches):

            def forward(task: Task, batch=batch, masks=masks) -> TaskLosses:
                own = [x[batch.sample_id] for x in targets]
                with autocast(world.device, config.precision):
                    return task.losses_of_step(batch, masks, own, implementation)

            losses = parallel(forward, last=place == number - 1)
            parallel.alone.stop()
            # All microbatches have as many samples, so the loss is the mean of theirs, and DDP averages over ranks.
            (losses.total / number).backward()
            counted = torch.full_like(losses.accuracy, losses.counted)
            parts = losses.total, losses.accuracy * counted, counted
            shares.append(torch.stack([x.detach().float() for x in parts]))
        loss, right, judged = world.all_reduce(torch.stack(shares).sum(0))
        return Losses(total=loss / (number * world.size), accuracy=right / judged)

    def losses_of_step(
        self, batch: Batch, masks: Masks, targets: Sequence[Tensor], implementation: Implementation
    ) -> TaskLosses:
        """Loss and accuracy of a training batch with the loader's random masks, which `losses` does not get.

        A subclass overrides it only if its loss depends on the masks.
        """
        return self.losses(batch, targets, implementation)

    def losses(self, batch: Batch, targets: Sequence[Tensor], implementation: Implementation) -> TaskLosses:
        """Loss and accuracy of a batch. `targets` are the rows of the batch's samples."""
        raise NotImplementedError

    def predict(self, batch: Batch, implementation: Implementation) -> list[dict[str, Any]]:
        """Prediction for each sample of a batch, as a dict of plain values such as {"answer": "red"}."""
        raise NotImplementedError

    @torch.no_grad()
    def evaluate(
        self, dataset: Dataset, precision: str, implementation: Implementation, workspace: Workspace
    ) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """Evaluate a split: (figures, ``{"sample": number, **prediction}`` of each sample in order), on every rank.

        Each rank predicts a part of the split, in the batches that one rank would make. The task must be in eval mode.
        EvaluationStopped if the workspace asks for an early end.
        """
        options = {"per_image": 1 if self.shares else None, **self.loader_options()}
        records: list[dict[str, Any]] = []

        def predict(start: int, stop: int) -> Iterator[None]:
            for batch, _ in eval_loader(dataset.rows(start, stop), self.model, self.tokenizer, **options):
                with autocast(self.log_scale.device, precision):
                    predicted = self.predict(batch.to(self.log_scale.device), implementation)
                ids = batch.sample_id.tolist()
                records.extend({"sample": start + i, **record} for i, record in zip(ids, predicted, strict=True))
                yield

        workspace.share("predictions", len(dataset), BATCH, predict)
        found = [record for part in workspace.world.gather_objects(records) for record in part]
        found.sort(key=itemgetter("sample"))
        assert [record["sample"] for record in found] == list(range(len(dataset)))
        return run_on_all_ranks(workspace.world, lambda: self.score(found, dataset)), found

    @classmethod
    def score(cls, records: list[dict[str, Any]], dataset: Dataset) -> dict[str, Any]:
        """Figures of the predictions for a split.

        A 95 % interval has the key `NAME_95`. `majority` is a baseline: the main figure if every prediction were the
        most frequent right answer.

        records: ``{"sample": number, **prediction}`` of each sample, in order.
        """
        raise NotImplementedError

    @classmethod
    def judge(cls, records: Sequence[dict[str, Any]], dataset: Dataset) -> list[Verdict] | None:
        """Right or wrong, for each prediction of a split, in order; None if reports show no examples of the task.

        records: ``{"sample": number, **prediction}`` of each sample, in order.
        """
        return None

    @property
    def config(self) -> MaskVLMConfig:
        """Configuration of the model."""
        return self.model.config

    @property
    def log_scale(self) -> Tensor:
        """The model's log inverse temperature (1,)."""
        return self.model.log_scale

    def clamp_temperature(self) -> None:
        """Clamp the temperature of the model's contrastive loss to its range, after an optimizer step."""
        self.model.clamp_temperature()

    def describe(self) -> dict[str, Any]:
        """Name, options and state of the task as plain JSON, from which a checkpoint's task is made again."""
        return {"name": self.name, "options": self.options.plain(), "state": self.state}

    def hide(self, batch: Batch) -> Batch:
        """Replace the modality that the option `blind` hides: images by a grey one, or all words of texts by [MASK].

        The grey image stands in the batch once, and so does each length of masked text; a text's number of tokens
        stays visible. The host never waits for the GPU.
        """
        if self.options.blind == "no":
            return batch
        images, captions = batch.pairs()  # (B,) each
        batch = replace(
            batch, image_of=images, caption_of=captions, sample_tokens=batch.sample_tokens or len(batch.tokens)
        )
        if self.options.blind == "image":
            grey = torch.full_like(batch.images[:1], GREY)
            return replace(batch, images=grey, image_of=torch.zeros_like(images))
        first, mask = batch.tokens[:1], torch.full_like(batch.tokens[:1], self.config.mask_token_id)
        last = batch.tokens[batch.cu_seqlens[1:2].long() - 1]
        lengths = range(2, batch.max_length + 1)
        tokens = torch.cat([torch.cat([first, mask.expand(length - 2), last]) for length in lengths])
        bounds = F.pad(torch.arange(2, batch.max_length + 1, device=tokens.device).cumsum(0), (1, 0)).int()
        number = batch.cu_seqlens.diff().long()[captions]  # (B,), tokens of each sample's text
        return replace(batch, tokens=tokens, cu_seqlens=bounds, caption_of=number - 2)

    def fuse(self, batch: Batch, implementation: Implementation, images: int = 1) -> Tensor:
        """Features (B, n 3 C) of B samples with n `images` side by side: those of each image with the text, in order.

        The features of an image are [CLS] of both cross-modality encoders, image and text, and their product. An image
        or text that several samples share is encoded once.
        """
        batch = self.hide(batch)
        if self.options.blind == "image":
            # All samples of a text are one pair.
            texts = torch.arange(len(batch.cu_seqlens) - 1, device=batch.tokens.device)
            alone = replace(batch, image_of=torch.zeros_like(texts), caption_of=texts, sample_tokens=len(batch.tokens))
            return self._fuse(alone, implementation, images).index_select(0, batch.pairs()[1])
        return self._fuse(batch, implementation, images)

    def _fuse(self, batch: Batch, implementation: Implementation, images: int) -> Tensor:
        """Features (B, n 3 C) of `fuse`, of a batch in which `hide` has hidden a modality if it was to."""
        pixels = batch.images.unflatten(3, (images, -1)).movedim(3, 1).flatten(0, 1)  # (I n, 3, S, S)
        v, text = implementation.encode_unmasked(self.model, replace(batch, images=pixels))
        strips, texts = batch.pairs()  # (B,) each
        of = (images * strips[:, None] + torch.arange(images, device=pixels.device)).flatten()  # (B n,)
        known = images * batch.sample_tokens or None
        image, caption = implementation.fuse_pairs(
            self.model, v, text, of, texts.repeat_interleave(images), max_rows=known
        )
        features = torch.cat([image, caption, image * caption], dim=1)  # (B n, 3 C)
        return features.unflatten(0, (-1, images)).flatten(1)


class AnswerHead(nn.Module):
    """Linear, LayerNorm, GELU, linear: from fused features (B, F) to logits (B, answers).

    The last layer starts at zero, so that training starts from equal probabilities, or from those of the bias that a
    task sets.
    """

    def __init__(self, features: int, hidden: int, answers: int) -> None:
        super().__init__()
        self.dense = nn.Linear(features, hidden)
        self.norm = nn.LayerNorm(hidden)
        self.answers = nn.Linear(hidden, answers)
        nn.init.xavier_uniform_(self.dense.weight)
        for tensor in (self.dense.bias, self.answers.weight, self.answers.bias):
            nn.init.zeros_(tensor)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, answers), float32, from fused features (B, F)."""
        return self.answers(F.gelu(self.norm(self.dense(x)))).float()


class LabelTask(Task):
    """Task that chooses one of a few labels, by a classifier on features of image and text together.

    A subclass defines `labels`, `labelled` and `score`.
    """

    main = "accuracy"
    shares = True
    labels: ClassVar[tuple[str, ...]]
    """Labels in the order of the logits."""

    def __init__(self, model: MaskVLM, options: TaskOptions, state: dict[str, Any]) -> None:
        super().__init__(model, options, state)
        if tuple(state["labels"]) != self.labels:
            raise DataError(f"labels: wanted {', '.join(self.labels)} in this order, found {state['labels']}")
        self.images: int = state.get("images", 1)
        width = model.config.width
        self.head = AnswerHead(self.images * 3 * width, 2 * width, len(self.labels))

    @classmethod
    def labelled(cls, dataset: Dataset, images: int | None = None, repeated: bool = False) -> list[dict[str, Any]]:
        """Metadata of all samples of a split, each with its right answer in `label`. DataError for one of another task.

        Args:
            images: wanted number of images of a sample; None for that of the first sample.
            repeated: a sample may occur again, as in the training split of a weighted view.
        """
        raise NotImplementedError

    @classmethod
    def make_state(cls, train: Dataset, options: TaskOptions) -> dict[str, Any]:
        """The labels in the order of the logits."""
        cls.labelled(train, repeated=True)
        return {"labels": list(cls.labels)}

    @classmethod
    def example(cls, samples: int) -> tuple[dict[str, Any], tuple[Tensor]]:
        """State and targets of `samples` invented samples, for an estimate of costs."""
        return {"labels": list(cls.labels)}, (torch.zeros(samples, dtype=torch.int64),)

    @classmethod
    def check_references(cls, validation: Dataset, state: dict[str, Any]) -> None:
        cls.labelled(validation, state.get("images"))

    def targets(self, dataset: Dataset) -> tuple[Tensor]:
        """Index in `labels` of the right label of each sample, int64 (samples,)."""
        records = self.labelled(dataset, self.images, repeated=True)
        return (torch.tensor([self.labels.index(record["label"]) for record in records]),)

    def logits(self, batch: Batch, implementation: Implementation) -> Tensor:
        """Logits of the labels (B, labels), float32."""
        return self.head(self.fuse(batch, implementation, self.images))

    def losses(self, batch: Batch, targets: Sequence[Tensor], implementation: Implementation) -> TaskLosses:
        """Mean cross-entropy of the labels, and accuracy, of a batch."""
        logits, (labels,) = self.logits(batch, implementation), targets
        return TaskLosses(F.cross_entropy(logits, labels), (logits.argmax(1) == labels).float().mean())

    def predict(self, batch: Batch, implementation: Implementation) -> list[dict[str, Any]]:
        """The most probable label of each sample."""
        return [{"label": self.labels[i]} for i in self.logits(batch, implementation).argmax(1).tolist()]

    @classmethod
    def judge(cls, records: Sequence[dict[str, Any]], dataset: Dataset) -> list[Verdict]:
        """Verdict of each record: predicted label, right label, right or wrong."""
        verdicts = []
        for i, (record, asked) in enumerate(zip(records, cls.labelled(dataset), strict=True)):
            label, right = asked["label"], record["label"] == asked["label"]
            verdicts.append(Verdict(i, dataset.captions(i)[0], record["label"], label, 100.0 * right, right, label))
        return verdicts
