"""Interface of an implementation of the training step.

Two modules satisfy it: `mvlm.model.plain`, the readable specification, and `mvlm.model.fast`, the optimized one. Both
give the same losses and gradients, up to rounding. The losses of downstream tasks are written with these functions.

Shape legend: B batch, N patches, T packed tokens, M tokens, C width, S image side, R pairs of an image and a text.
"""

from collections.abc import Collection
from typing import NamedTuple, Protocol

from torch import Tensor

from mvlm.model.encoders import KeyValueCache
from mvlm.model.network import MaskVLMNetwork
from mvlm.model.packing import PackedText
from mvlm_dataloading import Batch, Masks

MASKED = ("masked_image", "masked_text")
"""Names of the masked streams."""


class PairCaches(NamedTuple):
    """Key/value caches of one batch, for the cross-attention to its images and to its captions."""

    image: KeyValueCache
    text: KeyValueCache


class Streams(NamedTuple):
    """Outputs of the two encoders for one batch."""

    image: Tensor
    """v (B, 1+N, C), features of the unmasked images, [CLS] first; (B, 1+N-K, C) with `MaskVLMConfig.drop_masked`."""
    masked_image: Tensor | None
    """vm (B, 1+N, C), features of the masked images; None if no objective reads them."""
    text: PackedText
    """w, features of the unmasked captions."""
    masked_text: PackedText | None
    """wm, features of the masked captions; None if no objective reads them."""
    caches: PairCaches | None = None
    """Caches of `image` and `text`; None from an implementation without caches."""
    partner_caches: PairCaches | None = None
    """Caches of the images from which masked captions are rebuilt, and of the captions from which masked images are:
    `caches`, or those of the masked ones with `MaskVLMConfig.mask_partner`. None as for `caches`."""


class Implementation(Protocol):
    """Computation of one training step with the weights of a network.

    A module satisfies this protocol with functions of these names and parameters.
    """

    def encode(
        self, model: MaskVLMNetwork, batch: Batch, masks: Masks | None, masked: Collection[str] = MASKED
    ) -> Streams:
        """Encode the unmasked images and captions, and the masked streams of some names.

        Without masks, whole images and captions alone.
        """
        ...

    def encode_unmasked(self, model: MaskVLMNetwork, batch: Batch) -> tuple[Tensor, PackedText]:
        """Encode only the unmasked images and captions: v (B, 1+N, C) and w."""
        ...

    def encode_pixels(self, model: MaskVLMNetwork, images: Tensor) -> Tensor:
        """Encode images as they are, uint8 (B, 3, S, S): v (B, 1+N, C)."""
        ...

    def encode_tokens(self, model: MaskVLMNetwork, tokens: Tensor, cu_seqlens: Tensor, max_length: int) -> PackedText:
        """Encode captions as they are: packed tokens int64 (T,), with bounds cu_seqlens int32 (B+1,)."""
        ...

    def language_loss(
        self, model: MaskVLMNetwork, streams: Streams, batch: Batch, masks: Masks
    ) -> tuple[Tensor, Tensor]:
        """MLM's loss and accuracy, two scalars: means over the batch's masked tokens."""
        ...

    def image_loss(self, model: MaskVLMNetwork, streams: Streams, batch: Batch, masks: Masks) -> Tensor:
        """MIM's loss, a scalar: the mean over the batch's masked patches."""
        ...

    def fuse_pairs(
        self,
        model: MaskVLMNetwork,
        v: Tensor,
        text: PackedText,
        images: Tensor,
        texts: Tensor,
        caches: PairCaches | None = None,
        max_rows: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        """[CLS] of both cross-modality encoders, image and text (R, C) each, for pairs of an image and a caption.

        Pair r is image images[r] of v (B, 1+N, C) and caption texts[r] of text; both int64 (R,). `caches`, if given,
        are those of v and text; `max_rows` is a bound of the rows of the R captions together.
        """
        ...

    def fuse_tokens(
        self,
        model: MaskVLMNetwork,
        image: KeyValueCache,
        text: PackedText,
        tokens: Tensor | None = None,
        images: Tensor | None = None,
        texts: Tensor | None = None,
        total: int = 0,
    ) -> Tensor:
        """Features of the text cross-modality encoder for tokens of captions, each of which attends to an image.

        Args:
            image: cache of the images v (B, 1+N, C).
            tokens: rows of the captions, packed one behind the other, whose features are wanted: int64 (M,), rising, or
                (R, A), A of each caption. None for all.
            images: int64 (R,), the image of each caption. None: caption r has image r.
            texts: int64 (R,), the captions, with repetitions, and `total`, a host number, their rows together. None for
                all captions of `text`, once.

        Returns:
            (M, C), (R, A, C), or (T, C) for all.
        """
        ...

    def token_loss(self, model: MaskVLMNetwork, x: Tensor, targets: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Sum of the LM head's weighted cross-entropies, and its accuracy; x (M, C), targets and weights (M,).

        Both are 0 without targets: a microbatch may have none.
        """
        ...
