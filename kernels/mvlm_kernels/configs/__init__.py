"""Tile tables: ``<op>.json`` in this folder, by architecture and then by a key of kernel, dtype, width and rows.

    {"sm_80": {"short_kv_backward/16bit/64/32": {"BLOCK_M": 32, "num_warps": 4, "num_stages": 1}}}

Tiles are looked up by shape and never chosen by timing, so the same call takes the same tiles in every run. Bitwise
repeatability needs that, the interpreter has no autotuner, and no kernel is compiled twice.
``MVLM_KERNELS_CONFIGS=<folder>`` reads the tables from another folder.
"""

import functools
import json
import os
from pathlib import Path


def lookup(op: str, arch: int, key: str) -> dict[str, int]:
    """Tiles of one kernel: values of its constexprs, ``num_warps`` and ``num_stages``.

    op names the file, arch is a compute capability (90), and key is read in the newest table not newer than arch.
    Consumer GPUs have less shared memory than data-centre GPUs of their generation (99 KiB against 163 to 227 KiB), so
    8.6, 8.9 and 12.x read ``sm_80``, whose tiles are the smallest. Raises KeyError, naming key and file, for a key
    that the table does not have.
    """
    table = _table(op, os.environ.get("MVLM_KERNELS_CONFIGS", ""))
    if key not in table[_table_arch(arch)]:
        raise KeyError(f"{op}.json has no tiles for {_table_arch(arch)} {key}")
    return table[_table_arch(arch)][key]


def has(op: str, arch: int, key: str) -> bool:
    """True if :func:`lookup` would find tiles."""
    return key in _table(op, os.environ.get("MVLM_KERNELS_CONFIGS", ""))[_table_arch(arch)]


def _table_arch(arch: int) -> str:
    if 100 <= arch < 120:
        return "sm_100"
    return "sm_90" if 90 <= arch < 100 else "sm_80"


@functools.cache
def _table(op: str, folder: str) -> dict[str, dict[str, dict[str, int]]]:
    path = (Path(folder) if folder else Path(__file__).parent) / f"{op}.json"
    return json.loads(path.read_text())
