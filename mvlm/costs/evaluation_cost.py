"""FLOPs of an evaluation, counted by running its parts on fake tensors, and its time on a number of GPUs.

Nothing here has been timed on a GPU. Reading and decoding images is not counted.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from mvlm.config.model import MaskVLMConfig
from mvlm.costs.step_cost import MemoryTracker, fake_microbatch, give_fake_tensors
from mvlm.model.fast import encode_masked, encode_patches, encode_tokens, match_pairs, project_patches, reconstruct
from mvlm.model.maskvlm import MaskVLM
from mvlm.model.packing import PackedText, Packing, round_up_length

SAMPLES, PAIRS = 64, 256
"""Images or captions of a batch, and pairs of a batch, on which FLOPs are counted."""
DRAWS = 4
"""Masks of each image, for cross-modal gain."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationShape:
    """Sizes of an evaluation."""

    images: int
    captions: int
    candidates: int
    """Gallery rows that ITM re-ranks for each query."""
    tokens: int = 12
    """Mean number of tokens of a caption."""

    @property
    def pairs(self) -> int:
        """Pairs to judge, if none is a candidate in both directions."""
        of_images, of_captions = min(self.candidates, self.captions), min(self.candidates, self.images)
        return self.images * of_images + self.captions * of_captions


@dataclass(frozen=True, slots=True)
class EvaluationCost:
    """FLOPs of the parts of an evaluation."""

    image: int
    """Of an image's features."""
    caption: int
    """Of a caption's features."""
    pair: int
    """Of ITM's judgement of a pair, with its share of the keys and values that pairs have in common."""
    reconstruction: int
    """Of an image's reconstructions, for cross-modal gain."""

    def total(self, shape: EvaluationShape) -> int:
        """FLOPs of the whole, without ITC's similarities."""
        of_images = shape.images * (self.image + self.reconstruction)
        return of_images + shape.captions * self.caption + shape.pairs * self.pair


@torch.no_grad()
def evaluation_cost(config: MaskVLMConfig, shape: EvaluationShape) -> EvaluationCost:
    """Count the parts of an evaluation, for bf16 and captions of one length."""
    with torch.device("meta"):
        model = MaskVLM(config)
    model.set_attention("sdpa", "sdpa")
    with FakeTensorMode(), torch.autocast("cpu", torch.bfloat16):
        give_fake_tensors(model)
        batch, masks = fake_microbatch(config, SAMPLES, shape.tokens, shape.tokens)

        def count(rows: int, work: Callable[[], object]) -> int:
            with MemoryTracker(rows) as tracker:
                work()
            return tracker.flops

        rows, tokens = SAMPLES * shape.tokens, (batch.tokens, batch.cu_seqlens, batch.max_length)
        image = count(rows, lambda: model.embed_image(encode_patches(model, project_patches(model, batch.images))))
        caption = count(rows, lambda: model.embed_text(encode_tokens(model, *tokens).first()))
        # All pairs of an image lie together. A batch has one image and as many captions, or a few more images.
        images = max(1, PAIRS * shape.images // max(1, shape.pairs))
        v, w = torch.empty(images, 1 + config.num_patches, config.width), _captions(config, PAIRS, shape.tokens)
        rows, ids = PAIRS * shape.tokens, torch.empty(PAIRS, dtype=torch.int64)
        pair = count(rows, lambda: match_pairs(model, v, w, ids, ids, rows))
        own, texts = torch.empty(SAMPLES, *v.shape[1:]), _captions(config, SAMPLES, shape.tokens)
        masked = count(SAMPLES * shape.tokens, lambda: encode_masked(model, batch, masks))
        rebuilt = count(
            SAMPLES * shape.tokens, lambda: reconstruct(model, own, texts, own, texts, batch, masks)
        )  # with the right partner; once more with a wrong one
    return EvaluationCost(
        image // SAMPLES, caption // SAMPLES, pair // PAIRS, DRAWS * (masked + 2 * rebuilt) // SAMPLES
    )


def _captions(config: MaskVLMConfig, number: int, tokens: int) -> PackedText:
    bounds = torch.empty(number + 1, dtype=torch.int32)
    rows = torch.empty(number * tokens, config.width)
    return PackedText(rows, Packing(bounds, round_up_length(tokens), len(rows)))


def format_evaluation(config: MaskVLMConfig, shape: EvaluationShape, peak: float, ranks: int, mfu: float) -> str:
    """The plan of an evaluation as lines of text.

    Args:
        peak: FLOP/s of a GPU.
        ranks: number of GPUs.
        mfu: share of the peak that is reached.
    """
    cost = evaluation_cost(config, shape)
    total = cost.total(shape)
    judged = shape.pairs * cost.pair
    return "\n".join(
        [
            f"evaluation of {shape.images:,} images and {shape.captions:,} captions, {shape.candidates} candidates:",
            f"  pairs to judge  {shape.pairs:,}, or fewer: a pair that is a candidate twice is judged once",
            f"  FLOPs           {cost.pair / 1e9:.2f} G a pair; {total / 1e15:.3g} P in all, "
            f"{100 * judged / total:.0f} % of them for pairs",
            f"  time            {total / (peak * ranks * mfu):.3g} s on {ranks} GPUs at an MFU of {mfu:g}, "
            f"not measured; 3 minutes need an MFU of {total / (peak * ranks * 180):.2g}; images are read besides",
        ]
    )
