"""Text for the terminal. Captions, names and messages that came from outside cannot control it, and URLs in it have
no passwords.

Everything that mvlm prints or logs passes here: `tests/test_house.py` finds a bare `print`.
"""

import logging
import sys
from typing import TextIO

from mvlm_dataloading.untrusted import printable
from mvlm_dataloading.urls import hidden, intact


def say(text: object, *, end: str = "\n", file: TextIO | None = None, flush: bool = False) -> None:
    """Print a text, with control characters but line ends and tabs escaped. `file` is standard output by default."""
    print(visible(text), end=end, file=file or sys.stdout, flush=flush)


def visible(text: object) -> str:
    """Make a text safe to print: control characters other than line ends and tabs are escaped.

    URLs in it lose user names and passwords, and get back a slash that a path lost (s3:/ becomes s3://).
    """
    return "\n".join("\t".join(map(printable, line.split("\t"))) for line in hidden(intact(text)).split("\n"))


class VisibleFormatter(logging.Formatter):
    """Formatter of log messages without control characters."""

    def format(self, record: logging.LogRecord) -> str:
        return visible(super().format(record))
