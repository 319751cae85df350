"""`--base`: our ops at another revision, in a worker process."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

import mvlm_kernels
from mvlm.errors import ConfigError
from mvlm_benchmarks.kernels.base_revision import BaseWorker, export_kernels
from mvlm_benchmarks.kernels.cases import cases
from mvlm_benchmarks.kernels.compare import bench_case, rows_of
from support.benchmarks import FakeClock

IGNORED = shutil.ignore_patterns("__pycache__")


def git(folder: Path, *words: str) -> str:
    command = ["git", "-C", folder, "-c", "user.name=n", "-c", "user.email=e", *words]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def rename_module(package: Path, old: str, new: str) -> None:
    """Rename a folder of mvlm_kernels and its imports. Ops and functions keep their names."""
    (package / old).rename(package / new)
    for file in package.rglob("*.py"):
        file.write_text(re.sub(rf"(?<=from mvlm_kernels\.){old}\b", new, file.read_text()))


@pytest.fixture(scope="module")
def repository(tmp_path_factory) -> Path:
    """Four revisions: no kernels; ours with a doubled op; the same with the old folder names; one that is too old."""
    root = tmp_path_factory.mktemp("repository")
    git(root, "init", "-q")
    (root / "readme").write_text("nothing yet\n")
    git(root, "add", ".")
    git(root, "commit", "-qm", "empty")
    git(root, "tag", "empty")
    package = root / "kernels" / "mvlm_kernels"
    shutil.copytree(Path(mvlm_kernels.__file__).parent, package, ignore=IGNORED)
    # A doubled op is wrong by its own reference, which shows that it was this revision's op that ran.
    init = package / "__init__.py"
    init.write_text(
        init.read_text() + "\n_place = place_tokens\ndef place_tokens(*a, **k):\n    return 2 * _place(*a, **k)\n"
    )
    git(root, "add", ".")
    git(root, "commit", "-qm", "doubled")
    git(root, "tag", "doubled")
    rename_module(package, *("gather_patches", "patch_gather")[:: 1 if (package / "gather_patches").is_dir() else -1])
    git(root, "add", ".")
    git(root, "commit", "-qm", "renamed")
    git(root, "tag", "renamed")
    shutil.rmtree(package / "pixel_loss")
    git(root, "commit", "-qam", "old")
    git(root, "tag", "old")
    return root


def test_unknown_revision_is_a_config_error(repository, tmp_path) -> None:
    with pytest.raises(ConfigError, match=r"base: wanted a git revision in a checkout, got 'nope' .*; try HEAD"):
        export_kernels(repository, "nope", tmp_path)
    with pytest.raises(ConfigError, match="base: wanted a git revision in a checkout, got '--help'"):
        export_kernels(repository, "--help", tmp_path)
    with pytest.raises(ConfigError, match="base: wanted a git revision in a checkout"):
        export_kernels(tmp_path, "HEAD", tmp_path)


def test_revision_without_kernels_is_a_config_error(repository, tmp_path) -> None:
    with pytest.raises(ConfigError, match="base: wanted a revision that has kernels/mvlm_kernels, got 'empty'"):
        export_kernels(repository, "empty", tmp_path)


@pytest.mark.slow
def test_revision_that_is_too_old_is_a_config_error(repository, tmp_path) -> None:
    export_kernels(repository, "old", tmp_path)
    with pytest.raises(ConfigError, match=r"base: wanted a revision whose kernels load .*, got: .*pixel_loss"):
        BaseWorker(tmp_path, "cpu", True, 1)


@pytest.mark.slow
@pytest.mark.parametrize("revision", ["doubled", "renamed"])
def test_other_revision_is_timed_in_turns_with_ours(repository, tmp_path, revision) -> None:
    """Folders of the kernels have changed their names: `--base` runs revisions with either."""
    assert export_kernels(repository, revision, tmp_path) == git(repository, "rev-parse", "--short=12", revision)
    found = [c for c in cases(1, torch.float32) if c.op in ("place_tokens", "gather_patches") and c.core]
    gather, place = found
    worker = BaseWorker(tmp_path, "cpu", True, 1)
    try:
        # Of three rounds, the median of the ratios is the ratio to the median.
        rows = rows_of(gather, bench_case(gather, "cpu", [], FakeClock(), 3, worker))
        wrong = rows_of(place, bench_case(place, "cpu", [], FakeClock(), 1, worker))
    finally:
        worker.close()
    ours, base = rows
    assert (ours["contender"], base["contender"]) == ("ours", "base")
    assert base["status"] == "ok"
    assert base["us"] > 0
    assert base["vs_base"] == 1.0
    assert ours["base"] == base["us"]
    assert ours["vs_base"] == pytest.approx(10.0 / base["us"], abs=1e-3)
    # The doubled op ran: it is wrong by its own reference.
    assert [row["status"] for row in wrong if row["contender"] == "base"] == ["WRONG"] * 3
    assert [row["status"] for row in wrong if row["contender"] == "ours"] == ["ok"] * 3
