"""Captions written by mask-predict: all words at once, the least sure ones again.

Training is masked language modelling of a caption from its whole image, with any share of its words masked, and a
linear layer that predicts a caption's length from the image's [CLS] (Mask-Predict, Ghazvininejad et al., EMNLP 2019).
To write, captions of the likeliest lengths start as [MASK]s. Each pass predicts all masked words and masks the words
of lowest probability again. The likelihood, or ITM, chooses among the lengths.

Shape legend: B images, N patches, R captions that are written, W words (tokens without [CLS] and [SEP]) of the longest
one, M masked tokens, T packed tokens, C width, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import replace
from statistics import median
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mvlm.errors import ConfigError
from mvlm.model.encoders import KeyValueCache
from mvlm.model.implementation import Implementation
from mvlm.model.maskvlm import MaskVLM
from mvlm.model.packing import PackedText, mask_tokens
from mvlm.objectives.losses import at_least_float32
from mvlm.tasks.metrics.captions import cider, is_scene, score_captions, tokenize
from mvlm.tasks.task import GREY, Task, TaskLosses, TaskOptions, Verdict
from mvlm_dataloading import Batch, DataError, Dataset, Masks, Tokenizer
from mvlm_dataloading.dataset.dataset import first_samples, image_name

OTHER_TASKS = ("question_id", "pairID", "identifier")
"""Fields of a sample's metadata that only data of other tasks have: VQA, visual entailment and NLVR2."""


def references(dataset: Dataset) -> list[list[str]]:
    """Reference captions of each sample, in order: all captions of its image, over all samples with its `image_id`.

    DataError for a sample of another task.
    """
    lists, named = [], {}
    for i in range(len(dataset)):
        metadata = dataset.metadata(i)
        if others := [name for name in OTHER_TASKS if name in metadata]:
            raise DataError(
                f"{dataset.where(i)}: wanted an image with captions, found the field {others[0]}; "
                f"is it data of another task?"
            )
        name = image_name(metadata)
        texts = [] if name is None else named.setdefault(name, [])
        texts += [caption for caption in dataset.captions(i) if caption not in texts]
        lists.append(texts)  # the list that later samples of the image add to
    return lists


def captions_of_images(
    records: Sequence[dict[str, Any]], dataset: Dataset
) -> tuple[dict[str, str], dict[str, list[str]]]:
    """Two dicts over the images of a split: the caption that a model wrote, and the reference captions.

    Their key is the number, as text, of the image's first sample. If several samples share an image, the caption that
    was written for the first of them counts.

    records: {"caption"} of each sample, in order.
    """
    texts = references(dataset)
    kept = dict.fromkeys(first_samples(dataset.metadata(i) for i in range(len(dataset))))
    return {str(i): records[i]["caption"] for i in kept}, {str(i): texts[i] for i in kept}


