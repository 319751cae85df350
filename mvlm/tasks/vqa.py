"""Visual question answering (VQA v2, easy-VQA, scenes), by a classifier or masked answers.

- classifier, METER's and BEiT-3's form and the default: binary cross-entropy with the answers' soft targets, summed
  over answers.
- masked: the answer's words are masked and predicted, as in pretraining; every weight was pretrained. A text is
  `[CLS] [MASK] ... [MASK] question [SEP]`, with as many [MASK]s as the longest answer of the list has tokens, its [SEP]
  included. All are predicted at once, from the image. An answer's likelihood is the product of the probabilities of its
  tokens and of the [SEP] behind them. The loss is the log-likelihood of each answer that an annotator gave, weighted by
  the share of annotators who gave it (ALBEF).

A sample's metadata holds `question_id` and `answers`, a record {answer, answer_id} per annotator, as in VQA v2's
annotations. Answers are compared as the official metric compares them: normalised, unless all annotators agree.

Shape legend: B batch, S samples of a split, H largest number of answers per question, I images, U questions, T packed
tokens, N patches, L tokens of the longest text, R answers that are learned, Q their packed tokens, A masks of a text,
C width, V vocabulary.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mvlm.config.model import MaskVLMConfig
from mvlm.errors import ConfigError
from mvlm.model.encoders import KeyValueCache
from mvlm.model.implementation import Implementation
from mvlm.model.maskvlm import MaskVLM
from mvlm.objectives.losses import at_least_float32
from mvlm.tasks.metrics.vqa import (
    answer_accuracy,
    answer_fault,
    compared_answers,
    normalize_answer,
    score_answers,
    soft_targets,
    strip_answer,
    warn_of_few_answers,
)
from mvlm.tasks.score import read_json
from mvlm.tasks.task import AnswerHead, Task, TaskLosses, TaskOptions, Verdict
from mvlm_dataloading import Batch, DataError, Dataset, Tokenizer

ANSWERS_OF_A_QUESTION = 10
LOGITS_AT_A_TIME = 1 << 24
"""Largest number of logits that exist at a time while answers are ranked: 64 MiB in fp32."""
SHORTEST_QUESTION = 8
"""Tokens that a question must at least have room for, [CLS] and [SEP] included."""


def questions(dataset: Dataset, may_lack_answers: bool = False, repeated: bool = False) -> list[dict[str, Any]]:
    """Metadata of all samples. DataError for a sample that is not a question with answers and an id of its own.

    With `may_lack_answers`, a split without any answers is fine too, as VQA v2's test split is. Without it, questions
    with too few answers for the metric are logged. With `repeated`, an id may occur again, as in a weighted view.
    """
    found = [dataset.metadata(i) for i in range(len(dataset))]
    unanswered = may_lack_answers and not any(record.get("answers") for record in found)
    seen: set[str] = set()
    for i, record in enumerate(found):
        if "question_id" not in record or not (unanswered or record.get("answers")):
            raise DataError(
                f"{dataset.where(i)}: wanted a question with `question_id` and `answers`, found {sorted(record)}; "
                f"`mvlm data easy-vqa` writes such data"
            )
        number = str(record["question_id"])
        if number in seen and not repeated:
            raise DataError(f"{dataset.where(i)}: question_id {number} occurs twice; evaluate data without copies")
        seen.add(number)
        if record.get("answers") and (fault := answer_fault(record["answers"])):
            raise DataError(f"{dataset.where(i)}: {fault}")
    if not may_lack_answers:
        warn_of_few_answers(found)
    return found


def mean_targets(records: list[dict[str, Any]], answers: list[str]) -> list[float]:
    """Mean over n questions of each answer's soft target, at most 1 - 1 / 2n so that its logit is finite.

    Args:
        records: metadata of the questions, with `answers`.
        answers: each must be given to at least one question.
    """
    sums: dict[str, float] = dict.fromkeys(answers, 0.0)
    for record in records:
        for answer, target in soft_targets(record["answers"]).items():
            if answer in sums:
                sums[answer] += target
    return [min(total, len(records) - 0.5) / len(records) for total in sums.values()]


def annotator_shares(record: dict[str, Any]) -> dict[str, float]:
    """Share of a question's annotators who gave each answer, as the metric compares it; the shares add up to 1."""
    counts = Counter(compared_answers(record["answers"])[0])
    return {answer: count / counts.total() for answer, count in counts.items()}


