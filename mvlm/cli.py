"""The command line: `mvlm COMMAND ... --help` is the documentation of each command."""

import difflib
import errno
import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from mvlm.commands import bench as bench_commands
from mvlm.commands import data_build as data_commands
from mvlm.commands import data_tools
from mvlm.commands import predict as commands
from mvlm.commands.arguments import bound, parse

# A command imports what it needs when it runs, so that --help and mistakes answer at once.


def pretrain(arguments: Sequence[str]) -> None:
    """Pretrain a MaskVLM: `mvlm pretrain PRESET --data SHARDS --out RUN`, PRESET one of tiny, small, base.

    `mvlm pretrain --config FILE --out RUN` repeats the run whose config.json FILE is; other settings override it.
    """
    import tyro

    from mvlm.config.json_files import read_config, run_config
    from mvlm.config.model import PRESETS
    from mvlm.config.pretrain import pretrain_defaults
    from mvlm.errors import ConfigError

    if arguments and arguments[0].startswith("--config="):
        arguments = ["--config", arguments[0].removeprefix("--config="), *arguments[1:]]
    first = arguments[0] if arguments else ""
    if first in ("-h", "--help"):
        print(f"{pretrain.__doc__}\nThe settings of a preset: mvlm pretrain PRESET --help")
        return
    if first == "--config" and len(arguments) > 1:
        defaults, source, rest = run_config(read_config(Path(arguments[1])), arguments[1]), arguments[1], arguments[2:]
    elif first.startswith("-") or not first:
        got = repr(first) if first else "nothing"
        if first == "--config":
            got = "--config with no file after it"
        raise ConfigError(f"wanted a preset after `mvlm pretrain`: {', '.join(PRESETS)}, or --config FILE; got {got}")
    else:
        defaults, source, rest = pretrain_defaults(first, data=tyro.MISSING, out=tyro.MISSING), first, arguments[1:]
    config = parse(
        type(defaults),
        rest,
        prog=f"mvlm pretrain {source}",
        description=f"Pretrain as {source} says; the values shown are its own.",
        default=defaults,
    )
    from mvlm.training.trainer import pretrain as run

    run(config)


COMMANDS: dict[str, Callable[..., None]] = {
    "data emoji": data_commands.emoji,
    "data coco": data_commands.coco,
    "data flickr30k": data_commands.flickr30k,
    "data visual-genome": data_commands.visual_genome,
    "data cc3m": data_commands.cc3m,
    "data sbu": data_commands.sbu,
    "data folder": data_commands.folder,
    "data webdataset": data_commands.webdataset,
    "data huggingface": data_commands.huggingface,
    "data check": data_tools.check,
    "data index": data_tools.index,
    "data view": data_tools.view,
    "pretrain": pretrain,
    "plan": commands.plan,
    "eval retrieval": commands.eval_retrieval,
    "reconstruct": commands.reconstruct,
    "fill": commands.fill,
    "report": commands.report,
    "export": commands.export,
    "doctor": commands.doctor,
    "bench kernels": bench_commands.kernels,
    "bench step": bench_commands.step,
    "bench data": bench_commands.data,
}


def usage(names: Sequence[str] = ()) -> str:
    """The list of commands, or of those named."""
    lines = [f"  mvlm {name:<20} {(COMMANDS[name].__doc__ or '').splitlines()[0]}" for name in names or COMMANDS]
    return "\n".join(
        [
            "mvlm: fast pretraining of masked vision-and-language models",
            "",
            *lines,
            "",
            "mvlm COMMAND --help tells more.",
        ]
    )


def run_command(arguments: Sequence[str]) -> None:
    """Find the command that the arguments begin with and run it. ConfigError when there is none."""
    import tyro

    from mvlm.errors import ConfigError

    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage())
        return
    for words in (2, 1):
        name = " ".join(arguments[:words])
        if name in COMMANDS:
            rest = arguments[words:]
            if name == "pretrain":
                pretrain(rest)
            else:
                # A group of settings is no prefix: --min-side, not --settings.min-side.
                parse(bound(COMMANDS[name]), rest, prog=f"mvlm {name}", config=(tyro.conf.OmitArgPrefixes,))()
            return
    within = [name for name in COMMANDS if name.startswith(arguments[0] + " ")]
    if within and arguments[1:2] in (["-h"], ["--help"]):
        print(usage(within))
        return
    typed = " ".join(arguments[: 2 if within else 1])
    near = difflib.get_close_matches(typed, COMMANDS, 1) if typed != arguments[0] or not within else []
    hint = f"did you mean `mvlm {near[0]}`?" if near else f"wanted one of: {', '.join(within or COMMANDS)}"
    raise ConfigError(f"unknown command {typed!r}; {hint}")


def main() -> None:
    """Entry point: user errors on one line with exit code 2, a stopped run with 1."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    from mvlm.errors import ConfigError, LostRankError, NonFiniteLossError, RunError
    from mvlm_dataloading.errors import DataError

    try:
        run_command(sys.argv[1:])
    except (ConfigError, RunError, DataError) as error:
        print(f"mvlm: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            told = f"wanted room to write, found none ({error}); free some space and try again"
        elif error.filename is not None:
            why = f"could not be read or written ({error.strerror})"
            told = f"{error.filename}: {why}; check the path and its permissions"
        else:
            raise
        print(f"mvlm: {told}", file=sys.stderr)
        sys.exit(2)
    except (NonFiniteLossError, LostRankError) as error:
        print(f"mvlm: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("mvlm: interrupted", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
