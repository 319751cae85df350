"""What is released: one version everywhere, and distributions that hold all tracked files and nothing else."""

import io
import re
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml

import mvlm
import mvlm_kernels
from support.release import contents

ROOT = Path(__file__).parents[2]
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
FILES = {"mvlm/cli.py", "kernels/mvlm_kernels/aot.py", "dataloading/mvlm_dataloading/batch.py"}


def test_packages_tell_the_version_of_the_distribution():
    assert mvlm.__version__ == mvlm_kernels.__version__ == VERSION, "make has to install the package again"


def test_the_newest_numbered_section_of_the_changelog_is_this_version():
    sections = re.findall(r"^## (.*)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert sections[0] == "Unreleased"
    assert re.fullmatch(rf"{re.escape(VERSION)} - \d{{4}}-\d\d-\d\d", sections[1])


def test_the_citation_has_version_and_date_of_the_changelog():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    section = f"## {citation['version']} - {citation['date-released']}"
    assert section in (ROOT / "CHANGELOG.md").read_text().splitlines()
    assert citation["version"] == VERSION


def wheel(folder: Path, names: set[str]) -> Path:
    file = folder / "mvlm.whl"
    with zipfile.ZipFile(file, "w") as archive:
        for name in [*names, "mvlm-1.dist-info/METADATA"]:
            archive.writestr(name, "")
    return file


def sdist(folder: Path, names: set[str]) -> Path:
    file = folder / "mvlm.tar.gz"
    with tarfile.open(file, "w:gz") as archive:
        for name in [*names, "mvlm.egg-info/SOURCES.txt"]:
            archive.addfile(tarfile.TarInfo(f"mvlm-1/{name}"), io.BytesIO())
    return file


def test_a_wheel_holds_the_packages_without_their_folders(tmp_path: Path):
    whole = {"mvlm/cli.py", "mvlm_kernels/aot.py", "mvlm_dataloading/batch.py"}
    assert contents.wheel_faults(wheel(tmp_path, whole), FILES) == []
    found = contents.wheel_faults(wheel(tmp_path, whole - {"mvlm/cli.py"} | {"tests/test_house.py"}), FILES)
    assert found == ["mvlm.whl lacks mvlm/cli.py", "mvlm.whl holds tests/test_house.py, which is not wanted"]


def test_an_sdist_also_holds_what_a_build_needs(tmp_path: Path):
    whole = FILES | contents.BESIDE
    assert contents.sdist_faults(sdist(tmp_path, whole), FILES) == []
    found = contents.sdist_faults(sdist(tmp_path, whole - {"pyproject.toml"} | {"data/a.tar"}), FILES)
    assert found == ["mvlm.tar.gz lacks pyproject.toml", "mvlm.tar.gz holds data/a.tar, which is not wanted"]


def test_a_tag_of_another_version_is_refused(tmp_path: Path):
    with pytest.raises(SystemExit, match=rf"wanted the tag v{re.escape(VERSION)}, .*; found v0\.0\.9"):
        contents.main(str(tmp_path), "v0.0.9")
    with pytest.raises(SystemExit, match="wanted one wheel and one sdist, found 0 and 0"):
        contents.main(str(tmp_path), f"v{VERSION}")
