"""Workflows run the Makefile's targets, on the versions that pyproject.toml names, with pinned actions.

`make lint-workflows` checks their syntax and their security.
"""

import re
import shlex
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from support.release.versions import EXTRA, lowest_versions

ROOT = Path(__file__).parents[2]
WORKFLOWS = sorted(ROOT.glob(".github/workflows/*.yml"))
MAKEFILE = (ROOT / "Makefile").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
each_workflow = pytest.mark.parametrize("file", WORKFLOWS, ids=lambda file: file.stem)


def jobs(file: Path) -> dict[str, dict[str, Any]]:
    return yaml.safe_load(file.read_text())["jobs"]


def steps(file: Path) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Each step of a workflow, behind its job."""
    return [(job, step) for job in jobs(file).values() for step in job["steps"]]


def commands(job: dict[str, Any], step: dict[str, Any]) -> list[str]:
    """A step's command, once for each value of the matrix that its `env` puts into it."""
    found = [step["run"]]
    for name, value in step.get("env", {}).items():
        key = re.fullmatch(r"\$\{\{ matrix\.(\w+) \}\}", value)
        assert key, f"{name}: {value} is not from the matrix"
        found = [line.replace(f'"${name}"', x) for line in found for x in job["strategy"]["matrix"][key[1]]]
    return found


def make_targets() -> set[str]:
    return set(re.findall(r"^## (\S+)  ?", MAKEFILE, re.MULTILINE))


def test_the_workflows_are_there():
    assert [file.stem for file in WORKFLOWS] == ["check", "docs", "gpu", "release", "tests"]


@each_workflow
def test_every_shell_line_is_one_target_of_the_makefile(file: Path):
    lines = [line for job, step in steps(file) if "run" in step for line in commands(job, step)]
    assert lines
    for line in lines:
        program, target, *settings = shlex.split(line)
        assert program == "make"
        assert target in make_targets(), f"{file.name}: the Makefile lists no target {target}"
        for setting in settings:
            name = setting.partition("=")[0]
            assert re.search(rf"^{name}\s*\?=", MAKEFILE, re.MULTILINE), f"the Makefile has no variable {name}"


@each_workflow
def test_every_action_is_pinned_by_commit_with_its_version_beside_it(file: Path):
    lines = re.findall(r"^.*uses: .*$", file.read_text(), re.MULTILINE)
    assert len(lines) == sum("uses" in step for _, step in steps(file)) > 0
    for line in lines:
        assert re.search(r"uses: [\w-]+/[\w-]+@[0-9a-f]{40}  # v\d+\.\d+\.\d+$", line), line


def test_an_action_has_one_version_in_all_workflows():
    used = {tuple(step["uses"].split("@")) for file in WORKFLOWS for _, step in steps(file) if "uses" in step}
    assert len(used) == len({name for name, _ in used})


@each_workflow
def test_permissions_are_read_only_but_for_publishing(file: Path):
    """A job that may write has no checkout, so no code of the repository runs with its rights."""
    assert yaml.safe_load(file.read_text())["permissions"] in ({}, {"contents": "read"})
    for job in jobs(file).values():
        assert job["timeout-minutes"] <= 90
        if "write" in job.get("permissions", {}).values():
            assert not any("run" in step or "checkout" in step["uses"] for step in job["steps"])


def test_checkouts_keep_no_credentials():
    for file in WORKFLOWS:
        for _, step in steps(file):
            if "actions/checkout@" in step.get("uses", ""):
                assert step["with"] == {"persist-credentials": False}


def test_the_suite_runs_on_every_python_that_pyproject_names():
    named = [c.rpartition(" ")[2] for c in PROJECT["classifiers"] if re.search(r":: 3\.\d+$", c)]
    matrix = jobs(ROOT / ".github/workflows/tests.yml")["suite"]["strategy"]["matrix"]["python"]
    assert matrix == named
    assert PROJECT["requires-python"] == f">={named[0]}"


def test_kernels_run_on_floors_heads_and_both_tritons():
    """The Makefile's oldest Triton is the lowest that pyproject.toml allows."""
    (line,) = re.findall(r"^TRITONS \?= (.*)$", MAKEFILE, re.MULTILINE)
    assert line.split()[0].startswith(lowest_versions()["triton"])
    lines = [c for j, s in steps(ROOT / ".github/workflows/tests.yml") if "run" in s for c in commands(j, s)]
    assert {"make test-floors", "make test-heads", "make test-triton"} <= set(lines)


def test_floors_are_those_of_pyproject():
    lowest = lowest_versions()
    assert set(lowest) == {"torch", "triton", "numpy", "timm", "transformers", "diffusers"}
    for requirement in [*PROJECT["dependencies"], *PROJECT["optional-dependencies"][EXTRA]]:
        name, _, rest = requirement.partition(">=")
        assert lowest[name] == rest.partition(";")[0].partition(",")[0].strip()


def test_a_requirement_without_a_floor_is_refused(tmp_path: Path):
    file = tmp_path / "pyproject.toml"
    file.write_text('[project]\ndependencies = ["torch"]\n[project.optional-dependencies]\nintegrations = []\n')
    with pytest.raises(ValueError, match=r"wanted a lowest version .*, found 'torch'"):
        lowest_versions(file)


def test_code_of_forks_never_runs_on_our_own_machine():
    condition = jobs(ROOT / ".github/workflows/gpu.yml")["gpu"]["if"]
    assert "github.event.pull_request.head.repo.full_name == github.repository" in condition
    assert not any("self-hosted" in job["runs-on"] for f in WORKFLOWS if f.stem != "gpu" for job in jobs(f).values())
