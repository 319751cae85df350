"""`mvlm` on two ranks that are forked from one process with everything imported, in place of `torchrun`.

torchrun imports torch three times, which takes longer than the run of a micro model. tests/mvlm/distributed and
tests/promises/faults use torchrun itself.
"""

import json
import logging
import os
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

Outcomes = tuple[list[int], str]
"""Exit codes by rank, and what both wrote to stderr."""


@contextmanager
def forked_ranks() -> Iterator[Callable[..., Outcomes]]:
    """A function that runs `mvlm WORDS` on two ranks and waits for them. They are forked from one process.

    A rank's own number is in place of "{rank}" in a word.
    """
    with subprocess.Popen(
        [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
    ) as process:
        asking, answers = process.stdin, process.stdout
        assert asking is not None
        assert answers is not None

        def run(*words: object) -> Outcomes:
            asking.write(json.dumps(list(map(str, words))) + "\n")
            codes, errors = json.loads(answers.readline())
            return codes, errors

        yield run
        asking.close()


def _serve() -> None:
    """Read lists of words from stdin, one JSON line each. Answer each with a JSON line: exit codes and stderr."""
    # torch imports its compiler with the first optimizer: here once, in place of every fork.
    import torch._dynamo  # noqa: F401

    # In this order: tests/mvlm must not hide mvlm.
    import mvlm.tasks.finetune
    import mvlm.training.run  # noqa: F401

    sys.path.append(str(Path(__file__).parents[1]))
    from support.faults.forks import in_ranks

    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    for line in sys.stdin:
        words = json.loads(line)
        with tempfile.TemporaryFile() as log:
            pids = in_ranks(lambda words=words, log=log: _run(words, log.fileno()), 2)
            codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
            log.seek(0)
            answers.write(json.dumps([codes, log.read().decode(errors="replace")]) + "\n")


def _run(words: list[str], log: int) -> None:
    """Be `mvlm WORDS`, with stderr in a file. Does not return."""
    from mvlm import cli

    os.dup2(log, 2)
    code = 1
    try:
        logging.basicConfig(stream=sys.stderr, force=True)
        sys.argv = ["mvlm", *(word.replace("{rank}", os.environ["RANK"]) for word in words)]
        cli.main()
        code = 0
    except SystemExit as stop:
        code = int(stop.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).parents[2])
    _serve()
