"""Arguments of a command, parsed by tyro. A mistake is one line, like every other error."""

import contextlib
import functools
import io
import json
import re
import sys
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from mvlm.errors import ConfigError
from mvlm.terminal import say
from mvlm_dataloading.untrusted import check_links, parse_json, read_regular, resolve_inside

RENAMED = {
    "mvlm pretrain": {
        "--eval-pictures": "--eval-images",
        "--self-attention products": "--self-attention math",
        "--cross-attention products": "--cross-attention math",
        "--wandb": "--log-to wandb",
        "--trackio": "--log-to trackio",
        "--compile": "--capture compile",
        "--cuda-graphs": "--capture cuda-graphs",
    },
    "mvlm finetune": {
        "--wandb": "--log-to wandb",
        "--trackio": "--log-to trackio",
        "--freeze": "--train-image frozen --train-text frozen, and --train-cross frozen for all",
    },
    "mvlm bench data": {"--pictures": "--images"},
}
"""Flags, and values of flags, that earlier versions had under another name."""


def parse(target: Callable[..., Any], words: Sequence[str], *, prog: str, **options: Any) -> Any:
    """Parse the words after a command as the arguments of a dataclass or function. `--help` prints and exits.

    Raises:
        ConfigError: the words do not fit. The message names the new flag if an old one was given, and the last version
            that has a flag that is gone.
    """
    import tyro

    check_old_flags(words, prog)
    box = io.StringIO()
    try:
        with contextlib.redirect_stderr(box):
            parsed = tyro.cli(target, prog=prog, args=list(words), **options)
    except SystemExit as end:
        if not end.code:
            raise
        raise ConfigError(f"{one_line(box.getvalue()).rstrip('.')}; see `{prog} --help`") from None
    sys.stderr.write(box.getvalue())  # tyro's warnings, when parsing succeeded
    return parsed


def check_old_flags(words: Sequence[str], prog: str) -> None:
    """Raise ConfigError for a flag, or a value of one, of earlier versions that has been renamed or removed.

    prog: the command, such as "mvlm pretrain".
    """
    renamed, gone = {}, {}
    for command, names in RENAMED.items():
        if f"{prog} ".startswith(f"{command} "):  # the prog of `pretrain` ends in the preset
            renamed |= names
    if f"{prog} ".startswith(("mvlm pretrain ", "mvlm finetune ", "mvlm eval ")):
        from mvlm.config.json_files import REMOVED

        gone = {f"--{name.replace('_', '-')}": setting.last for name, setting in REMOVED.items()}
    for word, following in pairwise([*words, ""]):
        flag, _, value = word.partition("=")
        flag = flag.replace("_", "-")  # tyro takes both
        for old in (flag, f"{flag} {value or following}"):
            if old in renamed:
                raise ConfigError(f"{old} is now {renamed[old]}; see `{prog} --help`")
        if last := gone.get(flag.replace("--no-", "--").replace(".no-", ".")):
            raise ConfigError(f"{flag} is gone: mvlm {last} is the last version that has it; see `{prog} --help`")


def deferred(command: Callable[..., None]) -> Callable[..., Callable[[], None]]:
    """Wrap a command so that calling it binds the arguments and returns a function without parameters.

    Signature and docstring stay, because tyro reads them.
    """

    @functools.wraps(command)
    def bind(*arguments: Any, **settings: Any) -> Callable[[], None]:
        return functools.partial(command, *arguments, **settings)

    return bind


_IN_OUR_WORDS = (
    (r"invalid literal for int\(\) with base 10: ", "wanted a whole number, got "),
    (r"could not convert string to float: ", "wanted a number, got "),
    (r"Missing value for argument '([^']+)'\. Expected 1 values", r"\1: wanted a value behind it, found none"),
    (r"Missing value for argument '([^']+)'\. Expected (\d+) values", r"\1: wanted \2 values behind it, found fewer"),
)
"""Patterns of tyro's messages, which speak of Python types, and messages for users in their place."""


