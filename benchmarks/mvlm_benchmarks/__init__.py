"""Benchmarks of the kernels against what else a user could call; run by ``mvlm bench``."""
