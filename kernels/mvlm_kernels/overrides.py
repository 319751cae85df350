"""Other launch options for measurements: :func:`override_launch`.

Tiles are chosen by shape and never by timing. A sweep that looks for better rules needs the same launchers with other
options, and nothing else should.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

choices: list[tuple[str, tuple[Any, ...]]] | None = None
"""Kernel and other arguments of every choice of options, in order. Only :func:`recording_choices` writes it."""

in_force: dict[str, dict[str, Any]] = {}
"""Kernel -> its options. Only :func:`override_launch` writes it; a launcher reads whether it is empty."""


@contextmanager
def override_launch(kernel: str, **options: Any) -> Iterator[None]:
    """Launch one kernel with other options inside the block: constexprs, num_warps, num_stages, maxnreg.

    kernel is the name under which the launcher chooses its options; for most kernels that of the Triton function.
    Results may be wrong if an option does not fit the kernel. A launcher whose grid follows from an option has to ask
    :func:`overridden` for it before it computes the grid.
    """
    before = in_force.get(kernel)
    in_force[kernel] = options
    try:
        yield
    finally:
        in_force.pop(kernel) if before is None else in_force.update({kernel: before})


def overridden(kernel: str, options: dict[str, Any]) -> dict[str, Any]:
    """The options, with those of :func:`override_launch` in force. Returns the same dict if there are none."""
    found = in_force.get(kernel)
    return {**options, **found} if found else options


@contextmanager
def recording_choices() -> Iterator[list[tuple[str, tuple[Any, ...]]]]:
    """Yield a list that receives the arguments of every choice of options inside the block."""
    global choices
    before, choices = choices, []
    try:
        yield choices
    finally:
        choices = before


def overridable(choose_options: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    """Decorator of a function that chooses the options of a kernel; the kernel's name is its first argument."""

    @functools.wraps(choose_options)
    def chosen(kernel: str, *arguments: Any) -> dict[str, Any]:
        if choices is not None:
            choices.append((kernel, arguments))
        return overridden(kernel, choose_options(kernel, *arguments))

    return chosen
