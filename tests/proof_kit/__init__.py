"""Proofs of anybody's Triton kernels without a GPU, as a plugin of pytest. docs/prove_your_kernel.md is its page."""
