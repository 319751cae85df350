"""Fused training kernels for masked vision-and-language models, with torch, Triton and NumPy alone."""

from typing import TYPE_CHECKING, Any

from mvlm_kernels.add_layer_norm import add_layer_norm
from mvlm_kernels.contrastive_loss import ContrastiveTerms, contrastive_loss, contrastive_terms
from mvlm_kernels.cross_attention import cross_attention, pack_key_mask
from mvlm_kernels.dispatch import Explanation, explain, use_backend
from mvlm_kernels.gather_patches import gather_patches
from mvlm_kernels.gelu_linear import gelu_linear
from mvlm_kernels.pixel_loss import masked_pixel_loss
from mvlm_kernels.place_tokens import place_tokens
from mvlm_kernels.qk_norm_rope import qk_norm_rope

if TYPE_CHECKING:
    from mvlm_kernels.integrations.model import explain_model

    __version__: str

__all__ = [
    "ContrastiveTerms",
    "Explanation",
    "add_layer_norm",
    "contrastive_loss",
    "contrastive_terms",
    "cross_attention",
    "explain",
    "explain_model",
    "gather_patches",
    "gelu_linear",
    "masked_pixel_loss",
    "pack_key_mask",
    "place_tokens",
    "qk_norm_rope",
    "use_backend",
]


def __getattr__(name: str) -> Any:
    """`explain_model`, and `__version__`, the version of the distribution `mvlm`, which holds this package."""
    if name == "explain_model":  # it imports integrations, which import this package
        from mvlm_kernels.integrations.model import explain_model

        return explain_model
    if name == "__version__":
        from importlib.metadata import version

        return version("mvlm")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
