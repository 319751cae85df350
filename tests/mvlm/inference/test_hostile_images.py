"""Images made to cost much are refused by every door, within a second, in bounded memory, with a plain message."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from support.hostile_images import MOST_BYTES, MOST_SECONDS, MOST_WAITED, contents

ROOT = Path(__file__).parents[3]
MEMORY = 400_000_000
"""Bytes that an image within the limits may take."""
BUILT = {
    "6300 x 6300, whole", "1 x 40,000,000, whole", "40,000,000 x 1, whole",
}  # fmt: skip
"""Whole images that a build takes: its own limits are of pixels and of the aspect."""
TAKEN = "6300 x 6300, whole"
"""Within the limits of a question to a model, and beyond those of the page (tests/mvlm/app/test_answers.py)."""


@pytest.fixture(scope="module")
def found(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    program = [sys.executable, "-m", "support.hostile_images", str(tmp_path_factory.mktemp("hostile")), str(trained)]
    beside = os.environ | {"PYTHONPATH": str(ROOT / "tests")}  # behind the working directory, whose mvlm comes first
    done = subprocess.run(program, cwd=ROOT, env=beside, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


@pytest.mark.slow
def test_each_is_refused_within_a_second_and_bounded_memory(found: list[dict[str, Any]]) -> None:
    assert len(found) > 3 * len(contents())
    for one in found:
        if one["door"] == "build" and one["name"] in BUILT:
            continue
        if one["name"] == TAKEN:
            assert one["error"] is None, one
            assert one["bytes"] < MEMORY, one
            continue
        kind = "ValueError" if one["door"] == "build" else "RunError"
        assert one["error"] is not None, one
        assert one["error"][0] == kind, one
        assert one["seconds"] < MOST_SECONDS, one
        assert one["waited"] < MOST_WAITED, one
        assert one["bytes"] < MOST_BYTES, one


def test_a_message_has_one_line_one_limit_and_nothing_of_pythons_inside(found: list[dict[str, Any]]) -> None:
    for one in found:
        if one["error"] is None:
            continue
        message = one["error"][1]
        assert "\n" not in message, one
        assert not re.search(r"0x[0-9a-f]{6}|object at|BytesIO|Error\b|178956970|NoneType|errno", message), one
        assert len(re.findall(r"at most", message)) <= 1, one