def main_answer(record: dict[str, Any]) -> str:
    """A question's most frequent answer, the first of equally frequent ones: VQA v2's `multiple_choice_answer`."""
    return Counter(compared_answers(record["answers"])[0]).most_common(1)[0][0]


class AnswerTable(nn.Module):
    """Tokens int64 (answers, A) of a list of answers, each its words, [SEP] and padding, and their lengths (answers,).

    A is the length of the longest answer, [SEP] included. The buffers are not in a state dict.
    """

    def __init__(self, answers: Sequence[str], tokenizer: Tokenizer, text_length: int) -> None:
        super().__init__()
        tokens, lengths = tokenizer.encode(answers, text_length)
        rows = torch.zeros(len(answers), int(lengths.max()), dtype=torch.int64)
        rows[torch.arange(rows.shape[1]) < torch.from_numpy(lengths)[:, None]] = torch.from_numpy(tokens)
        self.tokens: Tensor
        self.lengths: Tensor
        self.register_buffer("tokens", rows[:, 1:], persistent=False)  # without [CLS]
        self.register_buffer("lengths", torch.from_numpy(lengths) - 1, persistent=False)

    @property
    def masks(self) -> int:
        """Number A of [MASK]s that have room for any answer of the list: tokens of the longest, [SEP] included."""
        return self.tokens.shape[1]


def with_masks(batch: Batch, number: int, mask_token_id: int) -> Batch:
    """Copy of a batch of packed texts with `number` [MASK]s inserted into each text, behind its [CLS]."""
    bounds = batch.cu_seqlens.long()  # (U+1,)
    added = number * torch.arange(len(bounds), device=bounds.device)
    row = torch.arange(len(batch.tokens), device=bounds.device)
    text = torch.searchsorted(bounds[1:], row, right=True)
    place = row + number * (text + (row != bounds[:-1][text.clamp(max=len(bounds) - 2)]))
    tokens = batch.tokens.new_full((len(row) + number * (len(bounds) - 1),), mask_token_id)
    return replace(
        batch,
        tokens=tokens.scatter(0, place, batch.tokens),
        cu_seqlens=(bounds + added).int(),
        max_length=batch.max_length + number,
        sample_tokens=batch.sample_tokens and batch.sample_tokens + number * len(batch.sample_id),
    )


def mask_features(model: MaskVLM, batch: Batch, number: int, implementation: Implementation) -> Tensor:
    """Features (B, A, C) of the A = `number` [MASK]s of each text, which attends to its image.

    An image or a question that several samples share is encoded once.
    """
    batch = with_masks(batch, number, model.config.mask_token_id)
    v, text = implementation.encode_unmasked(model, batch)  # (I, 1+N, C), U questions
    lengths = batch.cu_seqlens.diff().long()  # (U,)
    shared: dict[str, Any] = {}
    if batch.image_of is not None:
        images, texts = batch.pairs()  # (B,) each
        lengths = lengths.index_select(0, texts)  # (B,)
        shared = {"images": images, "texts": texts, "total": batch.sample_tokens}
    first = lengths.cumsum(0) - lengths + 1  # behind [CLS]
    tokens = first[:, None] + torch.arange(number, device=first.device)  # (B, A)
    return implementation.fuse_tokens(model, KeyValueCache(v), text, tokens, **shared)


