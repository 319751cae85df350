"""Check of built distributions against the tracked files: `python -m support.release.contents dist [TAG]`.

A wheel holds every tracked file of the packages and nothing else. An sdist also holds what a build needs.
"""

import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[3]
FOLDERS = {
    "mvlm": "",
    "mvlm_kernels": "kernels/",
    "triton_proof": "kernels/",
    "mvlm_dataloading": "dataloading/",
    "mvlm_benchmarks": "benchmarks/",
}
"""Package -> folder that it lies in, with a slash."""
BESIDE = {
    "CHANGELOG.md", "CITATION.cff", "LICENSE", "MANIFEST.in", "PKG-INFO", "README.md", "pyproject.toml", "setup.cfg",
}  # fmt: skip
"""Files of an sdist beside the packages. setuptools writes PKG-INFO and setup.cfg."""


def wheel_faults(wheel: Path, tracked: set[str]) -> list[str]:
    """Files that a wheel lacks or has too many; its `.dist-info` is setuptools' own."""
    wanted = {
        path.removeprefix(next(f for f in sorted(FOLDERS.values())[::-1] if path.startswith(f))) for path in tracked
    }
    with zipfile.ZipFile(wheel) as archive:
        found = {name for name in archive.namelist() if ".dist-info/" not in name}
    return _differences(wheel.name, wanted, found)


def sdist_faults(sdist: Path, tracked: set[str]) -> list[str]:
    """Files that an sdist lacks or has too many; its `.egg-info` is setuptools' own."""
    with tarfile.open(sdist) as archive:
        names = [member.name.partition("/")[2] for member in archive.getmembers() if member.isfile()]
    found = {name for name in names if ".egg-info/" not in name}
    return _differences(sdist.name, tracked | BESIDE, found)


def _differences(name: str, wanted: set[str], found: set[str]) -> list[str]:
    return [f"{name} lacks {path}" for path in sorted(wanted - found)] + [
        f"{name} holds {path}, which is not wanted" for path in sorted(found - wanted)
    ]


def main(folder: str, tag: str = "") -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    if tag and tag != f"v{version}":
        sys.exit(f"wanted the tag v{version}, the version in pyproject.toml; found {tag}")
    wheels, sdists = list(Path(folder).glob("*.whl")), list(Path(folder).glob("*.tar.gz"))
    if [len(wheels), len(sdists)] != [1, 1]:
        sys.exit(f"{folder}: wanted one wheel and one sdist, found {len(wheels)} and {len(sdists)}")
    folders = [folder + package for package, folder in FOLDERS.items()]
    done = subprocess.run(["git", "-C", ROOT, "ls-files", *folders], capture_output=True, text=True, check=True)
    tracked = set(done.stdout.split())
    faults = wheel_faults(wheels[0], tracked) + sdist_faults(sdists[0], tracked)
    if faults:
        sys.exit("\n".join(faults))
    print(f"{wheels[0].name}, {sdists[0].name}: {len(tracked)} files of the packages, as tracked")


if __name__ == "__main__":
    main(*sys.argv[1:])
