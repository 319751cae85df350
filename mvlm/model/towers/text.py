"""Text towers: text encoders of transformers that run as they are, behind the interface of `TextEncoder`.

A caption is [CLS], tokens, [SEP] for all of them, and its first row is what ITC reads:

- BERT-likes: the feature of their first token.
- CLIP reads from left to right, so the feature of its first token is a constant. That of its end token, after the last
  norm, takes the row's place.
- SigLIP has no first token. It reads a caption without our [CLS], padded to all of its positions, without a mask; the
  feature of the last position takes the row's place.

transformers is imported when a tower is built.

Shape legend: B captions, L tokens of the longest, T packed tokens, H heads, D head width, C width of the model.
"""

import json
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mvlm.config.model import MaskVLMConfig, TextAttentionBackend
from mvlm.errors import ConfigError
from mvlm.model.attention_backends import text_attention
from mvlm.model.packing import Packing
from mvlm_dataloading.errors import need


class Family(NamedTuple):
    """Properties of a family of text encoders of transformers that a `TextTower` needs to know."""

    model: str
    """Name of the family's model class in transformers."""
    pooler: bool = False
    """True if the class has a pooler, which the tower is built without."""
    shifted: bool = False
    """True if positions start after the padding id, as in RoBERTa."""
    causal: bool = False
    """True if no token sees those after it, as in CLIP."""
    unmasked: bool = False
    """True if padding is read like tokens, as in SigLIP."""
    packs: bool = True
    """True if its attention can be that of packed captions: no mask but that of padding, and no bias of positions."""


FAMILIES = {
    "bert": Family("BertModel", pooler=True),
    "roberta": Family("RobertaModel", pooler=True, shifted=True),
    "xlm-roberta": Family("XLMRobertaModel", pooler=True, shifted=True),
    "distilbert": Family("DistilBertModel"),
    "mpnet": Family("MPNetModel", pooler=True, shifted=True, packs=False),
    "modernbert": Family("ModernBertModel"),
    "clip_text_model": Family("CLIPTextModel", causal=True, packs=False),
    "siglip_text_model": Family("SiglipTextModel", unmasked=True, packs=False),
}
"""Text encoders that can be towers, by their `model_type` in transformers."""
ATTENTION = "mvlm"
"""Name under which transformers knows our attention, for towers that read packed captions."""
_FIXED: dict[str, Any] = {
    "return_dict": True,
    "output_attentions": False,
    "output_hidden_states": False,
    "is_decoder": False,
    "add_cross_attention": False,
    "chunk_size_feed_forward": 0,
    "sinusoidal_pos_embds": False,
}
"""Settings that make a tower an encoder which returns its features; sines of positions come with the weights."""


class TextTower(nn.Module):
    """A text encoder of transformers, followed by a linear layer if the model is wider than it.

    ConfigError for settings of which transformers makes no tower, and for a model too small for it.
    """

    def __init__(self, config: MaskVLMConfig) -> None:
        super().__init__()
        self.tower, self.family = build_tower(config.text_tower)
        settings = self.tower.config
        self.first_position: int = self.tower.embeddings.padding_idx + 1 if self.family.shifted else 0
        self.longest = config.text_length
        self.text_backend: TextAttentionBackend = "auto"
        positions = settings.max_position_embeddings - self.first_position + self.family.unmasked
        if config.text_length > positions:
            raise ConfigError(f"text_length: wanted at most the text tower's {positions}, got {config.text_length}")
        if config.width < settings.hidden_size:
            raise ConfigError(f"width: wanted at least the text tower's {settings.hidden_size}, got {config.width}")
        # Windows of local attention that hold any caption change nothing.
        self.packs = self.family.packs and self.longest <= getattr(settings, "sliding_window", self.longest)
        self.bridge: nn.Module = nn.Identity()
        if settings.hidden_size < config.width:
            self.bridge = bridge = nn.Linear(settings.hidden_size, config.width)
            nn.init.eye_(bridge.weight)  # with the zeros of the bias, features are padded with zeros at first
            nn.init.zeros_(bridge.bias)

    @property
    def blocks(self) -> nn.ModuleList:
        """The tower's blocks."""
        return next(module for module in self.tower.modules() if isinstance(module, nn.ModuleList))

    def forward(self, tokens: Tensor, packing: Packing) -> Tensor:
        """Packed tokens int64 (T,) -> features (T, C), computed on padded captions as transformers does."""
        padded = Packing(packing.cu_seqlens, min(packing.max_length, self.longest), packing.total)
        return padded.unpad(self.padded(padded.pad(tokens), padded.key_mask))

    def padded(self, tokens: Tensor, exists: Tensor) -> Tensor:
        """Features (B, L, C) of padded captions, tokens int64 (B, L). Those of padding may be anything.

        exists: bool (B, L), False = padding.
        """
        if self.family.unmasked:
            pad, length = self.tower.config.pad_token_id, tokens.shape[1]
            places = 1 + self.tower.config.max_position_embeddings
            tokens = F.pad(torch.where(exists, tokens, pad), (0, places - length), value=pad)
            x = self.tower(input_ids=tokens[:, 1:]).last_hidden_state
            return self.finish(torch.cat([x[:, -1:], x], dim=1)[:, :length])
        position = self.first_position + torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        mask = None if self.family.causal else exists.long()  # padding comes last
        x = self.tower(input_ids=tokens, attention_mask=mask, position_ids=position).last_hidden_state
        if self.family.causal:
            end = (exists.sum(1) - 1).view(-1, 1, 1).expand(-1, 1, x.shape[-1])
            x = torch.where((position == 0).unsqueeze(-1), x.gather(1, end), x)
        return self.finish(x)

    def packed(self, tokens: Tensor, packing: Packing) -> Tensor:
        """Features (T, C) of packed tokens int64 (T,), as `forward` gives them. Without padding, if the family can."""
        if not self.packs:
            return self(tokens, packing)
        kinds = getattr(self.tower.config, "layer_types", None)
        x = self.tower(
            input_ids=tokens[None],
            attention_mask=dict.fromkeys(kinds) if kinds else None,
            position_ids=self.first_position + packing.position[None],
            packing=packing,
            backend=self.text_backend,
        ).last_hidden_state
        return self.finish(x[0])

    def finish(self, x: Tensor) -> Tensor:
        """Map features of the tower's width to the model's, (..., C), in the parameters' dtype, under autocast too."""
        return self.bridge(x).to(self.tower.dtype)