def answers_loss(
    model: MaskVLM,
    x: Tensor,
    table: AnswerTable,
    answers: Tensor,
    of: Tensor,
    weights: Tensor,
    implementation: Implementation,
) -> TaskLosses:
    """Sum of the negative log-likelihoods of R answers, each times its weight; and the accuracy of their tokens.

    On a GPU the host waits for the number of tokens.

    Args:
        x: features of the [MASK]s (B, A, C).
        table: tokens of all answers.
        answers: index in the table of each answer, int64 (R,).
        of: index of each answer's sample in the batch, int64 (R,).
        weights: factor of each answer's loss (R,).
    """
    there = torch.arange(table.masks, device=x.device) < table.lengths[answers][:, None]  # (R, A)
    answer, place = there.nonzero(as_tuple=True)  # (Q,) each
    at = of.index_select(0, answer) * x.shape[1] + place
    features, each = x.flatten(0, 1).index_select(0, at), weights.index_select(0, answer)
    targets = table.tokens[answers][there]
    return TaskLosses(*implementation.token_loss(model, features, targets, each), counted=len(targets))


def likeliest(model: MaskVLM, x: Tensor, table: AnswerTable) -> Tensor:
    """Index of the likeliest answer of a table for each of B questions, int64 (B,).

    x: (B, A, C), features of a question's [MASK] tokens. A is the number of tokens of the longest answer.
    """
    words = table.tokens  # (answers, A)
    counts = torch.arange(words.shape[1], device=words.device) < table.lengths[:, None]
    best = []
    for part in x.split(max(1, LOGITS_AT_A_TIME // (x.shape[1] * model.config.vocab_size))):
        log_p = at_least_float32(model.language_head(part)).log_softmax(-1)  # (b, A, V)
        scores = log_p.new_zeros(len(part), len(words))
        for place in range(words.shape[1]):
            scores += log_p[:, place].index_select(1, words[:, place]) * counts[:, place]
        best.append(scores.argmax(1))
    return torch.cat(best)


class VisualQuestionAnswering(Task):
    """Visual question answering: chooses from a list of answers by a classifier, or by filling in [MASK]s."""

    name = "vqa"
    bootstrapped_over = "images"
    main = "accuracy"
    shares = True
    recipe: ClassVar = {"max_steps": 13_900, "min_count": 9}  # 8 passes over the 443,757 questions of VQA v2

    def __init__(self, model: MaskVLM, options: TaskOptions, state: dict[str, Any]) -> None:
        super().__init__(model, options, state)
        answers = state["answers"]
        if len(set(answers)) < max(2, len(answers)):
            raise DataError(f"answers: wanted at least 2 different ones, found {answers[:20]}")
        self.masked = options.answers == "masked"
        width = model.config.width
        model.language_head.requires_grad_(self.masked)
        if self.masked:
            model.image_cross.requires_grad_(False)  # only texts attend to the other modality
        else:
            self.head = AnswerHead(3 * width, 2 * width, len(answers))
            if "means" in state:  # older checkpoints have none, and their own bias is loaded instead
                with torch.no_grad():
                    self.head.answers.bias.copy_(torch.tensor(state["means"], dtype=torch.float64).logit())

    def set_tokenizer(self, tokenizer: Tokenizer) -> None:
        """Set the model's tokenizer, and tokenize the list of answers if answers are masked."""
        super().set_tokenizer(tokenizer)
        if self.masked:
            table = AnswerTable(self.state["answers"], tokenizer, self.config.text_length)
            self.table = table.to(self.log_scale.device)

    @classmethod
    def has_head(cls, options: TaskOptions) -> bool:
        """True for the classifier, which is new. Masked answers are predicted by the pretrained language head."""
        return options.answers == "classifier"

    @classmethod
    def longest_text(
        cls, state: dict[str, Any], options: TaskOptions, tokenizer: Tokenizer, config: MaskVLMConfig
    ) -> int:
        """Most tokens of a question. ConfigError if the masks of the longest answer leave no room for one."""
        if options.answers != "masked":
            return config.text_length
        masks = AnswerTable(state["answers"], tokenizer, config.text_length).masks
        if config.text_length - masks < SHORTEST_QUESTION:
            raise ConfigError(
                f"question_length: wanted at least {masks + SHORTEST_QUESTION}, room for the {masks} masks of the "
                f"longest answer and for a question, got {config.text_length}"
            )
        return config.text_length - masks

    @property
    def masks(self) -> int:
        """Number of [MASK]s before a question: tokens of the longest answer and [SEP]; 0 unless answers are masked."""
        return self.table.masks if self.masked else 0

    def loader_options(self) -> dict[str, Any]:
        """Loader options that cut questions to the length that the answer's masks leave."""
        return {"text_length": self.config.text_length - self.masks}

    @classmethod
    def make_state(cls, train: Dataset, options: TaskOptions) -> dict[str, Any]:
        """The list of answers that can be predicted, `answers`; and, for a classifier, `means`.

        `means` is the mean target of each answer, from which the classifier's biases start. From equal probabilities it
        would spend its first steps on learning that all answers but one are wrong.

        The list is that of the options' file, or the most frequent answers of at least `min_count` training questions
        each, most frequent first. METER and BEiT-3 count so, over training and validation questions: 9 gives
        their 3,129 answers.

        Raises:
            DataError: `train` is not a training split, its samples are no questions, or the list has fewer than two
                answers, or one that no training question has.
        """
        if train.split != "train":
            raise DataError(
                f"{train.folder}: wanted the split train, from which alone the list of answers may come, found the "
                f"split {train.split}; name the data set with the training questions"
            )
        records = questions(train, repeated=True)
        counts = Counter(answer for record in records for answer in soft_targets(record["answers"]))
        main = Counter(map(main_answer, {record["question_id"]: record for record in records}.values()))  # no copies
        kept = sorted((a for a in main if main[a] >= options.min_count), key=lambda answer: (-main[answer], answer))
        if options.answer_list is not None:
            kept = read_answers(options.answer_list, counts)
        if len(kept) < 2:
            wanted, remedy = f"with {options.min_count} training questions each", "lower --min-count"
            if options.answer_list is not None:
                wanted, remedy = f"in {options.answer_list}", "add answers to the file"
            raise DataError(f"{train.folder}: wanted at least 2 answers {wanted}, found {len(kept)}; {remedy}")
        return {"answers": kept} | ({"means": mean_targets(records, kept)} if options.answers == "classifier" else {})

    @classmethod
    def example(cls, samples: int) -> tuple[dict[str, Any], tuple[Tensor, Tensor]]:
        """State with 3,129 answers, as METER and BEiT-3 have for VQA v2, and targets of so many invented questions."""
        shape = samples, ANSWERS_OF_A_QUESTION
        return {"answers": [str(i) for i in range(3129)]}, (torch.zeros(shape, dtype=torch.int64), torch.zeros(shape))

    @classmethod
    def check_references(cls, validation: Dataset, state: dict[str, Any]) -> None:
        questions(validation)

    @classmethod
    def check_split(cls, dataset: Dataset, state: dict[str, Any]) -> None:
        warn_of_few_answers(questions(dataset, may_lack_answers=True))

    def targets(self, dataset: Dataset) -> tuple[Tensor, Tensor]:
        """Indices int64 (S, H) of each question's answers in the list, and their targets (S, H).

        A row ends with indices -1 and targets 0; answers that are not in the list are left out. Targets are soft
        targets for the classifier, shares of annotators for masked answers.
        """
        place = {answer: i for i, answer in enumerate(self.state["answers"])}
        records = questions(dataset, repeated=True)
        ids = torch.full((len(records), ANSWERS_OF_A_QUESTION), -1)
        values = torch.zeros(len(records), ANSWERS_OF_A_QUESTION)
        for row, record in enumerate(records):
            given = annotator_shares(record) if self.masked else soft_targets(record["answers"])
            known = [(place[a], t) for a, t in given.items() if a in place]
            for column, (answer, target) in enumerate(known[:ANSWERS_OF_A_QUESTION]):
                ids[row, column], values[row, column] = answer, target
        return ids, values

    def losses(self, batch: Batch, targets: Sequence[Tensor], implementation: Implementation) -> TaskLosses:
        """Mean loss of a batch of questions, and accuracy.

        Accuracy is the share of right tokens for masked answers, the mean target of the likeliest answer for the
        classifier.

        targets: indices and targets of the batch's answers, rows of what the method `targets` returns.
        """
        ids, values = targets
        if self.masked:
            of, column = (ids >= 0).nonzero(as_tuple=True)  # (R,) each
            x = mask_features(self.model, self.hide(batch), self.masks, implementation)
            weights = values[of, column] / len(ids)
            return answers_loss(self.model, x, self.table, ids[of, column], of, weights, implementation)
        logits = self.head(self.fuse(batch, implementation))  # (B, A)
        dense = logits.new_zeros(len(logits), logits.shape[1] + 1)  # the last column takes what has no answer
        dense.scatter_(1, ids.remainder(logits.shape[1] + 1), values.to(dense.dtype))
        dense = dense[:, :-1]
        loss = F.binary_cross_entropy_with_logits(logits, dense, reduction="sum") / len(logits)
        return TaskLosses(loss, dense.gather(1, logits.argmax(1, keepdim=True)).mean().detach())

    def predict(self, batch: Batch, implementation: Implementation) -> list[dict[str, Any]]:
        """The likeliest answer of the list to each question."""
        if self.masked:
            x = mask_features(self.model, self.hide(batch), self.masks, implementation)
            best = likeliest(self.model, x, self.table)
        else:
            best = self.head(self.fuse(batch, implementation)).argmax(1)
        return [{"answer": self.state["answers"][i]} for i in best.tolist()]

    @classmethod
    def judge(cls, records: Sequence[dict[str, Any]], dataset: Dataset) -> list[Verdict]:
        """Verdict of each prediction: right if its VQA accuracy is 1, wrong if it is 0, None between."""
        verdicts = []
        for i, (record, asked) in enumerate(zip(records, questions(dataset), strict=True)):
            counts = Counter(reference["answer"] for reference in asked["answers"])
            wanted = ", ".join(f"{a} ({n} of {counts.total()})" for a, n in counts.most_common())
            wanted = next(iter(counts)) if len(counts) == 1 else wanted
            score = answer_accuracy(record["answer"], asked["answers"])
            right = None if 0 < score < 1 else score == 1
            text, label = dataset.captions(i)[0], main_answer(asked)
            verdicts.append(Verdict(i, text, record["answer"], wanted, 100 * score, right, label))
        return verdicts

    @staticmethod
    def score(records: list[dict[str, Any]], dataset: Dataset) -> dict[str, Any]:
        """VQA accuracy in per cent, by type of answer and question too; its 95 % interval is bootstrapped over images.

        For a split without answers, the number of questions alone: the benchmark's server scores its predictions.
        """
        annotations = questions(dataset, may_lack_answers=True)
        if not any(annotation.get("answers") for annotation in annotations):
            return {"questions": len(annotations)}
        answers = {a["question_id"]: r["answer"] for a, r in zip(annotations, records, strict=True)}
        return {"questions": len(annotations), **score_answers(answers, annotations).all_figures}


def read_answers(path: Path, counts: Counter[str]) -> list[str]:
    """Read the list of answers to choose from: a JSON list of strings, from which repeated and empty ones are dropped.

    An answer that no training question has as it stands is normalised.

    counts: number of training questions with each answer. DataError if an answer of the file is not among them: the
        list then comes from elsewhere, perhaps from the test split.
    """
    found = read_json(path, "a JSON list of answers")
    if not isinstance(found, list) or not all(isinstance(answer, str) for answer in found):
        raise DataError(f'{path}: wanted a JSON list of answers, found something else; write ["yes", "no", ...]')
    given = (answer if answer in counts else normalize_answer(answer) for answer in map(strip_answer, found))
    kept = [answer for answer in dict.fromkeys(given) if answer]
    unknown = [answer for answer in kept if answer not in counts]
    if unknown:
        raise DataError(
            f"{path}: wanted answers to training questions, found {len(unknown)} of {len(kept)} that are none, such "
            f"as {unknown[0]!r}; make the list from the training split alone"
        )
    return kept
