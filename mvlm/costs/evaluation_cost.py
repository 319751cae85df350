"""FLOPs of an evaluation, counted by running its parts on fake tensors, and its time on a number of GPUs.

Nothing here has been timed on a GPU. Reading and decoding images is not counted.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from mvlm.config.model import MaskVLMConfig
from mvlm.costs.cluster_plan import ClusterSetting
from mvlm.costs.step_cost import TOKENS, MemoryTracker, fake_microbatch, give_fake_tensors
from mvlm.model.fast import encode_masked, encode_patches, encode_tokens, fuse_pairs, project_patches, reconstruct
from mvlm.model.maskvlm import MaskVLM
from mvlm.model.packing import PackedText, Packing, round_up_length
from mvlm_kernels.hardware import GPUS

SAMPLES, PAIRS = 64, 256
"""Sizes of the batches on which FLOPs are counted: images or captions, and pairs."""
DRAWS = 4
"""Number of random masks for each image in the measurement of cross-modal gain."""


@dataclass(frozen=True, slots=True)
class EvaluationCost:
    """FLOPs of the parts of an evaluation."""

    image: int
    """FLOPs of encoding an image."""
    caption: int
    """FLOPs of encoding a caption."""
    pair: int
    """FLOPs of ITM's score of a pair. Keys and values that pairs have in common are shared among them."""
    reconstruction: int
    """FLOPs of all reconstructions of an image in the measurement of cross-modal gain."""


@torch.no_grad()
def evaluation_cost(config: MaskVLMConfig, pairs_of_an_image: float, tokens: int = TOKENS) -> EvaluationCost:
    """Count the FLOPs of the parts of an evaluation in bf16.

    Args:
        pairs_of_an_image: mean number of captions that ITM scores with an image.
        tokens: number of tokens of each caption.
    """
    with torch.device("meta"):
        model = MaskVLM(config)
    model.set_attention("sdpa", "sdpa")
    with FakeTensorMode(), torch.autocast("cpu", torch.bfloat16):
        give_fake_tensors(model)
        batch, masks = fake_microbatch(config, SAMPLES, tokens, tokens)

        def count(rows: int, work: Callable[[], object]) -> int:
            with MemoryTracker(rows) as tracker:
                work()
            return tracker.flops

        rows, captions = SAMPLES * tokens, (batch.tokens, batch.cu_seqlens, batch.max_length)
        image = count(rows, lambda: model.embed_image(encode_patches(model, project_patches(model, batch.images))))
        caption = count(rows, lambda: model.embed_text(encode_tokens(model, *captions).first()))
        # All pairs of an image lie together. A batch has one image and as many captions, or a few more images.
        images = max(1, int(PAIRS / pairs_of_an_image))
        v, w = torch.empty(images, 1 + config.num_patches, config.width), _captions(config, PAIRS, tokens)
        own, texts = torch.empty(SAMPLES, *v.shape[1:]), _captions(config, SAMPLES, tokens)
        masked = count(rows, lambda: encode_masked(model, batch, masks))
        # With the right partner; once more with a wrong one.
        rebuilt = count(rows, lambda: model.pixel_head(reconstruct(model, own, texts, own, texts, batch, masks)[1]))
        rows, ids = PAIRS * tokens, torch.empty(PAIRS, dtype=torch.int64)
        pair = count(rows, lambda: model.matching_logits(*fuse_pairs(model, v, w, ids, ids, max_rows=rows)))
    return EvaluationCost(
        image // SAMPLES, caption // SAMPLES, pair // PAIRS, DRAWS * (masked + 2 * rebuilt) // SAMPLES
    )


def _captions(config: MaskVLMConfig, number: int, tokens: int) -> PackedText:
    bounds = torch.empty(number + 1, dtype=torch.int32)
    rows = torch.empty(number * tokens, config.width)
    return PackedText(rows, Packing(bounds, round_up_length(tokens), len(rows)))


def format_evaluation(setting: ClusterSetting, images: int, captions: int, candidates: int) -> str:
    """Lines of text that plan an evaluation on the cluster: pairs, FLOPs and time.

    candidates: number of items that ITM re-ranks for each query.
    """
    # If none is a candidate in both directions.
    pairs = images * min(candidates, captions) + captions * min(candidates, images)
    cost = evaluation_cost(setting.model, pairs / images, min(TOKENS, setting.model.text_length))
    judged = pairs * cost.pair
    total = images * (cost.image + cost.reconstruction) + captions * cost.caption + judged  # without ITC's similarities
    peak = GPUS[setting.gpu].flops * setting.ranks
    return "\n".join(
        [
            f"evaluation of {images:,} images and {captions:,} captions, {candidates} candidates:",
            f"  pairs to judge  {pairs:,}, or fewer: a pair that is a candidate twice is judged once",
            f"  FLOPs           {cost.pair / 1e9:.2f} G a pair; {total / 1e15:.3g} P in all, "
            f"{100 * judged / total:.0f} % of them for pairs",
            f"  time            {total / (peak * setting.mfu):.3g} s on {setting.ranks} GPUs at an MFU of "
            f"{setting.mfu:g}, not measured; 3 minutes need an MFU of {total / (peak * 180):.2g}; "
            "images are read besides",
        ]
    )
