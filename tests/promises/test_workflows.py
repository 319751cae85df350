"""Lowest versions follow from pyproject.toml, and code of forks never runs on the project's own machine.

`make lint-workflows` checks the workflows' syntax and their security.
"""

import tomllib
from pathlib import Path

import pytest
import yaml

from support.release.versions import EXTRA, lowest_versions

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


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
    jobs = {file.stem: yaml.safe_load(file.read_text())["jobs"] for file in ROOT.glob(".github/workflows/*.yml")}
    condition = jobs.pop("gpu")["gpu"]["if"]
    assert "github.event.pull_request.head.repo.full_name == github.repository" in condition
    assert not any("self-hosted" in job["runs-on"] for others in jobs.values() for job in others.values())
