"""FLOPs of a step of each task at `base`, 384 px, on fake tensors: `python studies/task_flops.py`.

A sample's forward and backward pass, by the fast and by the plain implementation.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from mvlm.config.model import MaskVLMConfig
from mvlm.costs.step_cost import MemoryTracker, StepShape, fake_microbatch, give_fake_tensors
from mvlm.model.maskvlm import IMPLEMENTATIONS, MaskVLM
from mvlm.tasks.load import find_task
from mvlm.tasks.task import TaskOptions
from mvlm.tasks.vqa import mask_features

PAIRS, TOKENS, LONGEST = 8, 12, 40
"""Samples of a batch, mean tokens of their texts, and tokens of the longest."""
STATES: dict[str, dict[str, Any]] = {
    "vqa": {"answers": ["yes", "no"]},
    "entailment": {"labels": ["contradiction", "neutral", "entailment"]},
    "pairs": {"labels": ["false", "true"], "images": 2},
    "caption": {},
}


def step_flops(name: str, plan: str, per_image: int = 1, filled: int = 0) -> int:
    """FLOPs of forward and backward pass of a batch.

    With `per_image`, so many samples share an image. With `filled`, of vqa's masked answers with so many [MASK]s.
    """
    config, implementation = replace(MaskVLMConfig.preset("base"), image_size=384), IMPLEMENTATIONS[plan]
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
            x = mask_features(task.model, batch, filled, implementation).flatten(0, 1)
            words, weights = torch.empty(len(x), dtype=torch.int64), torch.empty(len(x))
            loss, _ = implementation.token_loss(task.model, x, words, weights)
        else:
            loss = task.losses_of_step(batch, masks, targets, implementation).total
        loss.backward()
    return tracker.flops


FORMS: dict[str, dict[str, Any]] = {
    "classifier of `vqa`": {"name": "vqa"},
    "`entailment`": {"name": "entailment"},
    "masked answers of `vqa`, four [MASK]s": {"name": "vqa", "filled": 4},
    "classifier, four questions an image": {"name": "vqa", "per_image": 4},
    "masked answers, four questions an image": {"name": "vqa", "per_image": 4, "filled": 4},
    "`pairs`, two images": {"name": "pairs"},
    "`caption`": {"name": "caption"},
}

if __name__ == "__main__":
    print("| form | fast | plain |\n|---|---|---|")
    for form, options in FORMS.items():
        fast, plain = (step_flops(plan=plan, **options) / PAIRS / 1e9 for plan in ("fast", "plain"))
        print(f"| {form} | {fast:.1f} | {plain:.1f} |")
