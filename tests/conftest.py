"""Runs before any test module is imported, whatever part of the suite is asked for."""

import os

# Triton decides at import whether it interprets, so one process either interprets kernels or compiles them. The suite
# interprets (it needs no GPU, and ops on CPU tensors still take torch unless a test insists on Triton); tests that
# compile start their own process. `make test-gpu` sets TRITON_INTERPRET=0 and runs the gpu lane alone.
os.environ.setdefault("TRITON_INTERPRET", "1")
