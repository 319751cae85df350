"""Model of a GPU's second-level cache: the bytes that interpreted kernels move between it and memory.

:mod:`mvlm_kernels.traffic` counts every load and store. That is what memory moves where a kernel touches each byte
once. Where several programs read the same rows, it depends on the order of programs and on the size of the cache. This
model runs programs one after another in their order and keeps the sectors used last. A GPU runs hundreds at once, so
the model holds for rows whose programs are close to each other, or far apart, in that order.
"""

import unittest.mock
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

SECTOR = 32
"""Bytes of a sector, the smallest unit that memory moves: CUDA C++ programming guide, device memory accesses."""


class Cache:
    """Least recently used sectors are evicted. A written sector goes to memory when it is evicted.

    size: bytes.
    """

    def __init__(self, size: int) -> None:
        self.capacity = size // SECTOR
        self.sectors: OrderedDict[int, bool] = OrderedDict()  # sector -> True if it was written
        self.bytes = 0

    def access(self, addresses: Any, mask: Any, itemsize: int, *, write: bool) -> None:
        """Account for one load or store: numpy arrays of byte addresses, and which of them are accessed."""
        import numpy as np

        first = addresses[mask].astype(np.int64)
        for sector in np.unique([first // SECTOR, (first + itemsize - 1) // SECTOR]).tolist():
            written = self.sectors.pop(sector, None)
            if written is None and not write:
                self.bytes += SECTOR
            self.sectors[sector] = write or bool(written)
            if len(self.sectors) > self.capacity:
                self.bytes += SECTOR * self.sectors.popitem(last=False)[1]

    def flush(self) -> None:
        """Write every written sector back."""
        self.bytes += SECTOR * sum(self.sectors.values())
        self.sectors.clear()


@contextmanager
def caching(size: int) -> Iterator[Cache]:
    """Run the loads and stores of interpreted kernels inside the block through a cache, empty before and after.

    Programs run in the order of a GPU only in grids of one dimension: the interpreter's last dimension runs fastest.
    """
    from triton.runtime.interpreter import InterpreterBuilder, _get_np_dtype

    cache = Cache(size)
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

    def cached_load(self, ptrs, mask, *rest):
        value = load(self, ptrs, mask, *rest)
        cache.access(ptrs.data, mask.data, value.data.dtype.itemsize, write=False)
        return value

    def cached_store(self, ptrs, value, mask, *rest):
        import numpy as np

        cache.access(ptrs.data, mask.data, np.dtype(_get_np_dtype(ptrs.get_element_ty())).itemsize, write=True)
        return store(self, ptrs, value, mask, *rest)

    patched = {"create_masked_load": cached_load, "create_masked_store": cached_store}
    with unittest.mock.patch.multiple(InterpreterBuilder, **patched):
        yield cache
    cache.flush()
