"""Parts of a transformers model, and whether each may change its attention implementation."""

import inspect
import re
import sys
from collections.abc import Iterator
from typing import Any

from torch import nn

from mvlm_kernels import dispatch
from mvlm_kernels.refusals import Refusal, refusal

_NAMES_SDPA = re.compile(r"_attn_implementation\w*\s*(?:==|!=|in|not in)\s*[^\n]*[\"']sdpa[\"']")


@dispatch.constant_when_compiled
def names_sdpa(module_name: str) -> bool:
    """True if the code of a modelling module compares the implementation's name with "sdpa".

    Such a model builds its masks by that name (sparse indices of DeepSeek-V3.2, cut queries of Gemma 4). Under another
    name it would leave them out, without an error.
    """
    if module_name not in _found:
        module = sys.modules.get(module_name)
        try:
            source = inspect.getsource(module) if module is not None else ""
        except (OSError, TypeError):  # no source, as in a notebook
            source = ""
        _found[module_name] = _NAMES_SDPA.search(source) is not None
    return _found[module_name]


_found: dict[str, bool] = {}


def configs_of(model: nn.Module) -> Iterator[tuple[str, Any, list[Any]]]:
    """(path, configuration, modules that share it) of every part of a model, the model itself first.

    Raises ValueError for a module that holds no ``PreTrainedModel``.
    """
    from transformers import PreTrainedModel

    found: dict[int, tuple[str, Any, list[Any]]] = {}
    for path, module in model.named_modules():
        if isinstance(module, PreTrainedModel):
            _, _, owners = found.setdefault(id(module.config), (path, module.config, []))
            owners.append(module)
    if not found:
        raise ValueError(f"model must hold a transformers PreTrainedModel, got {type(model).__name__}")
    yield from found.values()


def why_not_swapped(part: Any, name: str) -> Refusal | None:
    """Reason why a ``PreTrainedModel`` cannot take the attention implementation ``name``; None if it can."""
    if not part._can_set_attn_implementation():
        reason = f"the code of {type(part).__name__} does not call transformers' attention interface"
        return refusal(reason, "its own attention runs; call cross_attention in it")
    if names_sdpa(type(part).__module__):
        reason = 'its code asks for "sdpa" by name and prepares other masks for other names'
        return refusal(reason, "its own attention runs")
    try:
        part.get_correct_attn_implementation(name)
    except (ValueError, ImportError) as error:
        return refusal(str(error).strip().split("\n")[0].split(" Please")[0], "its own attention runs")
    return None
