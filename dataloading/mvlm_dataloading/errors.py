"""The error for data that cannot be used, and imports of optional packages."""

import importlib
from types import ModuleType


class DataError(ValueError):
    """Data that cannot be used. The message is one line: what was wanted, what was found, what to do."""


class MissingPackageError(ImportError):
    """An optional package that is needed and not installed. The message has the command that installs it."""


def need(module: str, extra: str = "data") -> ModuleType:
    """Import an optional dependency at its use, so that `import mvlm_dataloading` works without it.

    Args:
        extra: the extra of `mvlm` that installs it.

    Raises:
        MissingPackageError: it is missing.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not (module + ".").startswith(error.name + "."):
            raise  # the package is installed, but one of its dependencies is not
        message = f"{module} is needed here and is not installed: pip install 'mvlm[{extra}]'"
        raise MissingPackageError(message) from error
