"""--base: another revision's ops in a process of their own."""

import shutil
import subprocess
from pathlib import Path

import pytest
import torch

import mvlm_kernels
from mvlm.errors import ConfigError
from mvlm_benchmarks.kernels.base_revision import Worker, export
from mvlm_benchmarks.kernels.cases import cases
from mvlm_benchmarks.kernels.compare import bench_case, rows_of

IGNORED = shutil.ignore_patterns("__pycache__")


def git(folder: Path, *words: str) -> str:
    command = ["git", "-C", folder, "-c", "user.name=n", "-c", "user.email=e", *words]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture(scope="module")
def repository(tmp_path_factory) -> Path:
    """Three revisions: nothing of ours; today's kernels, marked; a package that is too old for the benchmarks."""
    root = tmp_path_factory.mktemp("repository")
    git(root, "init", "-q")
    (root / "readme").write_text("nothing yet\n")
    git(root, "add", ".")
    git(root, "commit", "-qm", "empty")
    git(root, "tag", "empty")
    package = root / "kernels" / "mvlm_kernels"
    shutil.copytree(Path(mvlm_kernels.__file__).parent, package, ignore=IGNORED)
    # Twice as large: the check against that revision's own reference has to see that it is that revision's op.
    init = package / "__init__.py"
    init.write_text(
        init.read_text() + "\n_place = place_tokens\ndef place_tokens(*a, **k):\n    return 2 * _place(*a, **k)\n"
    )
    git(root, "add", ".")
    git(root, "commit", "-qm", "doubled")
    git(root, "tag", "doubled")
    shutil.rmtree(package / "pixel_loss")
    git(root, "commit", "-qam", "old")
    git(root, "tag", "old")
    return root


def test_a_revision_that_is_not_there(repository, tmp_path) -> None:
    with pytest.raises(ConfigError, match=r"base: wanted a git revision in a checkout, got 'nope' .*; try HEAD"):
        export(repository, "nope", tmp_path)
    with pytest.raises(ConfigError, match="base: wanted a git revision in a checkout, got '--help'"):
        export(repository, "--help", tmp_path)
    with pytest.raises(ConfigError, match="base: wanted a git revision in a checkout"):
        export(tmp_path, "HEAD", tmp_path)


def test_a_revision_without_kernels(repository, tmp_path) -> None:
    with pytest.raises(ConfigError, match="base: wanted a revision that has kernels/mvlm_kernels, got 'empty'"):
        export(repository, "empty", tmp_path)


def test_a_revision_that_is_too_old_is_one_line(repository, tmp_path) -> None:
    export(repository, "old", tmp_path)
    with pytest.raises(ConfigError, match=r"base: wanted a revision whose kernels load .*, got: .*pixel_loss"):
        Worker(tmp_path, "cpu", True, 1)


def test_the_other_revision_is_timed_beside_ours(repository, tmp_path, clock) -> None:
    assert export(repository, "doubled", tmp_path) == git(repository, "rev-parse", "--short=12", "doubled")
    found = [c for c in cases(1, torch.float32) if c.op in ("place_tokens", "gather_patches") and c.core]
    gather, place = found
    worker = Worker(tmp_path, "cpu", True, 1)
    try:
        rows = rows_of(gather, bench_case(gather, "cpu", [], clock, 2, worker))
        wrong = rows_of(place, bench_case(place, "cpu", [], clock, 1, worker))
    finally:
        worker.close()
    ours, base = rows
    assert (ours["contender"], base["contender"]) == ("ours", "base")
    assert base["status"] == "ok"
    assert base["us"] > 0
    assert base["vs_base"] == 1.0
    assert ours["base"] == base["us"]
    assert ours["vs_base"] == pytest.approx(10.0 / base["us"], abs=1e-3)
    # It really is that revision's op which ran: doubled, it is wrong by its own reference.
    assert [row["status"] for row in wrong if row["contender"] == "base"] == ["WRONG"] * 3
    assert [row["status"] for row in wrong if row["contender"] == "ours"] == ["ok"] * 3
