"""Fused training kernels for masked vision-and-language models; torch and Triton are the only dependencies."""

from mvlm_kernels.cross_attention import cross_attention, pack_key_mask
from mvlm_kernels.dispatch import Explanation, explain, use_backend

__all__ = [
    "Explanation",
    "cross_attention",
    "explain",
    "pack_key_mask",
    "use_backend",
]
