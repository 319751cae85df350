"""Lengths of captions for which the kernels of a step are compiled ahead."""

import json
import os
import subprocess
import sys

import pytest

from mvlm_kernels.cross_attention.arguments import bucket

LONGEST = (8, 16, 40, 64, 100, 300)
# In a process of its own: what compiles kernels ahead takes TRITON_INTERPRET out of the environment.
PROGRAM = """
import json, sys
from mvlm.config.model import MaskVLMConfig
from mvlm.costs.step_kernels import lengths_of
print(json.dumps([lengths_of(MaskVLMConfig.preset("tiny", text_length=int(n))) for n in sys.argv[1:]]))
"""


@pytest.mark.slow
def test_every_choice_of_tiles_has_a_length():
    """Tiles of attention are chosen by the bucket of the longest caption."""
    command = [sys.executable, "-c", PROGRAM, *map(str, LONGEST)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"TRITON_INTERPRET": "0"})
    for longest, found in zip(LONGEST, json.loads(done.stdout), strict=True):
        assert {bucket(length) for length in found} == {bucket(length) for length in range(1, longest + 1)}
        assert max(found) == longest
