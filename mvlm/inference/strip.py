"""A reconstruction strip: what the model rebuilds now, for a look while it trains."""

import numpy as np
import torch

from mvlm.inference import reconstruction as inference
from mvlm.inference.encode import eval_loader
from mvlm.model.maskvlm import MaskVLM
from mvlm_dataloading import Dataset, Tokenizer

PICTURES = 8


def strip(model: MaskVLM, split: Dataset, tokenizer: Tokenizer, precision: str = "auto") -> np.ndarray:
    """The first pictures of a split in columns: whole, masked, and rebuilt with their captions. uint8 (3S, 8S, 3)."""
    batch, masks = next(iter(eval_loader(split, model, tokenizer)))
    images, patch_ids = batch.images[:PICTURES], masks.patch_ids[:PICTURES].to(batch.images.device)
    captions = [split.captions(i)[0] for i in batch.sample_id[:PICTURES].tolist()]
    masked = inference.hide_patches(images, patch_ids, model.config.patch_size)
    rebuilt = inference.reconstruct(model, tokenizer, images, captions, patch_ids, precision)
    rows = [torch.cat(list(row.cpu()), dim=2) for row in (images, masked, rebuilt)]  # (3, S, 8S) each
    return torch.cat(rows, dim=1).permute(1, 2, 0).numpy()
