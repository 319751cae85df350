"""Named parts of a training step, for the profile and the FLOP count."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import nn

from mvlm.model import fast
from mvlm.model.cross_encoder import KeyValueCache
from mvlm.model.maskvlm import MaskVLM

PREFIX = "part:"
"""Prefix of the profiler ranges that mark parts."""
PARTS = (
    "image encoder",
    "text encoder",
    "MLM cross",
    "LM head",
    "MIM cross",
    "decoder",
    "pixel head",
    "ITC",
    "ITM",
)
"""Parts in the order of a step."""
MATCHING = "ITM"
"""Part that includes all parts nested in it, such as the cross encoders. Of other nested parts the innermost counts."""
OTHER = "other"
"""Name for everything outside the parts."""
FAST_FUNCTIONS = {
    "project_patches": "image encoder",
    "encode_images": "image encoder",
    "encode_texts": "text encoder",
    "language_loss": "MLM cross",
    "linear_cross_entropy": "LM head",
    "image_loss": "MIM cross",
    "linear_pixel_loss": "pixel head",
    "fuse_pairs": MATCHING,
}
"""Functions of `mvlm.model.fast` -> part. Marking modules is not enough, because the fast implementation does not call
the large ones."""


class GflopPerPair(NamedTuple):
    """GFLOP per image-caption pair."""

    forward: dict[str, float]
    """Part -> GFLOP of the forward pass."""
    backward: float

    @property
    def total(self) -> float:
        """GFLOP of forward and backward."""
        return sum(self.forward.values()) + self.backward


def mark_part(name: str) -> contextlib.AbstractContextManager[object]:
    """Context that marks a part as a profiler range. It takes microseconds, and has no effect in compiled code."""
    assert name in PARTS, name
    # A range would cause graph breaks in the compiler.
    return contextlib.nullcontext() if torch.compiler.is_compiling() else torch.profiler.record_function(PREFIX + name)


@contextlib.contextmanager
def mark_model_parts(model: nn.Module) -> Iterator[None]:
    """Mark the parts of a MaskVLM's steps inside this context. No effect on a baseline, which marks its own parts."""
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
    keys_values = KeyValueCache.keys_values

    def decoder_keys_values(memory: KeyValueCache, block: Any) -> Any:
        """Attribute keys and values of a decoder layer to the decoder, even if they are projected before it runs."""
        with mark_part("decoder") if block in decoder.layers else contextlib.nullcontext():
            return keys_values(memory, block)

    with contextlib.ExitStack() as stack:
        for name, group in modules.items():
            for module in group:
                _mark_module(stack, module, name)
        for function, name in FAST_FUNCTIONS.items():
            stack.enter_context(patch.object(fast, function, _marked(name, getattr(fast, function))))
        stack.enter_context(patch.object(KeyValueCache, "keys_values", decoder_keys_values))
        stack.enter_context(patch.object(model, "fuse", _marked(MATCHING, model.fuse)))
        yield


def _mark_module(stack: contextlib.ExitStack, module: nn.Module, name: str) -> None:
    """Mark every call of the module until the stack closes."""
    open_ranges: list[Any] = []

    def enter(*_: Any) -> None:
        open_ranges.append(mark_part(name))
        open_ranges[-1].__enter__()

    def leave(*_: Any) -> None:
        open_ranges.pop().__exit__(None, None, None)

    stack.callback(module.register_forward_pre_hook(enter).remove)
    stack.callback(module.register_forward_hook(leave).remove)


def _marked(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        with mark_part(name):
            return function(*args, **kwargs)

    return call
