"""Configuration of a model, and its presets."""

from dataclasses import asdict, dataclass, fields, replace
from typing import Annotated, Any, Literal

from mvlm.config.ranges import AT_LEAST_1, NO_FLAG, Range, check_values
from mvlm.errors import ConfigError
from mvlm_dataloading.masking import Masking

PRESETS = ("tiny", "small", "base")
ImageAttentionBackend = Literal["auto", "triton", "sdpa", "flash-attn", "xformers", "math"]
"""Backends of attention between image patches; `mvlm.model.attention_backends` has the rule of `auto`."""
TextAttentionBackend = Literal["auto", "triton", "sdpa", "math"]
"""Backends of attention with text on at least one side."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MaskVLMConfig(Masking):
    """Configuration of a MaskVLM, with its masking. Lengths are in tokens, image sides in pixels."""

    image_size: Annotated[int, AT_LEAST_1] = 224
    """Side of the square input image."""
    image_tower: str = ""
    """Image encoder of another library in place of our ViT: timm:NAME, a VisionTransformer or Eva of timm, such as
    timm:vit_base_patch16_clip_224.openai. `image_size`, `patch_size`, `image_mean`, `image_std`, `width` and
    `image_layers` are its own unless they are given."""
    width: Annotated[int, AT_LEAST_1] = 768
    """Feature width of both encoders and of all cross-modality blocks."""
    heads: Annotated[int, AT_LEAST_1] = 12
    """Attention heads; the width of one head is width / heads."""
    image_layers: Annotated[int, AT_LEAST_1] = 12
    """Self-attention blocks of the image encoder."""
    text_layers: Annotated[int, AT_LEAST_1] = 12
    """Self-attention blocks of the text encoder (RoBERTa, post-norm)."""
    text_tower: Annotated[str, NO_FLAG] = ""
    """Configuration of the text tower as JSON, from its folder; empty for an own text encoder."""
    cross_layers: Annotated[int, AT_LEAST_1] = 3
    """Blocks of each of the two cross-modality encoders."""
    decoder_layers: Annotated[int, AT_LEAST_1] = 3
    """Blocks of the image decoder."""
    vocab_size: Annotated[int, AT_LEAST_1] = 50265
    """Rows of the token embedding and of the LM head; a tokenizer may use fewer."""
    mask_token_id: Annotated[int, NO_FLAG] = 50264
    """Id of [MASK], which replaces masked tokens."""
    text_length: int = 40
    """Longest caption, [CLS] and [SEP] included."""
    itc_width: Annotated[int, AT_LEAST_1] = 256
    """Width of the contrastive embeddings."""
    temperature: Annotated[float, Range(0.001, 0.5)] = 0.07
    """Initial value of the learned contrastive temperature. SigLIP starts at 0.1."""
    contrastive: Literal["softmax", "sigmoid"] = "softmax"
    """Form of ITC. softmax: InfoNCE, the paper's. sigmoid: SigLIP's loss, which judges every pair on its own and also
    learns a bias."""
    contrast_masked: bool = False
    """Also contrast the images with the masked captions, which MLM encodes anyway. ITC is then the mean of both."""
    cross_norm: Annotated[Literal["post", "pre"], NO_FLAG] = "post"
    """LayerNorm after each residual sum (post, the paper) or before each sub-layer (pre)."""
    initialization: Annotated[Literal["normal", "xavier"], NO_FLAG] = "normal"
    """Initial weights of linear layers: trunc_normal(0.02), meant for widths near 768, or Xavier, for any width. The
    layers that reconstruct pixels always have trunc_normal(0.02)."""
    output_positions: bool = False
    """Add fixed sines of row and column to the features of patches behind the image encoder, as in DETR; not in the
    paper. Without them a small encoder, trained for a short time, loses the places of what it sees."""
    drop_masked: bool = False
    """Encode only the visible patches of an image in training, once, for all objectives: ITC, ITM and MLM read them, as
    in FLIP, and pixels are rebuilt from them, as in MAE, with mask tokens added after the encoder. Cheaper, but not the
    paper's method. A trained model reads whole images."""
    mim_loss: Literal["l1", "mse"] = "l1"
    """Loss of MIM: absolute error, the paper's, or squared error, as in MAE. The least absolute error is at the median:
    where an object may lie but probably does not, it is the ground, whatever a caption hints. The least squared error
    is at the mean, which every hint moves, so MIM learns to read. Its loss is small: give it a `mim_weight` of 8."""
    mim_target: Literal["pixels", "normalized"] = "pixels"
    """Target of MIM in each masked patch. pixels: its pixels, the paper's. normalized: its pixels minus their mean and
    divided by their standard deviation, as in MAE; a head of its own then learns mean and deviation, for images."""
    mim_rows: Literal["all", "masked"] = "all"
    """Rows of an image that the cross-modality encoder and the decoder compute for MIM. all: the paper's. masked: only
    masked patches, which attend to the visible ones and to the caption, not to each other, as in CrossMAE; the image
    encoder then sees visible patches alone, except a tower. Cheaper."""
    mim_share: Annotated[float, NO_FLAG] = 1.0
    """Share of an image's masked blocks that MIM rebuilds in training, rounded, one at least. The others are hidden."""
    text_mask_ratio: float = 0.3
    """Share of a caption's tokens to mask, special tokens aside; at least one is masked."""
    mask_partner: bool = False
    """Also mask the image from which masked captions are rebuilt, and the caption from which masked images are rebuilt:
    each reconstruction then reads the other's masked input (the paper's Table 6). Without it, the paper's method, they
    read unmasked ones."""
    image_mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    """Mean of each channel, for pixels in 0..1. Pixels are normalised as (x - mean) / std."""
    image_std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    """Standard deviation of each channel, for pixels in 0..1. Pixels are normalised as (x - mean) / std."""

    def __post_init__(self) -> None:
        check_values(self)
        if self.text_length < 3:
            raise ConfigError(f"text_length must be at least 3 ([CLS], a token, [SEP]), got {self.text_length}")
        try:
            Masking.__post_init__(self)
            self.check_image_size(self.image_size)
        except ValueError as error:
            raise ConfigError(str(error)) from None
        if self.width % self.heads:
            raise ConfigError(f"heads must divide width: wanted a divisor of {self.width}, got {self.heads}")
        if self.output_positions and self.width % 4:
            raise ConfigError(f"4 must divide width with output_positions, got a width of {self.width}")
        if not 0 <= self.mask_token_id < self.vocab_size:
            raise ConfigError(f"mask_token_id must be in [0, {self.vocab_size}), got {self.mask_token_id}")
        if self.image_tower and self.drop_masked:
            raise ConfigError(f"drop_masked: wanted False with image_tower {self.image_tower}, got True")
        if min(self.image_std) <= 0:
            raise ConfigError(f"image_std must be above 0, got {self.image_std}")

    @property
    def num_patches(self) -> int:
        """Patches of one image."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def masked_patches(self) -> int:
        """Masked patches of one image."""
        return self.masked_blocks(self.image_size) * self.patches_of_a_block

    @property
    def rebuilt_patches(self) -> int:
        """Masked patches of one image that MIM rebuilds: the first ones of a loader's masks."""
        return self.rebuilt_blocks(self.image_size) * self.patches_of_a_block

    @property
    def hides_by_dropping(self) -> bool:
        """True if the image encoder sees only the visible patches of a masked image; mask tokens come after it."""
        return self.drop_masked or (self.mim_rows == "masked" and not self.image_tower)

    @property
    def masking(self) -> Masking:
        """The masking alone, for a loader."""
        return Masking(**{setting.name: getattr(self, setting.name) for setting in fields(Masking)})

    @property
    def patch_values(self) -> int:
        """Values of one patch: channels x side x side."""
        return 3 * self.patch_size**2

    @classmethod
    def preset(cls, name: str, **changes: Any) -> "MaskVLMConfig":
        """Make the configuration of a preset, with fields replaced by `changes`. ConfigError for an unknown name.

        `base` is ViT-B/16 at 224 px with RoBERTa-base, as in the paper (about 335 M parameters); `small` has half the
        width; `tiny` (about 10 M) trains on two CPU cores.
        """
        if name == "base":
            config = cls()
        elif name == "small":
            config = cls(width=384, heads=6)
        elif name == "tiny":
            config = cls(
                image_size=96,
                width=192,
                heads=3,
                image_layers=6,
                text_layers=6,
                cross_layers=2,
                decoder_layers=2,
                vocab_size=2048,
                mask_token_id=4,
                text_length=24,
                cross_norm="pre",  # docs/evidence/lab_log.md has the measurements for this choice and the next
                initialization="xavier",
            )
        else:
            raise ConfigError(f"unknown preset: wanted one of {', '.join(PRESETS)}, got {name!r}")
        return replace(config, **changes)

    def loader_options(self, train: bool = True) -> dict[str, Any]:
        """Arguments of `mvlm_dataloading.Loader` that follow from the model: its sizes and its masking.

        train: False for evaluations, which always mask single tokens, not words, so that their figures compare.
        """
        masking = self.masking if train else replace(self.masking, whole_word_masking=False)
        return {"image_size": self.image_size, "text_length": self.text_length, "masking": masking}

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain values for JSON."""
        return asdict(self)
