"""The description of the machine, and the revision of the code."""

import subprocess

import pytest
import torch

from mvlm import machine


@pytest.fixture(autouse=True)
def fresh():
    for cached in (machine.code_revision, machine.cpu_facts):
        cached.cache_clear()
    yield
    for cached in (machine.code_revision, machine.cpu_facts):
        cached.cache_clear()


def test_the_revision_of_a_checkout_says_whether_it_has_changes(tmp_path, monkeypatch):
    def git(*words: str) -> str:
        return subprocess.run(
            ["git", "-C", tmp_path, "-c", "user.name=n", "-c", "user.email=e", *words],
            check=True, capture_output=True, text=True,
        ).stdout.strip()  # fmt: skip

    def revision() -> str:
        machine.code_revision.cache_clear()
        return machine.code_revision()

    file = tmp_path / "machine.py"
    file.touch()
    monkeypatch.setattr(machine, "__file__", str(file))
    assert revision() == ""
    git("init", "-q")
    assert revision() == "", "a package that git does not track is not that repository's"
    git("add", ".")
    git("commit", "-qm", "one")
    head = git("rev-parse", "--short=12", "HEAD")
    (tmp_path / "notes").touch()
    assert revision() == head
    file.write_text("x = 1\n")
    assert revision() == f"{head}-dirty"


def test_a_machine_is_described(monkeypatch):
    facts = {"model name": "Some CPU", "cpu family": "25", "model": "17", "stepping": "1"}
    monkeypatch.setattr(machine, "cpu_facts", lambda: facts)
    found = machine.describe_machine(torch.device("cpu"), ranks=2)
    assert found["processor"] == "Some CPU, family 25, model 17, stepping 1"
    assert (found["device"], found["ranks"], found["threads"]) == ("cpu", 2, torch.get_num_threads())
