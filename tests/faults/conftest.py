"""Trials that several tests of a module ask for one by one."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest


@pytest.fixture(scope="module")
def trial(request) -> Iterator[Callable[[str], None]]:
    """Does a trial, by name, of the program that test_NAME.py stands beside, NAME.py. AssertionError when it fails."""
    program = request.path.with_name(request.path.name.removeprefix("test_"))
    process = subprocess.Popen(
        [sys.executable, str(program)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
    )
    assert process.stdin is not None
    assert process.stdout is not None
    asking, answers = process.stdin, process.stdout

    def do(name: str) -> None:
        asking.write(name + "\n")
        answer = answers.readline()
        assert answer, f"{program} ended"
        failure = json.loads(answer)
        assert failure is None, failure

    yield do
    asking.close()
    process.wait(timeout=60)
    answers.close()
