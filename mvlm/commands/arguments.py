"""What is typed after a command, as its arguments. A mistake is told on one line, as all others are."""

import contextlib
import functools
import io
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any

from mvlm.errors import ConfigError


def parse(target: Callable[..., Any], words: Sequence[str], *, prog: str, **options: Any) -> Any:
    """What tyro makes of the words for a dataclass or function. `--help` prints and exits.

    Raises:
        ConfigError: in place of the box that tyro prints.
    """
    import tyro

    box = io.StringIO()
    try:
        with contextlib.redirect_stderr(box):
            found = tyro.cli(target, prog=prog, args=list(words), **options)
    except SystemExit as end:
        if not end.code:
            raise
        raise ConfigError(f"{one_line(box.getvalue()).rstrip('.')}; `{prog} --help` tells more") from None
    sys.stderr.write(box.getvalue())  # warnings of no mistake
    return found


def bound(command: Callable[..., None]) -> Callable[..., Callable[[], None]]:
    """A function with the command's own signature and docstring, whose call only notes the arguments."""

    @functools.wraps(command)
    def note(*arguments: Any, **settings: Any) -> Callable[[], None]:
        return functools.partial(command, *arguments, **settings)

    return note


def one_line(box: str) -> str:
    """The message of tyro's box, without frame, title and the pointer to --help.

    Where the terminal's encoding is not UTF-8 the box has no sides, and hyphens for lines.
    """
    sections = [[]]
    for line in re.sub(r"\x1b\[[0-9;]*m", "", box).splitlines()[1:]:
        if set(line) <= set("│ ─-╰╯"):
            sections.append([])
        else:
            sections[-1].append(line.strip("│ "))
    told = [" ".join(section) for section in sections if section and not section[0].startswith("For full helptext")]
    # "Error parsing PretrainConfig: ..." names a class, which nobody typed; "Error parsing --seed: ..." an option.
    return re.sub(r"Error parsing (?:[^-\s:]+: )?", "", "; ".join(told)).replace("Argument helptext: ", "")