def read_settings(settings: str) -> tuple[str, dict[str, Any]]:
    """model_type and the other settings of a text tower, from JSON. ConfigError unless they are those of a tower."""
    try:
        values = dict(json.loads(settings))
        kind = values.pop("model_type")
        FAMILIES[kind]
    except (ValueError, TypeError, KeyError, RecursionError):
        raise ConfigError(
            f"text_tower: wanted the configuration of a text encoder of transformers as JSON, its model_type one of "
            f"{', '.join(FAMILIES)}, got {settings[:200]!r}"
        ) from None
    return kind, values


def tower_layers(settings: str) -> int | None:
    """Number of layers that the configuration of a tower states, before anything is built; None if it states none."""
    _, values = read_settings(settings)
    return values.get("num_hidden_layers", values.get("n_layers"))


def build_tower(settings: str) -> tuple[Any, Family]:
    """The tower of a transformers configuration as JSON, with random weights and without dropout, and its family."""
    kind, values = read_settings(settings)
    family, transformers = FAMILIES[kind], need("transformers", "integrations")
    if family.packs:
        register_attention()
    known = transformers.AutoConfig.for_model(kind).to_dict()
    values = {name: value for name, value in values.items() if name in known} | _FIXED
    try:
        config = transformers.AutoConfig.for_model(
            kind, attn_implementation=ATTENTION if family.packs else None, **values
        )
        for name in config.to_dict():
            if "dropout" in name:
                setattr(config, name, 0.0)
        tower = getattr(transformers, family.model)(config, **({"add_pooling_layer": False} if family.pooler else {}))
    except Exception as error:  # transformers has many kinds
        raise ConfigError(f"text_tower: wanted settings of a {kind}, transformers refuses them ({error})") from None
    if family.unmasked:
        tower.head = nn.Identity()  # its weights are those of `text_projection`
    return tower, family


@cache
def register_attention() -> None:
    """Give transformers the attention `ATTENTION`: ours for packed captions, and SDPA for padded ones."""
    transformers = need("transformers", "integrations")
    sdpa = transformers.AttentionInterface()["sdpa"]

    def attend(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **options: Any) -> Any:
        """Attention of q, k and v (B, H, L, D), or packed (1, H, T, D) with an option `packing`.

        Returns (B, L, H, D).
        """
        packing = options.pop("packing", None)
        if packing is None:
            return sdpa(module, q, k, v, mask, **options)
        q, k, v = (x[0].transpose(0, 1) for x in (q, k, v))
        return text_attention(q, k, v, packing, packing, None, options["backend"])[None], None

    transformers.AttentionInterface.register(ATTENTION, attend)
    transformers.AttentionMaskInterface.register(ATTENTION, transformers.AttentionMaskInterface()["sdpa"])
