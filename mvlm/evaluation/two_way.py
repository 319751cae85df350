"""Two-way choices on edited images: does a model read the other modality? (docs/explain/method.md)

Samples come in pairs, whose images differ in one object and whose captions in its words. The words are hidden, and the
choice is between the two images: in which are the words likelier? The object's cell is hidden, and rebuilt with the
caption: to which of the two images is it nearer? A model that ignores the other modality is right on half of them.
"""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mvlm.device import autocast
from mvlm.errors import RunError
from mvlm.evaluation.retrieval import EncodedSplit, encode_split
from mvlm.evaluation.workspace import Workspace
from mvlm.inference.encode import BATCH, eval_loader
from mvlm.model.fast import encode_masked, reconstruct
from mvlm.model.maskvlm import MaskVLM
from mvlm.statistics import grouped_bootstrap
from mvlm_dataloading import Batch, Dataset, Masks, Tokenizer, open_dataset

SPLIT = "edits"
"""Split of pairs of samples, 2k and 2k + 1, that differ in one object. Its metadata has `edit`, the object's cell."""
assert BATCH % 2 == 0, "both samples of a pair are in one batch"


def two_way_choices(
    model: MaskVLM, edits: Dataset, tokenizer: Tokenizer, precision: str = "auto", workspace: Workspace | None = None
) -> dict[str, Any]:
    """Shares of right choices in per cent, of words and of cells, with 95 % intervals over pairs.

    A pair whose captions are equal once they are cut to the model's length has no choice of words, and is left out.

    Args:
        edits: the split `edits` of a data set.

    Raises:
        RunError: the samples are no pairs with `edit` in their metadata.
    """
    workspace = workspace or Workspace()
    check_pairs(edits)
    features = encode_split(model, edits, tokenizer, precision, workspace, f"{SPLIT}_")
    right = workspace.array("choices", (len(edits), 3), torch.float64)

    def work(start: int, stop: int) -> Iterator[None]:
        for batch, _ in eval_loader(edits.rows(start, stop), model, tokenizer):
            own = torch.arange(start, start + len(batch.images))
            cells = [edits.metadata(i)["edit"] for i in own.tolist()]
            right.write(start, _choices(model, batch, cells, features, own, precision))
            start += len(own)
            yield

    workspace.share("choices", len(edits), BATCH, work, "edited images")
    words, cells, chosen = right.tensor.numpy().T
    return {
        "pairs": len(edits) // 2,
        **_share("words", words[chosen > 0], np.arange(len(edits))[chosen > 0] // 2),
        **_share("cells", cells, np.arange(len(edits)) // 2),
    }


def edits_of(dataset: Dataset) -> Dataset | None:
    """Open the split `edits` of the data set that a split belongs to; None if it has none."""
    return open_dataset(dataset.folder, SPLIT) if SPLIT in dataset.splits else None


def check_pairs(edits: Dataset) -> None:
    """Raise RunError unless the samples of a split come in pairs with the same cell."""
    cells = [edits.metadata(i).get("edit") for i in range(len(edits))]
    numbers = [c for c in cells if isinstance(c, list) and len(c) == 4 and all(isinstance(x, int | float) for x in c)]
    if len(numbers) < len(cells) or len(cells) % 2 or cells[::2] != cells[1::2]:
        raise RunError(
            f"{edits.folder}: wanted a split {SPLIT} of pairs, each with one `edit` of four numbers in its metadata, "
            "found another; build it again, or rename the split"
        )


def patches_in(cells: Sequence[Sequence[float]], patches_a_side: int) -> Tensor:
    """Patches of each cell, int64 (B, K) ascending: the K whose centres are nearest to the cell's centre.

    K is the number of patches that fit into the largest cell, one at least.

    Args:
        cells: left, top, right and lower edge of each cell as shares of the image's side.
    """
    edges = np.asarray(cells, np.float64)  # (B, 4)
    number = max(1, round(float(((edges[:, 2:] - edges[:, :2]).prod(1)).max() * patches_a_side**2)))
    centres = (np.arange(patches_a_side) + 0.5) / patches_a_side
    middle = (edges[:, :2] + edges[:, 2:]) / 2
    across, down = (np.abs(centres - middle[:, axis, None]) for axis in (0, 1))  # (B, patches a side)
    far = np.maximum(down[:, :, None], across[:, None, :]).reshape(len(edges), -1)
    return torch.from_numpy(np.sort(np.argsort(far.round(9), axis=1, kind="stable")[:, :number], axis=1))


def differing_tokens(one: Sequence[int], other: Sequence[int]) -> range:
    """Positions in `one` between what two captions have in common at their start and at their end."""
    start, least = 0, min(len(one), len(other))
    while start < least and one[start] == other[start]:
        start += 1
    end = 0
    while end < least - start and one[-1 - end] == other[-1 - end]:
        end += 1
    return range(start, len(one) - end)


class _Hidden(NamedTuple):
    masks: Masks
    caption_of_token: Tensor
    """int64 (M,), row in the batch of each masked token's caption."""


def _hide(model: MaskVLM, batch: Batch, cells: Sequence[Sequence[float]]) -> _Hidden:
    """Masks that hide, in each sample, the words and the image cell in which it differs from its partner.

    A batch is a sequence of pairs of samples, neighbours of which one is an edit of the other. A caption that equals
    its partner's hides its first word. cells: one (left, top, right, bottom) for each sample.
    """
    bounds, tokens = batch.cu_seqlens.tolist(), batch.tokens.tolist()
    captions = [tokens[a:b] for a, b in pairwise(bounds)]
    masked, owners = [], []
    for row, caption in enumerate(captions):
        edited = differing_tokens(caption, captions[row ^ 1]) or range(1, 2)
        masked += [bounds[row] + position for position in edited]
        owners += [row] * len(edited)
    side = model.config.image_size // model.config.patch_size
    return _Hidden(Masks(patch_ids=patches_in(cells, side), token_ids=torch.tensor(masked)), torch.tensor(owners))


@torch.no_grad()
def _choices(
    model: MaskVLM, batch: Batch, cells: Sequence[Sequence[float]], features: EncodedSplit, own: Tensor, precision: str
) -> Tensor:
    """Two-way choices of B samples, float64 (B, 3): of words, of cells, and 1 if the pair's captions differ, else 0.

    A choice is 1 for the sample's own image, 0 for its partner's, 0.5 for a tie.

    Args:
        batch: the samples, pairs beside each other.
        cells: (left, top, right, bottom) of each sample's edited object, as shares of the image's side.
        own: int64 (B,), rows of the samples in `features`.
    """
    device = next(model.parameters()).device
    masks, caption_of_token = _hide(model, batch, cells)
    tokens, bounds = batch.tokens.tolist(), batch.cu_seqlens.tolist()
    differ = [tokens[bounds[r] : bounds[r + 1]] != tokens[bounds[r ^ 1] : bounds[(r ^ 1) + 1]] for r in range(len(own))]
    batch, masks, caption_of_token = batch.to(device), masks.to(device), caption_of_token.to(device)
    partner = torch.arange(len(own), device=device) ^ 1
    with autocast(device, precision):
        vm, wm = encode_masked(model, batch, masks)
    nats = []
    for images in (own, own ^ 1):
        v, w = features.images(images, device), features.texts(features.first[own], device)
        with autocast(device, precision):
            logits, x = reconstruct(model, vm, wm, v, w, batch, masks)
            painted = model.pixel_head(x)
        loss = F.cross_entropy(logits.float(), batch.tokens[masks.token_ids], reduction="none").double()
        nats.append(loss.new_zeros(len(own)).index_add(0, caption_of_token, loss))
    wanted = model.pixel_head.target(model.patch_targets(batch.images, masks.patch_ids))
    distances = [(painted.float() - truth).abs().mean((1, 2)).double() for truth in (wanted, wanted[partner])]
    chosen = [((other - mine).sign() + 1) / 2 for mine, other in (nats, distances)]
    return torch.stack([*chosen, torch.tensor(differ, dtype=torch.float64, device=device)], dim=1).cpu()


def _share(name: str, right: np.ndarray, pairs: np.ndarray) -> dict[str, Any]:
    """Share of right choices in per cent, and its 95 % interval bootstrapped over pairs; None if there are no choices.

    Args:
        name: beginning of the keys NAME_pct and NAME_pct_95.
        right: choices, 0 to 1.
        pairs: number of each choice's pair.
    """
    if not len(right):
        return {f"{name}_pct": None, f"{name}_pct_95": None}
    ends = grouped_bootstrap(right, pairs)
    return {
        f"{name}_pct": round(100 * float(right.mean()), 1),
        f"{name}_pct_95": [round(100 * end, 1) for end in ends],
    }