def one_line(box: str) -> str:
    """The message of tyro's error box, without its frame, its title and its pointer to --help.

    tyro's public interface has no other way to the message: `console_outputs=False` drops it, and the hooks of
    `tyro._errors` are private. If the terminal's encoding is not UTF-8, the box has no sides, and hyphens for lines.
    """
    sections = [[]]
    for line in re.sub(r"\x1b\[[0-9;]*m", "", box).splitlines()[1:]:
        if set(line) <= set("│ ─-╰╯"):
            sections.append([])
        else:
            sections[-1].append(line.strip("│ "))
    for section in sections:  # of flags like the one given, their names alone
        if section and section[0].startswith(("Perhaps you meant", "Arguments similar to")):
            names = [line.split()[0].rstrip(",") for line in section if line.startswith("--")]
            section[1:] = [", ".join(names)]
    kept = [" ".join(section) for section in sections if section and not section[0].startswith("For full helptext")]
    kept.sort(key=lambda message: not message.startswith("Unrecognized"))  # a mistyped flag is also a missing one
    message = "; ".join(kept)
    for pattern, words in _IN_OUR_WORDS:
        message = re.sub(pattern, words, message)
    # "Error parsing PretrainConfig: ..." names a class, which nobody typed; "Error parsing --seed: ..." names a flag.
    return re.sub(r"Error parsing (?:[^-\s:]+: )?", "", message).replace("Argument helptext: ", "")


def check_result_file(out: Path | None, ranks: int = 1) -> None:
    """Raise ConfigError unless an evaluation may write its figures to `out`, before it begins.

    It may be a new file, an empty one, or figures of an earlier evaluation, which are replaced; or None, if there is
    only one rank.
    """
    if out is None and ranks > 1:
        raise ConfigError("out: wanted a file, beside which the ranks share their work, found none; add --out FILE")

    def is_result(content: bytes) -> bool:
        if content.startswith((b'{\n "checkpoint": ', b'{\n "task": ')):  # one of ours, if cut by a kill or a full disk
            return True
        found = read_json(content)
        # Every result names its checkpoint. So does the config.json of a fine-tuned run, which has a version too.
        return isinstance(found, dict) and "checkpoint" in found and "format_version" not in found

    check_replaced(out, "the figures of an earlier evaluation", is_result)


def report_figures(figures: dict[str, Any], out: Path | None, **further: Any) -> None:
    """Print figures as JSON, and write them with the `further` values to the file `out`, if one is given."""
    from mvlm_dataloading.files import write_json

    say(json.dumps(figures, indent=1))
    if out is not None:
        write_json(out, figures | further)


def check_page(out: Path | None, flag: str = "out") -> None:
    """Raise ConfigError unless a page may be written to `out`: None, a new or empty file, or an HTML page to replace.

    flag: the flag that names the file, for the error.
    """
    check_replaced(out, "an earlier page", lambda content: content.lower().startswith(b"<!doctype html"), flag)


def check_replaced(out: Path | None, wanted: str, is_ours: Callable[[bytes], bool], flag: str = "out") -> None:
    """Raise ConfigError unless a file may be written to `out`: None, a new or empty file, or one that is replaced.

    Args:
        wanted: noun phrase for a file that may be replaced, for the error.
        is_ours: True for the content of such a file.
        flag: the flag that names the file, for the error.
    """
    if out is None:
        return
    if not out.name or out.is_dir():
        raise ConfigError(f"{flag}: wanted a file, got the folder {out}; name a file in it")
    # A run of somebody else may hold a link in the place of a file that is written.
    for folder in out.absolute().parents[:3]:
        if (folder / "config.json").is_file() and (folder / "checkpoints").is_dir():
            check_links(folder)
            resolve_inside(out, folder)
    # A device such as /dev/stdout is no file.
    if out.is_file() and out.stat().st_size and not is_ours(read_regular(out, "predictions")):
        raise ConfigError(f"{flag}: wanted a new file or {wanted}, got another file, {out}")


def read_json(content: bytes) -> Any:
    """The value of a JSON document; None if it is not one."""
    try:
        return parse_json(content)
    except ValueError:
        return None


def check_no_input(out: Path | None, *others: Path | None, flag: str = "out") -> None:
    """Raise ConfigError if the file `out`, which a command writes, is one of the others that it reads or writes.

    flag: the flag that names `out`, for the error.
    """
    if out is not None and any(file is not None and out.resolve() == file.resolve() for file in others):
        raise ConfigError(f"{flag}: wanted another file than the others, got {out}")
