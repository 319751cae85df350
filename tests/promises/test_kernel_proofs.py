"""The table of proofs in docs/explain/kernel_proofs.md has every kernel."""

import json
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_table_of_proofs_has_exactly_the_kernels_that_are_compiled_ahead_of_time() -> None:
    page = (ROOT / "docs" / "explain" / "kernel_proofs.md").read_text()
    table = re.findall(r"^\| `(\w+)` \|(?: (?:✓|no case|formula) \|){5}$", page, re.MULTILINE)
    rows = json.loads((ROOT / "benchmarks" / "results" / "aot.json").read_text())["rows"]
    assert len(table) == len(set(table))
    assert set(table) == {row["kernel"] for row in rows}
