"""Classes for modules of other libraries that get another forward in place, as torch.fx and TorchScript see them.

torch.fx must not look into a forward that chooses by the device of its tensors: :func:`node_of_call` makes it one node
of the graph. TorchScript must not see it at all: it compiles the library's own forward (:func:`scripted_as`).
"""

import functools
from collections.abc import Callable, Sequence
from types import FunctionType
from typing import Any

import torch
from torch import fx, nn

Forward = Callable[..., Any]


def scripted_as(original: Any) -> Callable[[Forward], Any]:
    """Decorator of a forward: TorchScript compiles `original` in its place.

    It reads source and defaults of a function through ``__wrapped__``, and looks up names in the function's globals.
    """

    def decorate(function: Forward) -> Any:
        def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            return function(self, *args, **kwargs)

        found = FunctionType(forward.__code__, original.__globals__, "forward", None, forward.__closure__)
        functools.update_wrapper(found, function)
        vars(found)["__wrapped__"] = original
        return found

    return decorate


def traced(*args: Any) -> fx.Tracer | None:
    """The tracer of ``torch.fx`` that calls with these arguments, if one does."""
    proxies = (x for x in args if isinstance(x, fx.Proxy))
    return next((x.tracer for x in proxies if isinstance(x.tracer, fx.Tracer)), None)


def in_torchscript() -> bool:
    """True inside ``torch.jit.trace``, which then records, as ``torch.jit.script`` compiles, no op of this package."""
    return torch.jit.is_tracing()  # pyright: ignore[reportPrivateImportUsage]


def node_of_call(tracer: fx.Tracer, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> fx.Proxy | None:
    """Record a call of `module` as one node `call_module` of the torch.fx graph, in place of the ops inside.

    Returns None if `module` is the traced model itself, which cannot be a node of its own graph.
    """
    if module is tracer.root:
        return None
    return tracer.create_proxy("call_module", tracer.path_of_module(module), args, kwargs)


def put_back(modules: Sequence[Any]) -> None:
    """Give swapped modules the class back that their present one names as `swapped_from`.

    Raises RuntimeError, before it changes anything, for a module that has got another class since.
    """
    swapped = [module for module in modules if hasattr(module, "swapped_from")]  # the others are put back already
    for module in swapped:
        if "swapped_from" not in vars(type(module)):
            raise RuntimeError(
                f"undo: wanted modules of the classes that the swap gave them, found {type(module).__name__}; "
                "undo what gave it this class first, or undo before fully_shard"
            )
    for module in swapped:
        module.__class__ = module.swapped_from
