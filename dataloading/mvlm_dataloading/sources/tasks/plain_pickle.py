"""Reader of pickles that hold nothing but lists, tuples, dictionaries, sets, texts and numbers.

A pickle is a program: it can name any function and have it called. Here every name is refused, so nothing is called.
"""

import pickle
from pathlib import Path
from typing import Any

from mvlm_dataloading.errors import DataError
from mvlm_dataloading.sources.record import require_file

_LARGEST = 1 << 30


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module_name: str, global_name: str, /) -> Any:
        raise pickle.UnpicklingError(f"the name {module_name}.{global_name}")

    def persistent_load(self, pid: Any, /) -> Any:
        raise pickle.UnpicklingError("a reference to another store")


def read_plain_pickle(file: Path) -> Any:
    """Content of a pickle of any protocol. Byte strings of Python 2 become texts, decoded as UTF-8.

    Raises:
        DataError: the file is missing, larger than 1 GiB, damaged, or holds anything but plain containers.
    """
    size = require_file(file).stat().st_size
    if size > _LARGEST:
        raise DataError(f"{file}: wanted a pickle of at most {_LARGEST} bytes, found {size}; give another file")
    with file.open("rb") as stream:
        try:
            return _PlainUnpickler(stream, encoding="utf-8", errors="surrogateescape").load()
        except Exception as error:  # damaged input raises nearly anything
            raise DataError(
                f"{file}: wanted a pickle of lists, dictionaries, texts and numbers alone, found {error}; "
                "no code of it was run, download it again"
            ) from None
