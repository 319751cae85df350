"""Tile tables: ``<op>.json`` in this folder, by architecture and then by key.

    {"sm_90": {"short_kv_backward/16bit/128/128": {"BLOCK_M": 32}}}

Each op chooses its tiles in one place:

    op                 tiles                                   key in its table
    cross_attention    rules in cross_attention/tiles.py, and  kernel/dtype/head width/short length; see below
                       a table of exceptions
    gather_patches,    ``row_grid`` in gather_patches          no table: a warp has a patch
    and pixel losses
    place_tokens,      constants in their triton.py            no table: one size for all shapes
    gelu_linear
    add_layer_norm     by the width, in its triton.py          no table

In a key of cross_attention the dtype is ``16bit`` or ``tf32``, the head width is rounded up to a power of two from 16,
and the short length is 16, 32, 64 or 128. A key that ends in ``/text`` holds where both sides are text of at most 32
rows. An exception names the fields of the rule that it replaces.

Tiles are looked up by shape and never chosen by timing. Bitwise repeatability needs the same tiles in every run, the
interpreter has no autotuner, and an autotuner would compile every candidate.

``MVLM_KERNELS_CONFIGS=<folder>`` reads the tables from another folder.
"""

import functools
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def lookup(op: str, arch: int, key: str) -> dict[str, int]:
    """Tiles of one kernel: values of its constexprs, ``num_warps`` and ``num_stages``.

    op names the file. arch is a compute capability (90): 9.x reads the table ``sm_90``, 10.x and 11.x read ``sm_100``,
    and all others read ``sm_80``. 12.x does too, because those GPUs have 99 KiB of shared memory per block, and the
    tiles of sm_80 are the smallest. Raises KeyError, naming key and file, for a key that the table does not have.
    """
    table = _table(op, _folder())
    if key not in table[_table_arch(arch)]:
        raise KeyError(f"{op}.json has no tiles for {_table_arch(arch)} {key}")
    return table[_table_arch(arch)][key]


def exceptions(op: str, arch: int) -> dict[str, dict[str, int]]:
    """Tiles of an architecture that differ from an op's rules, by key."""
    return _table(op, _folder())[_table_arch(arch)]


def with_exceptions(op: str, arch: int, found: Mapping[str, Mapping[str, int | None]]) -> dict[str, Any]:
    """A copy of an op's table in which the `found` options of an architecture replace those of the same key."""
    table: dict[str, Any] = {name: dict(rows) for name, rows in _table(op, _folder()).items()}
    rows = table[_table_arch(arch)]
    rows |= {key: {**rows.get(key, {}), **options} for key, options in found.items()}
    return table


def _table_arch(arch: int) -> str:
    if 100 <= arch < 120:
        return "sm_100"
    return "sm_90" if 90 <= arch < 100 else "sm_80"


def _folder() -> str:
    return os.environ.get("MVLM_KERNELS_CONFIGS", "")


@functools.cache
def _table(op: str, folder: str) -> dict[str, dict[str, dict[str, int]]]:
    path = (Path(folder) if folder else Path(__file__).parent) / f"{op}.json"
    return json.loads(path.read_text())
