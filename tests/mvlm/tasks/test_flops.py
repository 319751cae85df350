"""FLOPs of a step of each task at `base`, 384 px, on fake tensors: packed text, shared keys, indexed pairs."""

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from mvlm.config.model import MaskVLMConfig
from mvlm.costs.step_cost import MemoryTracker, StepShape, fake_microbatch, give_fake_tensors
from mvlm.model.maskvlm import MaskVLM
from mvlm.tasks.evaluate import find_task
from mvlm.tasks.task import TaskOptions, weighted_cross_entropy
from mvlm.tasks.vqa import mask_features

PAIRS, TOKENS, LONGEST = 8, 12, 40
STATES: dict[str, dict[str, Any]] = {
    "vqa": {"answers": ["yes", "no"]},
    "entailment": {"labels": ["contradiction", "neutral", "entailment"]},
    "pairs": {"labels": ["false", "true"], "images": 2},
    "caption": {},
}


@cache
def step_flops(name: str, plan: str, per_image: int = 1, filled: int = 0) -> int:
    """FLOPs of forward and backward pass of a batch.

    With `per_image`, so many samples share an image. With `filled`, of vqa's masked answers with so many [MASK]s.
    """
    config = replace(MaskVLMConfig.preset("base"), image_size=384)
    shape = StepShape(pairs=PAIRS, tokens=TOKENS, longest=LONGEST, bf16=False)
    images = STATES[name].get("images", 1)
    with torch.device("meta"):
        options = TaskOptions(answers="masked" if filled else "classifier")
        task: Any = find_task(name)(MaskVLM(config), options, STATES[name])
    frozen = {n for n, p in task.named_parameters() if not p.requires_grad}
    with FakeTensorMode(), MemoryTracker(images * PAIRS * (TOKENS + filled)) as tracker:
        give_fake_tensors(task)
        for n, parameter in task.named_parameters():
            parameter.requires_grad_(n not in frozen)
        batch, masks = fake_microbatch(config, shape.pairs, shape.tokens, shape.longest - filled)
        batch = replace(batch, images=torch.empty(PAIRS // per_image, 3, 384, images * 384, dtype=torch.uint8))
        if per_image > 1:
            of = {name: torch.empty(PAIRS, dtype=torch.int64) for name in ("image_of", "caption_of")}
            batch = replace(batch, **of, sample_tokens=PAIRS * TOKENS)
        labels = torch.empty(PAIRS, dtype=torch.int64)
        targets: list[Tensor] = {"caption": [], "vqa": [labels[:, None], torch.empty(PAIRS, 1)]}.get(name, [labels])
        if filled:
            x = mask_features(task.model, batch, filled, plan).flatten(0, 1)
            words, weights = torch.empty(len(x), dtype=torch.int64), torch.empty(len(x))
            loss, _ = weighted_cross_entropy(task.model, x, words, weights, plan)
        else:
            loss = task.losses_of_step(batch, masks, targets, plan).total
        loss.backward()
    return tracker.flops


@pytest.mark.extended
@pytest.mark.slow
@pytest.mark.parametrize("name", STATES)
def test_a_fast_step_computes_no_padding(name):
    """It saves at least the padded rows of all blocks of the text cross encoder but the last."""
    config, images = MaskVLMConfig.preset("base"), STATES[name].get("images", 1)
    products = 6 * 14 * config.width**2 * (config.cross_layers - 1)  # FLOPs of a row: queries, keys, values, MLP
    padding = images * PAIRS * (LONGEST - TOKENS) * products
    assert step_flops(name, "plain") - step_flops(name, "fast") > padding


@pytest.mark.extended
@pytest.mark.slow
@pytest.mark.parametrize("per_image", [1, 4])
def test_masked_answers_compute_no_padding_and_in_the_last_block_no_word_but_the_masked_ones(per_image):
    plain, fast = (step_flops("vqa", plan, per_image=per_image, filled=4) for plan in ("plain", "fast"))
    config = MaskVLMConfig.preset("base")
    padding, products = LONGEST - TOKENS - 4, 6 * config.width**2
    early = padding * 14 * products * (config.cross_layers - 1)
    last = padding * 2 * products + (LONGEST - 4) * 12 * products  # keys and values of all tokens, all else of masks
    assert plain - fast > PAIRS * (early + last)
    assert fast < step_flops("vqa", "fast", per_image=per_image)


@pytest.mark.extended
@pytest.mark.slow
@pytest.mark.parametrize("filled", [0, 4])
def test_questions_about_an_image_share_its_encoding(filled):
    """With four questions an image, a question costs less than half in both implementations."""
    for plan in ("plain", "fast"):
        alone, shared = (step_flops("vqa", plan, n, filled) for n in (1, 4))
        config = MaskVLMConfig.preset("base")
        patches = (384 // config.patch_size) ** 2
        encoder = 3 * 2 * 12 * config.width**2 * config.image_layers * patches  # FLOPs of an image's matrix products
        assert alone - shared > 0.75 * PAIRS * encoder
        assert shared < 0.5 * alone
