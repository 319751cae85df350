"""Peak activation memory of a step."""

import os
import subprocess
import sys

import pytest

MEASURE = """
import torch
from torch import nn
from mvlm_benchmarks.step.activations import peak_mb

layer, x = nn.Linear(500, 500), torch.ones(1000, 500)
for _ in range(2):
    print(peak_mb(lambda: layer(x).sum().backward(), layer.parameters(), "cpu") >= 2)
"""


@pytest.mark.slow
def test_profiler_logs_nothing() -> None:
    """In a process of its own: the profiler reads its level of logging once."""
    variables = {name: value for name, value in os.environ.items() if name != "KINETO_LOG_LEVEL"}
    command = [sys.executable, "-c", MEASURE]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=300, check=True)
    assert (done.stdout, done.stderr) == ("True\nTrue\n", "")
