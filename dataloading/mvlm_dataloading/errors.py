"""The one error a user of the data can cause, and the message for a package that is not installed."""

import importlib
from types import ModuleType


class DataError(ValueError):
    """The data is not what was asked for. One line: what was wanted, what was found, what to do."""


def need(module: str, extra: str = "data") -> ModuleType:
    """Import an optional dependency where it is used, so that `import mvlm_dataloading` works without it.

    Raises:
        ImportError: with the command that installs it.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not (module + ".").startswith(error.name + "."):
            raise  # the package is there, and something that it needs in turn is not
        raise ImportError(f"{module} is needed here and is not installed: pip install 'mvlm[{extra}]'") from error
