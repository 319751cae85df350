"""Features of all images and captions of a split, in a workspace.

Shape legend: I images, T captions, W tokens of all captions, N patches, C width, E contrastive width, R chosen rows.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from mvlm.evaluation.workspace import Workspace
from mvlm.inference.encode import BATCH, eval_loader, image_features, packed_tokens, text_features
from mvlm.model.maskvlm import MaskVLM
from mvlm.model.packing import PackedText, Packing
from mvlm_dataloading import Dataset, Tokenizer
from mvlm_dataloading.dataset.dataset import first_samples


@dataclass(frozen=True)
class EncodedSplit:
    """Features of one split, on the CPU or in files that are mapped to its memory."""

    v: Tensor
    """(I, 1+N, C), unmasked images."""
    w: Tensor
    """(W, C), unmasked captions, packed."""
    starts: Tensor
    """int64 (T+1,), bounds of the captions in `w`."""
    image_embedding: Tensor
    """(I, E), unit length."""
    text_embedding: Tensor
    """(T, E), unit length."""
    image: Tensor
    """int64 (I,), for each image the first with its `image_id` in the metadata; itself for data without."""
    owner: Tensor
    """int64 (T,), image of each caption, as in `image`."""
    first: Tensor
    """int64 (I,), row of each image's first caption."""
    captions: list[str]
    """Texts of the T captions."""

    @property
    def different(self) -> Tensor:
        """Images without repetitions, int64 (up to I,), rising: the queries of image to text, the gallery of texts."""
        return (self.image == torch.arange(len(self.image))).nonzero()[:, 0]

    def images(self, rows: Tensor, device: torch.device) -> Tensor:
        """Features (R, 1+N, C) of the images `rows`, int64 (R,) on the CPU."""
        return to_device(self.v.index_select(0, rows), device)

    def texts(self, rows: Tensor, device: torch.device) -> PackedText:
        """Packed features of the captions `rows`, int64 (R,) on the CPU, in this order."""
        lengths = self.starts.diff()[rows]
        bounds = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
        shift = (self.starts[rows] - bounds[:-1]).repeat_interleave(lengths)
        total = int(bounds[-1])
        chosen = to_device(self.w.index_select(0, shift + torch.arange(total)), device)
        packing = Packing(to_device(bounds.int(), device), int(lengths.max()), total)
        return PackedText(chosen, packing)


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor from the CPU; to a GPU through pinned memory, so that the host does not wait for the GPU."""
    return x if device.type == "cpu" else x.pin_memory().to(device, non_blocking=True)


def encode_split(
    model: MaskVLM,
    dataset: Dataset,
    tokenizer: Tokenizer,
    precision: str = "auto",
    workspace: Workspace | None = None,
) -> EncodedSplit:
    """Encode all images and captions of `dataset`, in batches of `BATCH` that the ranks of the workspace share.

    Args:
        precision: auto, bf16 or fp32.
        workspace: default: one in memory.
    """
    workspace, config = workspace or Workspace(), model.config
    captions, owner, first = [], [], []
    image = first_samples(dataset.metadata(i) for i in range(len(dataset)))
    for i in range(len(dataset)):
        first.append(len(captions))
        captions += dataset.captions(i)
        owner += [image[i]] * (len(captions) - first[-1])
    starts = packed_tokens(captions, tokenizer, config.text_length)[1].long()
    # As the loader of the masks does, pass over a caption without a token beside [CLS] and [SEP].
    seen = (starts.diff() > 2).tolist()
    first = [next((n for n in range(a, b) if seen[n]), a) for a, b in pairwise([*first, len(captions)])]
    dtype = next(model.parameters()).dtype
    v = workspace.array("v", (len(dataset), 1 + config.num_patches, config.width), dtype)
    w = workspace.array("w", (int(starts[-1]), config.width), dtype)
    dtype = torch.promote_types(dtype, torch.float32)
    image_embedding = workspace.array("image_embedding", (len(dataset), config.itc_width), dtype)
    text_embedding = workspace.array("text_embedding", (len(captions), config.itc_width), dtype)

    def encode_images(start: int, stop: int) -> Iterator[None]:
        for batch, _ in eval_loader(dataset.rows(start, stop), model, tokenizer):
            found = image_features(model, batch.images, precision)
            v.write(start, found.v)
            image_embedding.write(start, found.embedding)
            start += len(batch.images)
            yield

    def encode_texts(start: int, stop: int) -> Iterator[None]:
        for begin in range(start, stop, BATCH):
            found = text_features(model, captions[begin : min(begin + BATCH, stop)], tokenizer, precision)
            w.write(int(starts[begin]), found.w.rows)
            text_embedding.write(begin, found.embedding)
            yield

    workspace.share("images", len(dataset), BATCH, encode_images, "images")
    workspace.share("texts", len(captions), BATCH, encode_texts, "captions")
    return EncodedSplit(
        v.tensor,
        w.tensor,
        starts,
        image_embedding.tensor,
        text_embedding.tensor,
        torch.tensor(image),
        torch.tensor(owner),
        torch.tensor(first),
        captions,
    )
