"""Benchmarks of the kernels, the training step and the data loader; run by `mvlm bench`."""
