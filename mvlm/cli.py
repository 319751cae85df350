"""The command line: find a command, run it, and turn errors into exit codes."""

import difflib
import logging
import os
import sys
import textwrap
from collections.abc import Callable, Sequence
from functools import partial
from importlib import metadata
from typing import NoReturn

from mvlm import waiting
from mvlm.commands import data, embed, evaluate, plan, predict, report, search
from mvlm.commands.arguments import deferred, parse
from mvlm.commands.bench import bench
from mvlm.commands.doctor import doctor
from mvlm.commands.finetune import finetune
from mvlm.commands.pretrain import pretrain
from mvlm.commands.study import study
from mvlm.tasks import task_names
from mvlm.terminal import VisibleFormatter, say
from mvlm_dataloading.untrusted import FOLLOW_LINKS, followed_links
from mvlm_dataloading.urls import without_credentials

GROUPS: dict[str, dict[str, Callable[..., None]]] = {
    "Data sets": {
        "data emoji": data.emoji,
        **{f"data {name}": command for name, command in data.source_commands().items()},
        "data twemoji": data.twemoji,
        "data easy-vqa": data.easy_vqa,
        "data scenes": data.scenes,
        "data link": data.link,
        "data merge": data.merge,
        "data check": data.check,
        "data index": data.index,
        "data view": data.view,
    },
    "Machine": {
        "doctor": doctor,
        "plan": plan.plan,
    },
    "Training": {
        "pretrain": pretrain,
        "finetune": finetune,
    },
    "Evaluation": {
        "eval retrieval": evaluate.eval_retrieval,
        "eval classes": evaluate.eval_classes,
        **{f"eval {task}": evaluate.eval_task(task) for task in task_names() if task != "retrieval"},
        "score": evaluate.score,
        "report": report.report,
        "study": study,
        "verify": report.verify,
        "replay": report.replay,
    },
    "Use of a trained model": {
        "app": predict.app,
        "predict": predict.predict,
        "fill": predict.fill,
        "reconstruct": predict.reconstruct,
        "embed": embed.embed,
        "search index": search.index,
        "search query": search.query,
        "search add": search.add,
        "search remove": search.remove,
        "export": embed.export,
    },
    "Benchmarks": {
        "bench": bench,
    },
}
"""Function of each command by its words, such as "data emoji", in the groups and the order of `mvlm --help`."""
COMMANDS = {name: command for group in GROUPS.values() for name, command in group.items()}
FAMILIES = {
    "data": "Build a data set, or change and check built ones",
    "eval": "Measure a model's retrieval, or one of its tasks",
    "search": "Search images and captions by their embeddings",
}
"""Purpose of each family: commands that begin with the same word, such as `mvlm data`, one entry in `mvlm --help`."""
PARSE_THEMSELVES = ("pretrain", "finetune", "bench")
"""Commands that parse their own arguments, because the first word decides which arguments there are."""


def usage(family: str = "") -> str:
    """The list of all commands by group, in lines of at most 100 characters, or of one family with a line for each."""
    groups = {title: _entries(group, family) for title, group in GROUPS.items()}
    width = max(len(name) for entries in groups.values() for name in entries)
    lines = ["mvlm: fast pretraining of masked vision-and-language models"]
    for title, entries in groups.items():
        lines += ["", title] if entries else []
        for name, text in entries.items():
            start = f"  mvlm {name:<{width}}  "
            lines += textwrap.wrap(start + text, 100, subsequent_indent=" " * len(start), break_on_hyphens=False)
    lines.append("")
    if not family:
        lines.append("mvlm data --help describes what NAME can be, as do mvlm eval --help and mvlm search --help.")
    lines.append("mvlm COMMAND --help describes a command.")
    lines.append("--follow-links, of any command, follows links in a folder that lead out of it (docs/guides/data.md).")
    return "\n".join(lines)


def _entries(group: dict[str, Callable[..., None]], family: str) -> dict[str, str]:
    """Entries of `mvlm --help`: name -> one line of help.

    With `family`, such as "data", each command of this family in the group. Else all commands of the group, with one
    entry for each family.
    """
    entries: dict[str, str] = {}
    for name, command in group.items():
        first, _, second = name.partition(" ")
        if second and not family:
            entry = entries.get(f"{first} NAME")
            entries[f"{first} NAME"] = f"{entry}, {second}" if entry else f"{FAMILIES[first]}: {second}"
        elif first == family or not family:
            entries[name] = (command.__doc__ or "").splitlines()[0]
    return entries


