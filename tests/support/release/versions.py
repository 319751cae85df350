"""Lowest versions that pyproject.toml allows, as requirements of pip: `python -m support.release.versions floors`.

`heads` prints the same names without versions, for the newest.
"""

import re
import sys
import tomllib
from pathlib import Path

PYPROJECT = Path(__file__).parents[3] / "pyproject.toml"
EXTRA = "integrations"
"""Extra in pyproject.toml whose packages are tested at their oldest versions, beside the dependencies."""


def lowest_versions(pyproject: Path = PYPROJECT) -> dict[str, str]:
    """Name -> the version after `>=`, for the dependencies and the extra `integrations`.

    Raises ValueError for a requirement without a lowest version.
    """
    project = tomllib.loads(pyproject.read_text())["project"]
    found = {}
    for requirement in [*project["dependencies"], *project["optional-dependencies"][EXTRA]]:
        match = re.match(r"([\w-]+)>=([\d.]+)", requirement)
        if match is None:
            raise ValueError(
                f"wanted a lowest version (name>=1.0), found {requirement!r}; state one in {pyproject.name}"
            )
        found[match[1]] = match[2]
    return found


def main(choice: str) -> None:
    lowest = lowest_versions()
    print(*(lowest if choice == "heads" else [f"{name}=={version}" for name, version in lowest.items()]))


if __name__ == "__main__":
    main(sys.argv[1])