class Captioning(Task):
    """Captioning of images: fills in [MASK]s by the pretrained model, after a new linear layer predicts the length."""

    name = "caption"
    bootstrapped_over = "images"
    main = "cider_d"
    reads_texts = False
    unused = (
        "image_encoder.mask_token", "image_cross", "image_decoder", "pixel_head", "image_projection",
        "text_projection", "log_scale", "matching_head",
    )  # fmt: skip
    # 5 passes over the 566,747 captions of COCO
    recipe: ClassVar = {"max_steps": 11_100, "flip": 0.5, "lr_cross": 1e-5}
    prediction_options: ClassVar = {
        "lengths": "Number of lengths to try: a caption is written for each of the likeliest.",
        "iterations": "Passes of mask-predict.",
        "choose_by": "Figure that chooses among the lengths.",
    }

    def __init__(self, model: MaskVLM, options: TaskOptions, state: dict[str, Any]) -> None:
        super().__init__(model, options, state)
        self.head = nn.Linear(model.config.width, model.config.text_length - 2)  # logits of the lengths, from 1
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    @classmethod
    def make_state(cls, train: Dataset, options: TaskOptions) -> dict[str, Any]:
        """Empty state: captions have no list of labels. ConfigError if the options hide the text."""
        if options.blind == "text":
            raise ConfigError("blind: wanted no or image, got text; a caption is written from the image alone")
        references(train)
        return {}

    @classmethod
    def check_references(cls, validation: Dataset, state: dict[str, Any]) -> None:
        references(validation)

    @classmethod
    def example(cls, samples: int) -> tuple[dict[str, Any], tuple[()]]:
        """Empty state and no targets: the loss reads the captions of the batch."""
        return {}, ()

    def loader_options(self) -> dict[str, Any]:
        """Loader options that mask a random share of each caption's words."""
        return {"masking": replace(self.config.masking, text_mask_ratio=None, whole_word_masking=False)}

    def seen(self, images: Tensor) -> Tensor:
        """The images (B, 3, S, S), or uniform grey ones if the option `blind` hides images from the model."""
        return torch.full_like(images, GREY) if self.options.blind == "image" else images

    def losses_of_step(
        self, batch: Batch, masks: Masks, targets: Sequence[Tensor], implementation: Implementation
    ) -> TaskLosses:
        """Masked language modelling and the length's cross-entropy, added; and the accuracy of masked tokens.

        Masked language modelling is the mean over captions of the mean over a caption's masked tokens, so that it does
        not depend on how captions are dealt out to ranks.
        """
        hidden = mask_tokens(batch.tokens, masks.token_ids, self.config.mask_token_id)
        seen = replace(batch, images=self.seen(batch.images), tokens=hidden)
        v, text = implementation.encode_unmasked(self.model, seen)
        targets_of_masks = batch.tokens.index_select(0, masks.token_ids)  # (M,)
        bounds = torch.searchsorted(masks.token_ids, batch.cu_seqlens.long())  # (B+1,)
        caption = torch.searchsorted(bounds[1:], torch.arange(len(masks.token_ids), device=bounds.device), right=True)
        weights = (at_least_float32(v.new_ones(())) / (len(v) * bounds.diff())).index_select(0, caption)  # (M,)
        x = implementation.fuse_tokens(self.model, KeyValueCache(v), text, masks.token_ids)  # (M, C)
        loss, accuracy = implementation.token_loss(self.model, x, targets_of_masks, weights)
        lengths = batch.cu_seqlens.diff().long() - 3  # of the words, less one
        loss = loss + F.cross_entropy(at_least_float32(self.head(v[:, 0])), lengths)
        return TaskLosses(loss, accuracy, counted=len(masks.token_ids))

    def predict(self, batch: Batch, implementation: Implementation) -> list[dict[str, Any]]:
        """A caption for each image. The batch's own captions are not read."""
        v = implementation.encode_pixels(self.model, self.seen(batch.images))  # (B, 1+N, C)
        candidates = min(self.options.lengths, self.head.out_features)
        lengths = 1 + self.head(v[:, 0]).topk(candidates).indices.flatten()  # (R,), the R = B x candidates captions
        of = torch.arange(len(v), device=v.device).repeat_interleave(candidates)
        writer = Writer(self.model, v, of, lengths, self.tokenizer, implementation)
        writer.write(self.options.iterations)
        scores = writer.match() if self.options.choose_by == "itm" else writer.mean_log_probability()
        best = scores.view(-1, candidates).argmax(1)
        rows = (torch.arange(len(v), device=v.device) * candidates + best).tolist()
        words, numbers = writer.words.tolist(), lengths.tolist()
        return [{"caption": self.tokenizer.decode(words[row][: numbers[row]])} for row in rows]

    @classmethod
    def judge(cls, records: Sequence[dict[str, Any]], dataset: Dataset) -> list[Verdict]:
        """A verdict for the first sample of each image: right means a CIDEr-D above the median of the split."""
        written, wanted = captions_of_images(records, dataset)
        scores = (100 * cider(written, wanted)).tolist()
        middle = median(scores)
        return [
            Verdict(int(key), "", written[key], " · ".join(texts), score, score > middle)
            for (key, texts), score in zip(wanted.items(), scores, strict=True)
        ]

    @staticmethod
    def score(records: list[dict[str, Any]], dataset: Dataset) -> dict[str, Any]:
        """CIDEr-D x 100 with its 95 % interval over images, BLEU-1 to 4, and the share equal to a reference.

        Samples with one `image_id` are one image: its caption is the first one's, its references are the captions of
        all. `captions` is the number of images. Where all images hold their scene, precision and recall of the facts
        that captions state are added.
        """
        written, wanted = captions_of_images(records, dataset)
        scenes = {key: scene for key in written if is_scene(scene := dataset.metadata(int(key)).get("scene"))}
        equal = [tokenize(written[key]) in map(tokenize, texts) for key, texts in wanted.items()]
        return {
            "captions": len(written),
            **score_captions(written, wanted, scenes if len(scenes) == len(written) else {}).all_figures,
            "equal": 100 * sum(equal) / len(equal),
        }


