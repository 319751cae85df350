"""The table of proofs in docs/explain/kernel_proofs.md has every kernel."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# The module removes TRITON_INTERPRET from its process's environment, so it is imported in another process.
KERNELS = """
import json
from mvlm_kernels import aot
print(json.dumps([launch.kernel.__name__ for op in aot.CASES for launch in aot.recorded(op, "sm_80")]))
"""


@pytest.mark.slow
def test_table_of_proofs_has_exactly_the_kernels_that_are_compiled_ahead_of_time() -> None:
    page = (ROOT / "docs" / "explain" / "kernel_proofs.md").read_text()
    table = re.findall(r"^\| `(\w+)` \|(?: (?:✓|no case|none) \|){5}$", page, re.MULTILINE)
    done = subprocess.run([sys.executable, "-c", KERNELS], capture_output=True, text=True, check=True)
    assert len(table) == len(set(table))
    assert set(table) == set(json.loads(done.stdout))
