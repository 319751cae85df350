"""Cross-modal gain: how much one modality helps to predict masked parts of the other (docs/explain/method.md).

For text: the loss of masked tokens given a wrong image, minus the loss given the right one, in nats per token. For
pixels: the relative increase of the masked pixels' L1 given a wrong caption, in per cent. It is taken of MIM's loss, of
the same loss with an untrained pixel head on the same features, and of pixels. With normalised targets the model
predicts the mean and deviation of a patch that pixels need; nothing is read from the true patch. Every sample is masked
several times; intervals are bootstrapped over samples.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mvlm.device import autocast
from mvlm.evaluation.retrieval import EncodedSplit
from mvlm.evaluation.workspace import Workspace
from mvlm.inference.encode import BATCH, eval_loader
from mvlm.model.encoders import patchify
from mvlm.model.fast import encode_masked, reconstruct
from mvlm.model.maskvlm import MaskVLM
from mvlm.objectives.losses import pixel_errors
from mvlm.statistics import grouped_bootstrap
from mvlm_dataloading import Batch, Dataset, Masks, Tokenizer
from mvlm_dataloading.captions import first_captions
from mvlm_dataloading.dataset.dataset import first_samples
from mvlm_dataloading.loader.masking import draw_patch_masks, draw_token_masks

RESAMPLES = 1000


def wrong_partners(number: int, seed: int = 0, image: Tensor | None = None, words: Tensor | None = None) -> Tensor:
    """Index of a sample with another image and another caption, for each of `number` samples: int64 (number,).

    It is the next such sample in a random cycle through all samples. Without repeated images and captions each sample
    is a partner once. If no sample differs in both, it is the next with another image; else the next of all, which is
    the sample itself if there is only one.

    Args:
        image: int64 (number,), equal for samples of one image. Default: each sample has its own.
        words: int64 (number,), equal for samples whose captions have equal words. Default: all differ.
    """
    order = torch.from_numpy(np.random.default_rng(seed).permutation(number))
    following = torch.empty_like(order)
    following[order] = order.roll(-1)
    partner = following
    image, words = (torch.arange(number) if label is None else label for label in (image, words))
    sizes = [_group_sizes(label) for label in (image, words, image * (1 + words.max()) + words)]
    unlike = sizes[0] + sizes[1] - sizes[2] < number  # (number,), True = some sample differs in both
    for chosen, labels in ((sizes[0] < number, [image]), (unlike, [image, words])):
        while bool((same := chosen & torch.stack([x[partner] == x for x in labels]).any(0)).any()):
            partner = torch.where(same, following[partner], partner)
    return partner


def _group_sizes(label: Tensor) -> Tensor:
    """Number of samples that have the same label as sample i, for each i: int64 (number,)."""
    _, group, sizes = label.unique(return_inverse=True, return_counts=True)
    return sizes[group]


def partners_of(split: Dataset) -> Tensor:
    """`wrong_partners` of the samples of a split: with another image by the metadata, and another first caption."""
    images = first_samples(split.metadata(i) for i in range(len(split)))
    words = first_captions(split.captions(i)[0] for i in range(len(split)))
    return wrong_partners(len(split), image=torch.tensor(images), words=torch.tensor(words))


@torch.no_grad()
def cross_modal_gain(
    model: MaskVLM,
    dataset: Dataset,
    features: EncodedSplit,
    tokenizer: Tokenizer,
    draws: int = 4,
    precision: str = "auto",
    workspace: Workspace | None = None,
) -> dict[str, Any]:
    """Cross-modal gain in both directions with 95 % intervals, and the masked losses with the right partner.

    Args:
        features: `encode_split` of the same model and dataset.
        draws: Masks drawn for each sample.
    """
    workspace = workspace or Workspace()
    partner = wrong_partners(len(dataset), image=features.image, words=features.words[features.first])
    sums = workspace.array("gain", (len(dataset), 9), torch.float64)

    def work(start: int, stop: int) -> Iterator[None]:
        for batch, _ in eval_loader(dataset.rows(start, stop), model, tokenizer):
            own = torch.arange(start, start + len(batch.images))
            found = [
                _losses(model, batch, masks_of(model, batch, own, seed), features, own, partner[own], precision)
                for seed in range(draws)
            ]
            sums.write(start, torch.stack(found).sum(0))
            start += len(own)
            yield

    workspace.share("gain", len(dataset), BATCH, work, "images")
    text, text_wrong, mim, mim_wrong, untrained, untrained_wrong, pixels, pixels_wrong, tokens = sums.tensor.numpy().T

    ends = grouped_bootstrap(text_wrong - text, weights=tokens, resamples=RESAMPLES)
    return {
        "gain_text_nats": round(float((text_wrong - text).sum() / tokens.sum()), 4),
        "gain_text_nats_95": [round(end, 4) for end in ends],
        **_increase("gain_mim_pct", mim, mim_wrong),
        **_increase("gain_untrained_pct", untrained, untrained_wrong),
        **_increase("gain_pixels_pct", pixels, pixels_wrong),
        "masked_nats": round(float(text.sum() / tokens.sum()), 4),
        "masked_mim": round(float(mim.mean() / draws), 4),
        "masked_l1": round(float(pixels.mean() / draws), 4),
    }


def _increase(name: str, right: np.ndarray, wrong: np.ndarray) -> dict[str, Any]:
    """Relative increase of a summed loss with the wrong partner, in per cent, and its 95 % interval as NAME_95.

    Args:
        name: key of the figure.
        right, wrong: (number,), losses of the samples with the right and with the wrong partner.
    """
    ratios = grouped_bootstrap(wrong, weights=right, resamples=RESAMPLES)
    return {
        name: round(float(100 * (wrong.sum() / right.sum() - 1)), 3),
        f"{name}_95": [round(100 * (ratio - 1), 4) for ratio in ratios],
    }


def untrained_weight(model: MaskVLM) -> Tensor:
    """Weight (3*P*P, C) of a pixel head as it is initialised, always the same."""
    weight, generator = torch.empty(model.pixel_head.weight.shape), torch.Generator().manual_seed(0)
    return nn.init.trunc_normal_(weight, std=0.02, generator=generator).to(model.pixel_head.weight)


def masks_of(model: MaskVLM, batch: Batch, samples: Tensor, seed: int) -> Masks:
    """Masks of a batch of the samples int64 (B,), as `eval_loader` with this seed draws them; on the batch's device."""
    config, lengths = model.config, batch.cu_seqlens.diff()
    patch_ids = draw_patch_masks(seed, 0, samples.numpy(), image_size=config.image_size, masking=config)
    token_ids = draw_token_masks(seed, 0, samples.numpy(), lengths.cpu().numpy(), ratio=config.text_mask_ratio)
    return Masks(patch_ids=torch.from_numpy(patch_ids), token_ids=torch.from_numpy(token_ids))