def find_command(arguments: Sequence[str]) -> Callable[[], object]:
    """Find the command that the arguments begin with, and parse the others.

    Returns a function without parameters that runs it. ConfigError if there is no such command, or if arguments do not
    fit.
    """
    from mvlm.errors import ConfigError

    if not arguments or arguments[0] in ("-h", "--help"):
        return partial(say, usage())
    if arguments[0] == "--version":
        return partial(say, f"mvlm {metadata.version('mvlm')}")
    import tyro

    for words in (2, 1):
        name = " ".join(arguments[:words])
        if name in COMMANDS:
            rest = arguments[words:]
            if name in PARSE_THEMSELVES:
                return partial(COMMANDS[name], rest)
            # A group of options is not a prefix of its flags: --min-side, not --build.min-side.
            markers = (tyro.conf.OmitArgPrefixes, tyro.conf.PositionalMetavarFromFieldName)
            return parse(deferred(COMMANDS[name]), rest, prog=f"mvlm {name}", config=markers)
    if arguments[0] == "eval" and len(arguments) > 1 and arguments[1].endswith(".py"):
        return parse(deferred(evaluate.eval_task(arguments[1])), arguments[2:], prog=f"mvlm eval {arguments[1]}")
    within = [name for name in COMMANDS if name.startswith(arguments[0] + " ")]
    if within and arguments[1:2] in (["-h"], ["--help"]):
        return partial(say, usage(arguments[0]))
    typed = " ".join(arguments[: 2 if within else 1])
    group = f"{arguments[0]} "  # of a family's commands the second words are compared: the first is right
    known = {name.removeprefix(group): name for name in within or COMMANDS}
    near = difflib.get_close_matches(typed.removeprefix(group), known, 1) if typed != arguments[0] or not within else []
    hint = f"did you mean `mvlm {known[near[0]]}`?" if near else f"wanted one of: {', '.join(within or COMMANDS)}"
    raise ConfigError(f"unknown command {typed!r}; {hint}")


def _at_home(word: str) -> str:
    """Replace a leading ~ of an argument, or of VALUE in FLAG=VALUE, which shells leave alone, by the home folder."""
    flag, sign, path = word.rpartition("=") if word.startswith("--") else ("", "", word)
    return f"{flag}{sign}{os.path.expanduser(path)}" if path == "~" or path.startswith("~/") else word


def _without_follow_links(words: list[str]) -> list[str]:
    """Remove --follow-links from a command's arguments, and turn it on for this process and those that it starts."""
    if "--follow-links" in words:
        os.environ[FOLLOW_LINKS] = "1"
    return [word for word in words if word != "--follow-links"]


def main() -> None:
    """Entry point of `mvlm`. User errors are one line and exit code 2; a run that stopped itself is exit code 1.

    Ctrl-C outside of training is exit code 130. The watchdog of a run exits with code 3 (`mvlm.training.stopping`).
    """
    # Before torch is imported. Batches differ in size, and memory that grows in place is not left in pieces.
    if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:  # the name of older versions
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    handler = logging.StreamHandler()
    handler.setFormatter(VisibleFormatter("%(message)s"))
    logging.basicConfig(handlers=[handler])  # of other libraries: warnings
    for name in ("mvlm", "mvlm_dataloading", "mvlm_kernels", "mvlm_benchmarks"):
        logging.getLogger(name).setLevel(logging.INFO)
    from mvlm.errors import (
        ConfigError,
        LostRankError,
        NonFiniteLossError,
        RunError,
        advise_install,
        is_out_of_memory,
        is_out_of_room,
    )
    from mvlm_dataloading.errors import DataError

    followed = followed_links()
    try:
        # Also in `sys.argv`, which services that log runs read.
        sys.argv[1:] = [without_credentials(_at_home(word)) for word in _without_follow_links(sys.argv[1:])]
        command = find_command(sys.argv[1:])
        waiting.prepare()  # before torch is imported
        command()
        sys.stdout.flush()
    except BrokenPipeError:  # the reader of the output has ended, as in `mvlm --help | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what the interpreter still flushes
        sys.exit(141)  # 128 + SIGPIPE, as a shell reports it
    except KeyboardInterrupt:
        _end("interrupted", 130)
    except (ConfigError, RunError, DataError) as error:
        _end(" ".join(str(error).split()))
    except (NonFiniteLossError, LostRankError) as error:
        _end(str(error), 1)
    except Exception as error:
        if is_out_of_memory(error):
            reason = " ".join(str(error).split()) or type(error).__name__
            _end(f"wanted memory, found too little ({reason}); free some, or lower --batch-size where there is one")
        if isinstance(error, ImportError) and (advice := advise_install(error)):
            _end(advice)
        if is_out_of_room(error):
            reason = " ".join(str(error).split())[:300]
            _end(f"wanted room to write, found none ({reason}); free some space and try again")
        if isinstance(error, OSError) and error.filename is not None:
            what = f"could not be read or written ({error.strerror})"
            _end(f"{error.filename}: {what}; check the path and its permissions")
        raise
    finally:
        if count := followed_links() - followed:
            logging.getLogger("mvlm").warning("followed %d links that leave their folders", count)


def _end(message: str, code: int = 2) -> NoReturn:
    say(f"mvlm: {message}", file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    main()
