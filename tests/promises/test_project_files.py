"""Files for visitors and tools name files, tests, targets and extras that exist."""

import json
import re
import shlex
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
FORMS = sorted(path for path in ROOT.glob(".github/ISSUE_TEMPLATE/*.yml") if path.stem != "config")


def test_each_defence_names_its_code_and_the_test_that_attacks_it():
    rows = re.findall(
        r"^\| .* \| `([\w/.]+)`[^|]* \| `(tests/\S+)::(test_\w+)` \|$", (ROOT / "SECURITY.md").read_text(), re.MULTILINE
    )
    assert len(rows) == (ROOT / "SECURITY.md").read_text().count("::test_") >= 15
    for code, file, name in rows:
        assert (ROOT / code).exists(), code
        assert re.search(rf"^def {name}\(", (ROOT / file).read_text(), re.MULTILINE), f"{file}::{name} does not exist"


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.stem)
def test_fields_of_an_issue_form_have_ids_and_labels(form: Path):
    body = [field for field in yaml.safe_load(form.read_text())["body"] if field["type"] != "markdown"]
    ids = [field["id"] for field in body]
    assert len(set(ids)) == len(ids)
    assert all(field["attributes"]["label"] for field in body)
    assert any(field.get("validations", {}).get("required") for field in body)


def test_there_is_a_form_for_bugs_kernels_and_questions():
    assert [form.stem for form in FORMS] == ["bug", "kernel", "question"]


def test_hooks_run_tools_of_the_environment_on_files_that_exist():
    (repository,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert repository["repo"] == "local", "a hook from elsewhere could have another version of ruff"
    for hook in repository["hooks"]:
        words = shlex.split(hook["entry"])
        assert hook["language"] == "system"
        assert words[0].startswith(".venv/bin/")
        assert all((ROOT / word).exists() for word in words if word.startswith("tests/"))


def test_images_take_a_supported_python_and_extras_that_exist():
    dockerfile = (ROOT / "Dockerfile").read_text()
    device = json.loads((ROOT / ".devcontainer/devcontainer.json").read_text())
    supported = {c.rpartition(" ")[2] for c in PROJECT["classifiers"]}
    for text in (dockerfile, device["image"]):
        assert set(re.findall(r"python:(\d\.\d+)", text)) <= supported
    (extras,) = re.findall(r"'\.\[([\w,]+)\]'", dockerfile)
    assert set(extras.split(",")) <= set(PROJECT["optional-dependencies"])
    assert device["postCreateCommand"].startswith("make .venv/.installed ")


def test_what_the_dockerfile_copies_is_not_ignored():
    kept = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = re.findall(r"^COPY --chown=\w+ (.*) \S+$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    assert {name for line in copied for name in line.split()} == kept
    assert all((ROOT / name).exists() for name in kept)


def test_the_page_of_support_names_the_versions_of_pyproject():
    page = (ROOT / "docs/reference/support.md").read_text()
    lowest = dict(re.findall(r"^(torch|triton|numpy)>=([\d.]+)", "\n".join(PROJECT["dependencies"]), re.MULTILINE))
    for name, version in lowest.items():
        assert re.search(rf"^\| {name} \| {re.escape(version)} and newer", page, re.MULTILINE | re.IGNORECASE)
    pythons = re.findall(r":: (3\.\d+)\b", "\n".join(PROJECT["classifiers"]))
    assert f"| Python | {', '.join(pythons)} |" in page
