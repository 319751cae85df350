"""Printed and logged texts have no control characters and no passwords."""

import io
import logging
from pathlib import Path

from mvlm.terminal import VisibleFormatter, say


def test_what_is_said_and_logged_has_lines_and_tabs_and_no_other_controls():
    out = io.StringIO()
    say("a\tb\n\x1b[31mred\x1b[0m https://me:password@host/x?token=abc", file=out)
    assert out.getvalue() == "a\tb\n\\x1b[31mred\\x1b[0m https://host/x\n"
    say(f"{Path('s3://bucket/a')}; next: mvlm eval vqa --data={Path('https://me:password@host/b')}", file=out)
    assert out.getvalue().splitlines()[2:] == ["s3://bucket/a; next: mvlm eval vqa --data=https://host/b"]
    record = logging.LogRecord("mvlm", logging.INFO, "", 0, "%s\n", ("\x07\u202e",), None)
    assert VisibleFormatter("%(message)s").format(record) == "\\x07\\u202e\n"
