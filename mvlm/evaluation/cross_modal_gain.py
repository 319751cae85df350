"""Cross-modal gain, a measure of how much one modality helps to predict masked parts of the other (docs/method.md).

For text: the loss of masked tokens given a wrong image, minus the loss given the right one, in nats per token. For
pixels: the relative increase of the masked pixels' loss given a wrong caption, in per cent. Every sample is masked
several times; intervals are bootstrapped over samples.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mvlm.device import autocast
from mvlm.inference.encode import EncodedSplit, eval_loader
from mvlm.model.maskvlm import MaskVLM
from mvlm.model.packing import mask_tokens
from mvlm.model.patches import masked_patches, patchify
from mvlm_dataloading import Dataset, Loader, Tokenizer

RESAMPLES = 1000


@dataclass
class _Sums:
    """Sums per sample, each float64 (I,): losses with the right and the wrong partner, and masked tokens."""

    text: np.ndarray
    text_wrong: np.ndarray
    tokens: np.ndarray
    pixels: np.ndarray
    pixels_wrong: np.ndarray


def wrong_partners(number: int, seed: int = 0) -> Tensor:
    """A wrong partner for each sample, int64 (number,): the next one in a random cycle over all samples.

    Each sample is a partner once. With one sample, the partner is the sample itself.
    """
    order = torch.from_numpy(np.random.default_rng(seed).permutation(number))
    partner = torch.empty_like(order)
    partner[order] = order.roll(-1)
    return partner


@torch.no_grad()
def cross_modal_gain(
    model: MaskVLM,
    dataset: Dataset,
    features: EncodedSplit,
    tokenizer: Tokenizer,
    draws: int = 4,
    precision: str = "auto",
) -> dict[str, Any]:
    """Cross-modal gain in both directions with 95 % intervals, and the masked losses with the right partner.

    Args:
        features: `encode_split` of the same model and dataset.
        draws: Masks drawn for each sample.
        precision: auto, bf16 or fp32.
    """
    sums = _Sums(*(np.zeros(len(dataset)) for _ in range(5)))
    partner = wrong_partners(len(dataset))
    for draw in range(draws):
        _add_losses(sums, model, eval_loader(dataset, model, tokenizer, seed=draw), features, partner, precision)

    def text(i: np.ndarray) -> float:
        return (sums.text_wrong[i] - sums.text[i]).sum() / sums.tokens[i].sum()

    def pixels(i: np.ndarray) -> float:
        return 100 * (sums.pixels_wrong[i].sum() / sums.pixels[i].sum() - 1)

    all_samples = np.arange(len(dataset))
    return {
        "gain_text_nats": round(float(text(all_samples)), 4),
        "gain_text_nats_95": bootstrap(text, len(dataset)),
        "gain_pixels_pct": round(float(pixels(all_samples)), 3),
        "gain_pixels_pct_95": bootstrap(pixels, len(dataset)),
        "masked_nats": round(float(sums.text.sum() / sums.tokens.sum()), 4),
        "masked_l1": round(float(sums.pixels.mean() / draws), 4),
    }


def _add_losses(
    sums: _Sums, model: MaskVLM, loader: Loader, features: EncodedSplit, partner: Tensor, precision: str
) -> None:
    device = next(model.parameters()).device
    for batch, masks in loader:
        own = batch.sample_id
        rows = own.numpy()
        batch, masks = batch.to(device), masks.to(device)
        hidden = mask_tokens(batch.tokens, masks.token_ids, model.config.mask_token_id)
        targets = model.patch_targets(batch.images, masks.patch_ids)
        masked_in = torch.searchsorted(batch.cu_seqlens[1:].long(), masks.token_ids, right=True)  # (M,) rows
        with autocast(device, precision):
            wm, key_mask = model.encode_text(hidden, batch.cu_seqlens, batch.max_length)
            vm = model.encode_image(batch.images, masked_patches(masks.patch_ids, model.config.num_patches))
        for partners, text, pixels in (
            (own, sums.text, sums.pixels),
            (partner[own], sums.text_wrong, sums.pixels_wrong),
        ):
            v, caption = features.v[partners].to(device), features.first[partners]
            w, other_mask = features.w[caption].to(device), features.key_mask[caption].to(device)
            with autocast(device, precision):
                logits = model.fill_mask(v, wm, key_mask, batch.cu_seqlens, masks.token_ids).float()
                predicted = model.reconstruct(vm, w, other_mask, masks.patch_ids).float()
            nats = F.cross_entropy(logits, batch.tokens[masks.token_ids], reduction="none").double()
            text[rows] += (
                torch.zeros(len(rows), dtype=torch.float64, device=device).index_add(0, masked_in, nats).cpu().numpy()
            )
            pixels[rows] += (predicted - targets).abs().mean((1, 2)).double().cpu().numpy()
        sums.tokens[rows] += np.bincount(masked_in.cpu().numpy(), minlength=len(rows))


def bootstrap(statistic: Callable[[np.ndarray], float], number: int, seed: int = 0) -> list[float]:
    """95 % interval of a statistic of sample indices: the percentile bootstrap over resamples of `number` samples.

    `scipy.stats.bootstrap` with `method="percentile"` gives the same interval.
    """
    rng = np.random.default_rng(seed)
    values = [statistic(rng.integers(number, size=number)) for _ in range(RESAMPLES)]
    return [round(float(v), 4) for v in np.percentile(values, (2.5, 97.5))]


def trivial_losses(
    model: MaskVLM, train: Dataset | None, split: Dataset, tokenizer: Tokenizer, most: int = 4096
) -> dict[str, float | None]:
    """Masked L1 on `split` of two image-blind predictors: constant white, and the training set's median.

    The median is taken per pixel and channel over the first `most` training images; None without a training split.
    """
    encoder, config = model.image_encoder, model.config
    device = next(model.parameters()).device
    guesses = {"masked_l1_white": torch.full((1, 3, config.image_size, config.image_size), 255, dtype=torch.uint8)}
    if train is not None:
        guesses["masked_l1_train_median"] = _median_image(model, train, tokenizer, most)
    patches = {name: patchify(encoder.normalize(g.to(device)), config.patch_size) for name, g in guesses.items()}
    totals = dict.fromkeys(guesses, 0.0)
    for batch, masks in eval_loader(split, model, tokenizer):
        ids = masks.patch_ids.to(device)
        targets = model.patch_targets(batch.images.to(device), ids)
        for name, guess in patches.items():
            chosen = guess.expand(len(ids), -1, -1).gather(1, ids.unsqueeze(-1).expand_as(targets))
            totals[name] += (chosen - targets).abs().mean((1, 2)).sum().item()
    means = {name: round(total / len(split), 4) for name, total in totals.items()}
    return {"masked_l1_train_median": None, **means}


def _median_image(model: MaskVLM, train: Dataset, tokenizer: Tokenizer, most: int) -> Tensor:
    """Median per pixel and channel of the first `most` images of `train`, uint8 (1, 3, S, S)."""
    images, taken = [], 0
    for batch, _ in eval_loader(train, model, tokenizer):
        images.append(batch.images.cpu())
        taken += len(batch.images)
        if taken >= most:
            break
    return torch.from_numpy(np.median(torch.cat(images)[:most].numpy(), axis=0)).to(torch.uint8)[None]
