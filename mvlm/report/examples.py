"""Examples in a report: reconstructions, filled-in captions, the best and the worst retrievals.

Functions return plain data; `templates/retrieval.html` draws it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mvlm.evaluation.cross_modal_gain import partners_of
from mvlm.evaluation.evaluate import RERANK, unseen_images
from mvlm.evaluation.retrieval import EncodedSplit, rank_all
from mvlm.evaluation.workspace import Workspace
from mvlm.inference.encode import eval_loader
from mvlm.inference.fill_mask import fill_mask
from mvlm.inference.images import hide_patches, load_image
from mvlm.inference.reconstruction import reconstruct
from mvlm.model.maskvlm import MaskVLM
from mvlm.report.html import data_uri
from mvlm_dataloading import Batch, Dataset, Masks, Tokenizer

RECONSTRUCTIONS = 12
FILLED_CAPTIONS = 18
RETRIEVALS = 4  # of each kind


@dataclass(frozen=True, slots=True)
class Example:
    """A text, an image, or both."""

    text: str
    image: str = ""
    """A data URI with a PNG; empty for a text alone."""
    mark: str = ""
    """"right" (drawn green), "wrong" (red) or empty."""


@dataclass(frozen=True, slots=True)
class FilledCaption:
    """A masked caption, and its guesses given the right image and a wrong one."""

    right_image: str
    wrong_image: str
    masked: list[Example]
    with_right: list[Example]
    with_wrong: list[Example]


@dataclass(frozen=True, slots=True)
class Retrieval:
    """One query and its first answers."""

    query: Example
    rank: int
    """Rank of the best right answer, from 1."""
    answers: list[Example]


@dataclass(frozen=True, slots=True)
class RetrievalGroup:
    """The best or the worst retrievals of one direction."""

    title: str
    retrievals: list[Retrieval]


@dataclass(frozen=True, slots=True)
class Samples:
    """Masked samples of a split, on the CPU. S image side, n samples, K masked patches, L tokens of a caption."""

    images: Tensor
    """uint8 (n, 3, S, S)."""
    patch_ids: Tensor
    """int64 (n, K), masked patches."""
    tokens: list[Tensor]
    """int64 (L,) each."""
    masked_tokens: list[Tensor]
    """int64, positions within each caption."""


def chosen_samples(number: int, size: int, seed: int) -> list[int]:
    """A fixed random choice of samples, so that a report shows neither the best nor the first."""
    return sorted(np.random.default_rng(seed).permutation(size)[:number].tolist())


def read_samples(model: MaskVLM, tokenizer: Tokenizer, split: Dataset, wanted: Sequence[int]) -> Samples:
    """Read the wanted samples of a split with their masks, in the split's order, in one pass over it."""
    images, patch_ids, tokens, masked_tokens = [], [], [], []
    for batch, masks in eval_loader(split, model, tokenizer):
        for row, sample in enumerate(batch.sample_id.tolist()):
            if sample in wanted:
                images.append(batch.images[row].cpu())
                patch_ids.append(masks.patch_ids[row])
                row_tokens, row_masked = caption_of(batch, masks, row)
                tokens.append(row_tokens)
                masked_tokens.append(row_masked)
    return Samples(torch.stack(images), torch.stack(patch_ids), tokens, masked_tokens)


def caption_of(batch: Batch, masks: Masks, row: int) -> tuple[Tensor, Tensor]:
    """Tokens of one caption, and the positions within it that are masked."""
    start, end = batch.cu_seqlens[row : row + 2].tolist()
    inside = masks.token_ids[(masks.token_ids >= start) & (masks.token_ids < end)]
    return batch.tokens[start:end], inside - start


def reconstructions(model: MaskVLM, tokenizer: Tokenizer, split: Dataset) -> list[list[Example]]:
    """Strips of four images: the original, masked, rebuilt with its caption, rebuilt with another image's caption."""
    chosen = chosen_samples(RECONSTRUCTIONS, len(split), seed=1)
    samples = read_samples(model, tokenizer, split, chosen)
    partner = partners_of(split)
    captions = [split.captions(i)[0] for i in chosen]
    wrong = [split.captions(int(partner[i]))[0] for i in chosen]
    masked = hide_patches(samples.images, samples.patch_ids, model.config.patch_size)
    with_own = reconstruct(model, tokenizer, samples.images, captions, samples.patch_ids)
    with_wrong = reconstruct(model, tokenizer, samples.images, wrong, samples.patch_ids)
    return [
        [
            Example("original", data_uri(samples.images[row])),
            Example("masked", data_uri(masked[row])),
            Example(captions[row], data_uri(with_own[row])),
            Example(wrong[row], data_uri(with_wrong[row])),
        ]
        for row in range(len(chosen))
    ]


