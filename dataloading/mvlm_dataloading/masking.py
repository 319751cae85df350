"""Settings of the masks of image-text pairs, which a loader and a model share. Imports no slow package."""

from dataclasses import dataclass


# Docstrings are also the text of `mvlm pretrain PRESET --help`.
@dataclass(frozen=True, slots=True, kw_only=True)
class Masking:
    """Settings of the masks of an image and of its caption. ValueError for a setting that is out of its range."""

    patch_size: int = 16
    """Side of a patch in pixels; divides `mask_block`."""
    mask_block: int = 32
    """Side in pixels of the square blocks of patches that are masked together; divides `image_size`."""
    image_mask_ratio: float = 0.6
    """Share of an image's blocks to mask, rounded to a whole number of blocks."""
    mim_share: float = 1.0
    """Share of an image's masked blocks that MIM rebuilds in training, rounded, one at least. The others are hidden."""
    text_mask_ratio: float | None = 0.3
    """Share of a caption's tokens to mask, special tokens aside; at least one is masked. None: drawn for each caption,
    every number of masked tokens as likely as the others."""
    whole_word_masking: bool = False
    """Mask all tokens of a word of a caption or none; shares are then those of its words (BERT, ViLT). Evaluations mask
    tokens."""

    def __post_init__(self) -> None:
        for name in ("patch_size", "mask_block"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.mask_block % self.patch_size:
            raise ValueError(
                f"patch_size must divide mask_block: wanted a divisor of {self.mask_block}, got {self.patch_size}"
            )
        if not 0 < self.mim_share <= 1:
            raise ValueError(f"mim_share must be in (0, 1], got {self.mim_share}")
        if self.text_mask_ratio is not None and not 0 <= self.text_mask_ratio <= 1:
            raise ValueError(f"text_mask_ratio must be in [0, 1], got {self.text_mask_ratio}")

    def check_image_size(self, image_size: int) -> None:
        """Raise ValueError unless blocks tile images of this side, and at least one block is masked."""
        if image_size < 1 or image_size % self.mask_block:
            raise ValueError(
                f"mask_block must divide image_size: wanted a divisor of {image_size}, got {self.mask_block}"
            )
        blocks = (image_size // self.mask_block) ** 2
        if not 1 <= self.masked_blocks(image_size) <= blocks:
            raise ValueError(
                f"image_mask_ratio must hide 1 to {blocks} of {blocks} blocks, got {self.image_mask_ratio}"
            )

    def masked_blocks(self, image_size: int) -> int:
        """Number of masked blocks of an image: round(ratio * (image_size / mask_block)^2), halves to even.

        With a ratio of 0.6 and blocks of 32 px, 29 of 49 blocks at 224 px and 5 of 9 at 96 px.
        """
        return round(self.image_mask_ratio * (image_size // self.mask_block) ** 2)

    def rebuilt_blocks(self, image_size: int) -> int:
        """Number of masked blocks of an image that MIM rebuilds."""
        return max(1, round(self.mim_share * self.masked_blocks(image_size)))

    @property
    def patches_of_a_block(self) -> int:
        """Number of patches of one block."""
        return (self.mask_block // self.patch_size) ** 2
