"""Published data sets, and files of your own, as sources of a build.

A file here with a function that returns a `Source` and is decorated by `source` (`mvlm_dataloading.sources.record`) is
a new data source: `mvlm data NAME` and `mvlm_dataloading.from_NAME` follow from it. docs/guides/data.md says what its
tests and its page need.
"""

import pkgutil
from collections.abc import Callable
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .record import Source


@cache
def all_sources() -> "dict[str, Callable[..., Source]]":
    """The registered sources by their names on the command line. The first call imports all files of this folder."""
    for module in pkgutil.iter_modules(__path__, f"{__name__}."):
        import_module(module.name)
    from .record import SOURCES

    return dict(sorted(SOURCES.items()))
