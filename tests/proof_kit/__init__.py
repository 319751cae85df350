"""Proofs of anybody's Triton kernels without a GPU, as a plugin of pytest (docs/guides/prove_your_kernel.md)."""
