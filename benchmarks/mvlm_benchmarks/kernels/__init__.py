"""`mvlm bench kernels`: the ops of `mvlm_kernels` against other implementations of the same functions."""
