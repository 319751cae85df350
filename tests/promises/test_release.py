"""What is released: one version everywhere, distributions of all tracked files, and workflows that run no foreign code.

`make lint-workflows` checks the workflows' syntax and their security.
"""

import re
import tomllib
from pathlib import Path

import pytest
import yaml

import mvlm
import mvlm_kernels
from support.release import contents
from support.release.versions import EXTRA, lowest_versions

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
VERSION = PROJECT["version"]


def test_one_version_everywhere():
    assert mvlm.__version__ == mvlm_kernels.__version__ == VERSION, "make has to install the package again"
    sections = re.findall(r"^## (.*)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert sections[0] == "Unreleased"
    assert sections[1] == f"{VERSION} - {citation['date-released']}"
    assert citation["version"] == VERSION


def test_tags_of_other_versions_and_no_distributions_are_refused(tmp_path: Path):
    for tag, word in (("v0.0.9", f"v{VERSION}"), (f"v{VERSION}", "one wheel and one sdist")):
        with pytest.raises(SystemExit, match=re.escape(word)):
            contents.main(str(tmp_path), tag)


def test_floors_are_those_of_pyproject(tmp_path: Path):
    lowest = lowest_versions()
    assert set(lowest) == {"torch", "triton", "numpy", "timm", "transformers"}
    for requirement in [*PROJECT["dependencies"], *PROJECT["optional-dependencies"][EXTRA]]:
        name, _, rest = requirement.partition(">=")
        assert lowest[name] == rest.partition(";")[0].partition(",")[0].strip()
    file = tmp_path / "pyproject.toml"
    file.write_text('[project]\ndependencies = ["torch"]\n[project.optional-dependencies]\nintegrations = []\n')
    with pytest.raises(ValueError, match="torch"):
        lowest_versions(file)


def test_code_of_forks_never_runs_on_our_own_machine():
    jobs = {file.stem: yaml.safe_load(file.read_text())["jobs"] for file in ROOT.glob(".github/workflows/*.yml")}
    condition = jobs.pop("gpu")["gpu"]["if"]
    assert "github.event.pull_request.head.repo.full_name == github.repository" in condition
    assert not any("self-hosted" in job["runs-on"] for others in jobs.values() for job in others.values())
