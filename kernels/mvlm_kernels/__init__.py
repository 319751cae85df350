"""Fused training kernels for masked vision-and-language models; torch and Triton are the only dependencies."""

from mvlm_kernels.dispatch import Explanation, explain, use_backend

__all__ = [
    "Explanation",
    "explain",
    "use_backend",
]
