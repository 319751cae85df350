"""Benchmarks of the kernels, the training step and the data loader; run by `mvlm bench`.

Terms:
    contender: anything that is measured and compared, ours included.
    peer: a contender of `kernels/` that implements one of our ops in another way.
    baseline: a contender of `step/` that is the same model built from other libraries.
    row: a line of results, or a row of a matrix. A sequence of tokens is never called a row.
"""

import os

# torch's profiler logs its start and stop (level USDT, 5) to stderr. Read when a process profiles for the first time.
os.environ.setdefault("KINETO_LOG_LEVEL", "6")
