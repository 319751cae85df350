"""Programs that a stage runs beside itself."""

import contextlib
import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from typing import IO

from mvlm_benchmarks.machine import source_root
from mvlm_benchmarks.unavailable import one_line


def run_program(
    command: Sequence[str],
    limit: float,
    output: IO[str],
    environment: Mapping[str, str] | None = None,
    errors: IO[str] | None = None,
) -> int | None:
    """Run a program in a session of its own. When it ends or is ended, all processes that it started end too.

    What pytest or a compiling process started would go on using the GPU.

    Args:
        limit: seconds.
        output: file that its output is written to, as it comes.
        environment: variables that are added to those of this process.
        errors: another file for its standard error.

    Returns:
        Its exit code; None if the limit ended it; 127 if it could not be started, and `output` says why.
    """
    try:
        process = subprocess.Popen(
            command, cwd=source_root(), env={**os.environ, **(environment or {})}, stdin=subprocess.DEVNULL,
            stdout=output, stderr=errors or subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
    except OSError as error:
        output.write(f"{one_line(error)}\n")
        return 127
    try:
        return process.wait(limit)
    except subprocess.TimeoutExpired:
        return None
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
