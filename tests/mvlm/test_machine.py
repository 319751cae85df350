"""The description of the machine, and the revision of the code."""

import subprocess

from mvlm import machine


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
    machine.code_revision.cache_clear()
