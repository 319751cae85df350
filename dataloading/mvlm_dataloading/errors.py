"""The error for data that cannot be used, and imports of optional packages."""

import importlib
from types import ModuleType


class DataError(ValueError):
    """Data that cannot be used. The message is one line: what was wanted, what was found, what to do."""


def need(module: str, extra: str = "data") -> ModuleType:
    """Import an optional dependency at its use, so that `import mvlm_dataloading` works without it.

    Args:
        extra: the extra of `mvlm` that installs it.

    Raises:
        ImportError: it is missing. The message has the command that installs it.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not (module + ".").startswith(error.name + "."):
            raise  # the package is installed, but one of its dependencies is not
        raise ImportError(f"{module} is needed here and is not installed: pip install 'mvlm[{extra}]'") from error
