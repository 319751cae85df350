"""Names for the parts of a step, by which a profile and a count of operations tell them apart."""

import contextlib

import torch

PREFIX = "part:"
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
"""In the order of a step."""
MATCHING = "ITM"
"""All that happens inside it belongs to it, its use of the cross encoders too; elsewhere the innermost part holds."""


def part(name: str) -> contextlib.AbstractContextManager[object]:
    """A context for one part of a step, a range in a profile. Costs microseconds, and nothing in a compiled graph."""
    assert name in PARTS, name
    # A compiler would break its graph at the range's begin and end.
    return contextlib.nullcontext() if torch.compiler.is_compiling() else torch.profiler.record_function(PREFIX + name)
