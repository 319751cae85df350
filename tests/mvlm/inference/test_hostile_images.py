"""Images made to cost much are refused by every door, within a second, in bounded memory, with a plain message."""

import json
import re
from pathlib import Path

import pytest

from support.faults.forks import in_child, wait
from support.hostile_images import MOST_BYTES, MOST_SECONDS, MOST_WAITED, contents, main

MEMORY = 400_000_000
"""Bytes that an image within the limits may take."""
BUILT = {
    "6300 x 6300, whole", "1 x 40,000,000, whole", "40,000,000 x 1, whole",
}  # fmt: skip
"""Whole images that a build takes: its own limits are of pixels and of the aspect."""
TAKEN = "6300 x 6300, whole"
"""Within the limits of a question to a model, and beyond those of the page (tests/mvlm/app/test_answers.py)."""


@pytest.mark.slow
def test_each_is_refused_within_a_second_and_bounded_memory_in_one_line(trained: Path, tmp_path: Path) -> None:
    """The line names one limit, and nothing of Python's inside."""
    (tmp_path / "images").mkdir()
    log = tmp_path / "log"
    assert wait(in_child(lambda: main(tmp_path / "images", trained), log)) == 0, log.read_text()
    found = [json.loads(line) for line in log.read_text().splitlines() if line.startswith("{")]
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
        message = one["error"][1]
        assert "\n" not in message, one
        assert not re.search(r"0x[0-9a-f]{6}|object at|BytesIO|Error\b|178956970|NoneType|errno", message), one
        assert len(re.findall(r"at most", message)) <= 1, one
