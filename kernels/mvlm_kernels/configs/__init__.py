"""Tile tables: ``<op>.json`` beside this file, by architecture and then by a key such as
``"short_kv_backward/bf16/64/32"``.

    {"sm_80": {"short_kv_backward/bf16/64/32": {"BLOCK_M": 32, "num_warps": 4, "num_stages": 1}}}

A table is chosen in plain Python from shapes, never by timing, so the same call takes the same tiles in every run:
repeatability needs it, the interpreter has no autotuner, and nothing is compiled twice.
``MVLM_KERNELS_CONFIGS=<folder>`` reads the tables from elsewhere.
"""

import functools
import json
import os
from pathlib import Path


def lookup(op: str, arch: int, key: str) -> dict[str, int]:
    """Tiles of one kernel: constexpr names and ``num_warps``, ``num_stages``.

    op names the file, arch is a compute capability (90), key is read in the newest table that is not newer than arch.
    Data-centre and consumer parts of one generation differ in shared memory (99 KiB against 163 to 227), so 8.6, 8.9
    and 12.x read ``sm_80``, whose tiles are the smallest. Raises KeyError, naming key and file, if there is none.
    """
    table = _table(op, os.environ.get("MVLM_KERNELS_CONFIGS", ""))
    if key not in table[_table_arch(arch)]:
        raise KeyError(f"{op}.json has no tiles for {_table_arch(arch)} {key}")
    return table[_table_arch(arch)][key]


def has(op: str, arch: int, key: str) -> bool:
    """Whether :func:`lookup` would find tiles."""
    return key in _table(op, os.environ.get("MVLM_KERNELS_CONFIGS", ""))[_table_arch(arch)]


def _table_arch(arch: int) -> str:
    if 100 <= arch < 120:
        return "sm_100"
    return "sm_90" if 90 <= arch < 100 else "sm_80"


@functools.cache
def _table(op: str, folder: str) -> dict[str, dict[str, dict[str, int]]]:
    path = (Path(folder) if folder else Path(__file__).parent) / f"{op}.json"
    return json.loads(path.read_text())
