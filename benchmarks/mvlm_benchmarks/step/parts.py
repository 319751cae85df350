"""The parts of a MaskVLM step (`mvlm.parts`), whichever plan computes it."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import patch

from torch import nn

from mvlm import fast, reading
from mvlm.model import MaskVLM
from mvlm.parts import MATCHING, part

OTHER = "other"
"""What is in no part."""
FUNCTIONS = {
    "_encode_images": "image encoder",
    "_encode_texts": "text encoder",
    "_masked_language": "MLM cross",
    "linear_cross_entropy": "LM head",
    "_masked_image": "MIM cross",
    "linear_pixel_loss": "pixel head",
    "match_pairs": MATCHING,
}
"""Of `mvlm.fast`, which does not call the large modules as modules."""


@contextlib.contextmanager
def parts_of(model: nn.Module) -> Iterator[None]:
    """Inside, the parts of a MaskVLM's step have their names, for microseconds each; a baseline names its own."""
    if not isinstance(model, MaskVLM):
        yield
        return
    head, decoder = model.language_head, model.image_decoder
    modules = {
        "image encoder": [model.image_encoder],
        "text encoder": [model.text_encoder],
        "MLM cross": [model.text_cross],
        "LM head": [head, head.dense, head.norm],
        "MIM cross": [model.image_cross],
        "decoder": [decoder, *decoder.layers],
        "pixel head": [model.pixel_head],
        "ITC": [model.image_projection, model.text_projection],
    }
    keys_values = reading.Memory.keys_values

    def decoders_too(memory: reading.Memory, block: Any) -> Any:
        with part("decoder") if block in decoder.layers else contextlib.nullcontext():
            return keys_values(memory, block)

    with contextlib.ExitStack() as stack:
        for name, found in modules.items():
            for module in found:
                _name_module(stack, module, name)
        for function, name in FUNCTIONS.items():
            stack.enter_context(patch.object(fast, function, _named(name, getattr(fast, function))))
        stack.enter_context(patch.object(reading.Memory, "keys_values", decoders_too))
        stack.enter_context(patch.object(model, "match", _named(MATCHING, model.match)))
        yield


def _name_module(stack: contextlib.ExitStack, module: nn.Module, name: str) -> None:
    """Make every call of the module a part, until the stack closes."""
    inside: list[Any] = []

    def enter(*_: Any) -> None:
        inside.append(part(name))
        inside[-1].__enter__()

    def leave(*_: Any) -> None:
        inside.pop().__exit__(None, None, None)

    stack.callback(module.register_forward_pre_hook(enter).remove)
    stack.callback(module.register_forward_hook(leave).remove)


def _named(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        with part(name):
            return function(*args, **kwargs)

    return call
