"""Masks that a user's function draws, on the rank and for the microbatch that are masked (docs/guides/own_ideas.md).

They are drawn in the training loop, which knows the number of the update and has the model, not in the loader's thread.

Shape legend: B pairs of a microbatch, K masked patches per image, M masked tokens, T packed tokens, N patches,
L tokens of the longest caption.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mvlm.config.groups import RunConfig
from mvlm.device import autocast
from mvlm.distributed.coordination import run_on_all_ranks
from mvlm.distributed.parallel import Parallel
from mvlm.distributed.world import World
from mvlm.errors import RunError
from mvlm.inference.attention_maps import recorded_attention
from mvlm.model import plain
from mvlm_dataloading import Batch, Loader, Masks
from mvlm_dataloading.loader.masking import MaskDrawer
from mvlm_dataloading.masking import Masking


@dataclass(frozen=True, kw_only=True)
class MaskDraw:
    """Input of a function of --own-masks: one microbatch to mask, and what masks may depend on. Tensors are on the CPU.

    Masks that follow from `seed`, `step`, and each sample's `batch.epoch` and `batch.sample_id` are those of any number
    of ranks and microbatches, and of a resumed run.
    """

    batch: Batch
    """Images and captions. `batch.sample_id` and `batch.epoch`, int64 (B,) each, name the samples. With a GPU the
    images are there."""
    masks: Masks
    """Masks that the loader drew, by the settings of the run."""
    seed: int
    """Seed of the run."""
    step: int
    """Number of the update, from 0: equal for all its microbatches and ranks, and counted on by a resumed run."""
    masking: Masking
    """Settings of the loader's masks."""
    loader: Loader
    """The loader, with its `tokenizer`."""
    parallel: Parallel
    """The model on its ranks."""
    config: RunConfig
    """Settings of the run."""

    def random(self, **changes: Any) -> Masks:
        """Random masks of this microbatch, by the settings of the run with some fields of `Masking` changed.

        They are a function of seed, epoch and sample. Without a change they are `masks`. With another ratio, those of a
        smaller one are among those of a larger one.
        """
        side = self.config.model_at(self.step).image_size
        draw = MaskDrawer(replace(self.masking, **changes), side, self.loader.tokenizer, self.seed)
        batch = self.batch
        assert batch.epoch is not None
        epochs, samples = batch.epoch.numpy(), batch.sample_id.numpy()
        found = draw(epochs, samples, epochs, samples, batch.tokens.numpy(), batch.cu_seqlens.diff().long().numpy())
        return Masks(**{name: torch.from_numpy(values) for name, values in found.items()})

    def attention(self) -> Tensor:
        """Attention of each caption's [CLS] to the patches of its image: float32 (B, N), on the CPU, rows add up to 1.

        It is that of the model as the update before left it, a mean over layers and heads of the text's cross-modality
        encoder, for unmasked images and captions. It costs a forward pass, and the host waits for the device.

        NOTE: with --parallel fsdp the pass is a collective. All ranks have to ask for it in the same updates, or they
        wait for ever.
        """
        device = next(self.parallel.model.parameters()).device
        batch = self.batch.to(device)

        def attend(model: Any) -> Tensor:
            network = getattr(model, "model", model)  # in fine-tuning, that of the task
            with autocast(device, self.config.precision):
                image, text = plain.encode_unmasked(network, batch)
                words, key_mask = text.padded()  # (B, L, C), (B, L)
                with recorded_attention(network.text_cross) as layers:
                    network.text_cross(words, image, key_mask, None)
            return torch.stack([layer.weights[:, :, 0, 1:].float().mean(1) for layer in layers]).mean(0)

        with torch.no_grad():
            found = self.parallel(attend, last=False)
        return (found / found.sum(1, keepdim=True)).cpu()


def drawn_by_user(
    function: Callable[[MaskDraw], Masks],
    loaded: Sequence[tuple[Batch, Masks]],
    step: int,
    config: RunConfig,
    world: World,
    loader: Loader,
    parallel: Parallel,
) -> list[tuple[Batch, Masks]]:
    """The microbatches of an update with masks that a user's function draws, in place of those that were loaded.

    step: number of the update. RunError on all ranks for masks that no model can learn from, or with another number of
    patches somewhere.
    """

    def draw() -> list[tuple[Batch, Masks]]:
        shared = {"seed": loader.seed, "step": step, "masking": loader.masking, "loader": loader}
        found = []
        for batch, masks in loaded:
            asked = MaskDraw(batch=batch, masks=masks, parallel=parallel, config=config, **shared)
            found.append((batch, own := function(asked)))
            check_masks(own, batch, config.model_at(step).num_patches)
        return found

    found = run_on_all_ranks(world, draw)
    # A mean over the patches of each microbatch is the mean over those of the global batch only if they are as many.
    own = sorted({masks.patch_ids.shape[1] for _, masks in found})
    numbers = sorted({number for each in world.gather_objects(own) for number in each})
    if len(numbers) > 1:
        raise _wrong(f"as many masked patches in each image of update {step}", f"{numbers[0]} and {numbers[-1]}")
    return found


def check_masks(masks: Any, batch: Batch, patches: int) -> None:
    """Raise RunError unless `masks` are valid for a batch: in the form of `Masks`, with at least one patch and token.

    patches: number of patches of an image.
    """
    if not isinstance(masks, Masks):
        raise _wrong("Masks", type(masks).__name__)
    parts = {
        "patch_ids": (masks.patch_ids, (len(batch.images),), patches),
        "token_ids": (masks.token_ids, (), len(batch.tokens)),
    }
    for name, (ids, shape, total) in parts.items():
        given = f"{ids.dtype} {tuple(ids.shape)} on {ids.device}"
        if (
            ids.dtype != torch.int64
            or ids.shape[:-1] != shape
            or ids.ndim != len(shape) + 1
            or ids.device.type != "cpu"
        ):
            raise _wrong(f"{name} int64 {(*shape, 'number')} on the CPU", given)
        if not ids.numel() or ids.min() < 0 or ids.max() >= total or (ids.diff() <= 0).any():
            raise _wrong(f"{name} that ascend, one or more, in [0, {total})", "others")
    special = torch.cat([batch.cu_seqlens[:-1], batch.cu_seqlens[1:] - 1]).long()
    if torch.isin(masks.token_ids, special).any():
        raise _wrong("token_ids of words", "a special token, [CLS] or [SEP]")


def _wrong(wanted: str, found: str) -> RunError:
    return RunError(f"own_masks: wanted {wanted}, found {found}; correct the function (docs/guides/own_ideas.md)")