def filled_captions(model: MaskVLM, tokenizer: Tokenizer, split: Dataset) -> list[FilledCaption]:
    """Masked captions, filled in given the right image and given a wrong one."""
    chosen = chosen_samples(FILLED_CAPTIONS, len(split), seed=2)
    partner = partners_of(split)
    others = [int(partner[i]) for i in chosen]
    samples = read_samples(model, tokenizer, split, chosen)
    by_sample = dict(zip(sorted(set(others)), read_samples(model, tokenizer, split, others).images, strict=True))
    other_images = torch.stack([by_sample[i] for i in others])
    lengths = [len(tokens) for tokens in samples.tokens]
    starts = np.concatenate([[0], np.cumsum(lengths)])
    positions = torch.cat([m + int(s) for m, s in zip(samples.masked_tokens, starts[:-1], strict=True)])
    packed = torch.cat(samples.tokens)
    counts = [len(masked) for masked in samples.masked_tokens]
    right, wrong = (
        fill_mask(model, tokenizer, images, packed, lengths, positions)[0][:, 0].split(counts)
        for images in (samples.images, other_images)
    )
    found = []
    for row, (tokens, masked) in enumerate(zip(samples.tokens, samples.masked_tokens, strict=True)):
        masked_out, with_right, with_wrong = (
            marked_caption(tokenizer, tokens, masked, guesses) for guesses in (None, right[row], wrong[row])
        )
        images = data_uri(samples.images[row]), data_uri(other_images[row])
        found.append(FilledCaption(*images, masked_out, with_right, with_wrong))
    return found


def marked_caption(tokenizer: Tokenizer, tokens: Tensor, masked: Tensor, guesses: Tensor | None) -> list[Example]:
    """A caption token by token, without [CLS] and [SEP].

    Masked tokens are blanks if there are no guesses, else the guesses, marked right or wrong.
    """
    pieces, guess_of = [], dict(zip(masked.tolist(), range(len(masked)), strict=True))
    for position, token in enumerate(tokens.tolist()[1:-1], 1):
        if position not in guess_of:
            pieces.append(Example(token_text(tokenizer, token)))
        elif guesses is None:
            pieces.append(Example(" ▢"))
        else:
            guess = int(guesses[guess_of[position]])
            pieces.append(Example(token_text(tokenizer, guess), mark="right" if guess == token else "wrong"))
    return pieces


def token_text(tokenizer: Tokenizer, token: int) -> str:
    """A token's text; byte-level BPE writes the space before a word as Ġ."""
    space = " " if tokenizer.token(token).startswith("Ġ") else ""
    return space + tokenizer.decode([token])


def retrievals(
    model: MaskVLM,
    split: Dataset,
    train: Dataset | None,
    features: EncodedSplit,
    k: int = RERANK,
    workspace: Workspace | None = None,
) -> list[RetrievalGroup]:
    """The right answers with the highest scores and the lowest-ranked right answers, in both directions.

    Args:
        k: candidates that ITM re-ranks; 0 for a model that was trained without ITM.
        workspace: that of `features`. Default: one in memory.
    """
    groups = []
    unseen, both = unseen_images(split, train), rank_all(model, features, k, workspace=workspace)
    queries = {"tr": features.different, "ir": torch.arange(len(features.captions))}
    for direction, title in (("tr", "Image to text"), ("ir", "Text to image")):
        ranks = both[direction]
        pool, among = ranks.itm == 0, ""
        if unseen is not None:
            unseen_pool = pool & unseen[features.different if direction == "tr" else features.owner]
            if unseen_pool.any():
                pool, among = unseen_pool, ", among unseen concepts"
        best = ranks.score.masked_fill(~pool, float("-inf")).topk(min(RETRIEVALS, int(pool.sum()))).indices
        worst = ranks.itm.topk(min(RETRIEVALS, len(ranks.itm))).indices
        for name, chosen in (
            (f"best: right, with the highest scores{among}", best),
            ("worst: right answers ranked lowest", worst),
        ):
            found = [
                retrieval(
                    split, features, direction, int(queries[direction][q]), ranks.top[q].tolist(), int(ranks.itm[q])
                )
                for q in chosen
            ]
            groups.append(RetrievalGroup(f"{title}, {name}", found))
    return groups


def retrieval(
    split: Dataset, features: EncodedSplit, direction: str, query: int, answers: list[int], wrong_before: int
) -> Retrieval:
    """One query with its first answers; `wrong_before` wrong answers rank above the best right one."""

    def mark(image: int, caption: int) -> str:
        return "right" if int(features.owner[caption]) == image else ""

    if direction == "tr":
        asked = Example(split.captions(query)[0], thumbnail(split, query))
        found = [Example(features.captions[a], mark=mark(query, a)) for a in answers]
    else:
        asked = Example(features.captions[query])
        found = [Example(split.captions(a)[0], thumbnail(split, a), mark(a, query)) for a in answers]
    return Retrieval(asked, wrong_before + 1, found)


def thumbnail(split: Dataset, sample: int, side: int = 96) -> str:
    """An image of the split as the model sees it, squeezed to a square, as a data URI."""
    return data_uri(load_image(split.image_bytes(sample), side))
