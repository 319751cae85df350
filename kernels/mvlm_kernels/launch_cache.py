"""Launches of a compiled Triton kernel again, without what Triton derives from the arguments of every call.

``kernel[grid](*args)`` finds out the type and alignment of each argument, makes a text of all options, and looks the
compiled kernel up by both. That takes more of the host's time than the launch itself. Here a launch is known by what
Triton's choice depends on (:func:`kinds`), and a known one goes straight to the launcher of its compiled kernel.

Options of the process, such as TRITON_DEBUG, count at the first launch of a kind.
"""

from typing import Any, NamedTuple

import torch

_PLAIN = (torch.Tensor, torch.nn.Parameter)
_MOST = 4096
"""Launches that are known at a time. A process has some hundreds."""


class _Known(NamedTuple):
    """A compiled kernel, with all that launches of a kind share."""

    compiled: Any
    run: Any
    constants: tuple[Any, ...]
    """The compile-time constants among the kernel's parameters, which stand at the end."""
    driver: Any
    hooks: Any
    """Triton's settings, with the hooks of profilers."""


_known: dict[tuple[Any, ...], _Known] = {}


def launch(kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], meta: dict[str, Any], device: int) -> None:
    """``kernel[grid](*args, **meta)`` on the current CUDA device, whose index is `device`."""
    found = kinds(args)
    key = (id(kernel), device, found, *meta.items())
    known = None if found is None or kernel.pre_run_hooks else _known.get(key)
    if known is None:
        _remember(key, kernel, kernel[grid](*args, **meta), kernel.arg_names[len(args) :], meta)
        return
    # As the end of `JITFunction.run` does, from Triton 3.6 on.
    compiled, run, constants, driver, hooks = known
    stream = driver.active.get_current_stream(device)
    metadata = compiled.launch_metadata(grid, stream, *args, *constants)
    width, height, depth = grid if len(grid) == 3 else (*grid, 1) if len(grid) == 2 else (grid[0], 1, 1)
    run(
        width, height, depth, stream, compiled.function, compiled.packed_metadata, metadata,
        hooks.launch_enter_hook, hooks.launch_exit_hook, *args, *constants,
    )  # fmt: skip


def _remember(key: tuple[Any, ...], kernel: Any, compiled: Any, constants: list[str], meta: dict[str, Any]) -> None:
    if key[2] is None or compiled is None or not all(name in meta for name in constants):
        return
    from triton import knobs
    from triton.runtime import driver

    if len(_known) >= _MOST:
        _known.clear()
    _known[key] = _Known(compiled, compiled.run, tuple(meta[name] for name in constants), driver, knobs.runtime)


def kinds(args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """Kinds of a launch's arguments, by which Triton may specialise a kernel; None if an argument has another type.

    Of a tensor the dtype, and whether it begins at 16 bytes; of an int, whether it is 1 or divides by 16, and the bits
    it needs. Where Triton specialises less, there are several kinds of one compiled kernel.
    """
    found: list[Any] = []
    return tuple(found) if _add(found, args) else None


def _add(found: list[Any], args: tuple[Any, ...]) -> bool:
    for x in args:
        kind = type(x)
        if kind in _PLAIN:
            found.append((x.dtype,) if x.data_ptr() & 15 else x.dtype)
        elif kind is int:
            code = 1 if x == 1 else 2 if x & 15 else 16
            found.append(code if -0x80000000 <= x < 0x80000000 else (code, x >> 63))
        elif kind is tuple:
            found.append("(")
            if not _add(found, x):
                return False
            found.append(")")
        elif x is None or kind is float or kind is bool:
            found.append(kind)
        else:
            return False
    return True
