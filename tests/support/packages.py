"""Optional packages that a file of tests needs."""

from importlib.util import find_spec

import pytest


def needs(package: str) -> pytest.MarkDecorator:
    """A mark that skips tests if a package is not installed. It does not import it, as `pytest.importorskip` does.

    Every process of `make test` collects all tests, and each of these packages takes seconds to import.
    """
    return pytest.mark.skipif(find_spec(package) is None, reason=f"needs {package}")