def _losses(
    model: MaskVLM,
    batch: Batch,
    masks: Masks,
    features: EncodedSplit,
    own: Tensor,
    partner: Tensor,
    precision: str,
) -> Tensor:
    """Losses of a batch of the samples `own` int64 (B,), float64 (B, 9) on the CPU.

    Columns: nats of the masked tokens, with the right and the wrong image; MIM's loss, MIM's loss with an untrained
    pixel head, and L1 of the masked pixels, each with the right and the wrong caption; number of masked tokens.
    """
    device = next(model.parameters()).device
    lengths = batch.cu_seqlens.diff().cpu()
    caption_of_token = torch.arange(len(lengths)).repeat_interleave(lengths)[masks.token_ids].to(device)  # (M,)
    batch, masks = batch.to(device), masks.to(device)
    head, true = model.pixel_head, model.patch_targets(batch.images, masks.patch_ids)  # (B, K, 3*P*P)
    kind, target, untrained = model.config.mim_loss, head.target(true), untrained_weight(model)
    with autocast(device, precision):
        vm, wm = encode_masked(model, batch, masks)
    text, images = [], []
    for partners in (own, partner):
        v, w = features.images(partners, device), features.texts(features.first[partners], device)
        with autocast(device, precision):
            logits, x = reconstruct(model, vm, wm, v, w, batch, masks)
            predicted = head(x)
            errors = (
                pixel_errors(predicted, target, kind),
                pixel_errors(F.linear(x, untrained), target, kind),
                pixel_errors(head.pixels(predicted, x), true, "l1"),
            )
        nats = F.cross_entropy(logits.float(), batch.tokens[masks.token_ids], reduction="none").double()
        text.append(nats.new_zeros(len(own)).index_add(0, caption_of_token, nats))
        images.append([each.mean((1, 2)).double() for each in errors])
    right_and_wrong = [losses for both in zip(*images, strict=True) for losses in both]
    tokens = caption_of_token.bincount(minlength=len(own))
    return torch.stack([*text, *right_and_wrong, tokens], dim=1).cpu()


def trivial_losses(
    model: MaskVLM,
    train: Dataset | None,
    split: Dataset,
    tokenizer: Tokenizer,
    most: int = 4096,
    workspace: Workspace | None = None,
) -> dict[str, float | None]:
    """Masked L1 on `split` of two image-blind predictors: constant white, and the training set's median.

    The median is taken per pixel and channel over the first `most` training images; None without a training split.
    """
    workspace = workspace or Workspace()
    encoder, config = model.image_encoder, model.config
    device = next(model.parameters()).device
    white = torch.full((1, 3, config.image_size, config.image_size), 255, dtype=torch.uint8)
    median = workspace.array("median", tuple(white.shape), torch.uint8)
    losses = workspace.array("trivial", (len(split), 2), torch.float64)

    def find_median(start: int, stop: int) -> Iterator[None]:
        median.write(start, white if train is None else _median_image(model, train, tokenizer, most))
        yield

    def add_losses(start: int, stop: int) -> Iterator[None]:
        guesses = [patchify(encoder.normalize(guess.to(device)), config.patch_size) for guess in (white, median.tensor)]
        for batch, _ in eval_loader(split.rows(start, stop), model, tokenizer):
            ids = masks_of(model, batch, torch.arange(start, start + len(batch.images)), 0).patch_ids.to(device)
            targets = model.patch_targets(batch.images.to(device), ids)
            chosen = [g.expand(len(ids), -1, -1).gather(1, ids.unsqueeze(-1).expand_as(targets)) for g in guesses]
            errors = [(guess - targets).abs().mean((1, 2)).double() for guess in chosen]
            losses.write(start, torch.stack(errors, dim=1))
            start += len(ids)
            yield

    workspace.share("median", 1, 1, find_median, "median images")
    workspace.share("trivial", len(split), BATCH, add_losses, "images")
    of_white, of_median = (round(value, 4) for value in losses.tensor.mean(0).tolist())
    return {"masked_l1_train_median": None if train is None else of_median, "masked_l1_white": of_white}


def _median_image(model: MaskVLM, train: Dataset, tokenizer: Tokenizer, most: int) -> Tensor:
    """Median per pixel and channel of the first `most` images of `train`, uint8 (1, 3, S, S)."""
    images, taken = [], 0
    for batch, _ in eval_loader(train, model, tokenizer):
        images.append(batch.images.cpu())
        taken += len(batch.images)
        if taken >= most:
            break
    return torch.from_numpy(np.median(torch.cat(images)[:most].numpy(), axis=0)).to(torch.uint8)[None]