class Writer:
    """Writes R captions of given lengths by mask-predict: [MASK]s are filled in, and the least sure words again.

    Args:
        v: features of B images (B, 1+N, C).
        of: image of each caption, int64 (R,).
        lengths: words of each caption, int64 (R,).

    Attributes:
        words: int64 (R, W), [MASK] where a word is not decided, and past a caption's length.
        log_p: (R, W), log-probability with which each word was chosen; 0 past a caption's length.
    """

    def __init__(
        self,
        model: MaskVLM,
        v: Tensor,
        of: Tensor,
        lengths: Tensor,
        tokenizer: Tokenizer,
        implementation: Implementation,
    ) -> None:
        self.model, self.v, self.of, self.lengths = model, v, of, lengths
        self.tokenizer, self.implementation = tokenizer, implementation
        self.cache = KeyValueCache(v)
        self.exists = torch.arange(int(lengths.max()), device=v.device) < lengths[:, None]  # (R, W), True = a word
        self.words = torch.full(self.exists.shape, model.config.mask_token_id, device=v.device)
        self.log_p = at_least_float32(v.new_zeros(self.exists.shape))

    def write(self, iterations: int) -> None:
        """Set all words, in at most `iterations` passes. Every pass but the first predicts fewer words again."""
        self.predict(self.exists)
        for done in range(1, iterations):
            again = self.lengths * (iterations - done) // iterations  # (R,), words to choose again
            if not bool(again.any()):
                return
            sure = self.log_p.masked_fill(~self.exists, torch.inf)
            rank = sure.argsort(dim=1, stable=True).argsort(1)  # (R, W), 0 = the least sure
            chosen = rank < again[:, None]
            self.words.masked_fill_(chosen, self.model.config.mask_token_id)
            self.predict(chosen)

    def predict(self, chosen: Tensor) -> None:
        """Replace [MASK]s by their likeliest tokens other than special ones, and keep the log-probabilities.

        chosen: bool (R, W), True = a [MASK] to replace.
        """
        x = self.implementation.fuse_tokens(self.model, self.cache, self._encode(), images=self.of)  # (T, C)
        rows = F.pad(chosen, (1, 1))[self._tokens()[1]]  # (T,), True = a chosen word
        logits = at_least_float32(self.model.language_head(x[rows]))
        logits[:, self.tokenizer.vocab_size :] = -torch.inf
        special = [self.tokenizer.cls_id, self.tokenizer.sep_id, self.tokenizer.pad_id, self.tokenizer.mask_id]
        logits[:, special] = -torch.inf
        values, words = logits.log_softmax(-1).max(-1)
        self.words[chosen], self.log_p[chosen] = words, values

    def mean_log_probability(self) -> Tensor:
        """Mean log-probability of each caption's words (R,)."""
        return self.log_p.sum(1) / self.lengths

    def match(self) -> Tensor:
        """ITM's log-odds that each caption belongs to its image (R,)."""
        rows = torch.arange(len(self.of), device=self.of.device)
        fused = self.implementation.fuse_pairs(self.model, self.v, self._encode(), self.of, rows)
        logits = self.model.matching_logits(*fused)
        return logits[:, 1] - logits[:, 0]

    def _tokens(self) -> tuple[Tensor, Tensor]:
        """Tokens int64 (R, W + 2) as [CLS] words [SEP], and where they are, bool of this shape, True = a token."""
        tokens = F.pad(self.words, (1, 1), value=self.tokenizer.cls_id)
        tokens.scatter_(1, 1 + self.lengths[:, None], self.tokenizer.sep_id)
        return tokens, torch.arange(tokens.shape[1], device=tokens.device) < self.lengths[:, None] + 2

    def _encode(self) -> PackedText:
        """Text encoder's features of the captions, with [MASK] for the words that are not decided yet."""
        tokens, kept = self._tokens()
        bounds = F.pad((self.lengths + 2).cumsum(0), (1, 0)).int()
        return self.implementation.encode_tokens(self.model, tokens[kept], bounds, tokens.shape[1])
