"""The network and its two implementations of a training step.

`MaskVLM` is imported on first use: its objectives import other modules of this room.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mvlm.model.maskvlm import MaskVLM

__all__ = ["MaskVLM"]


def __getattr__(name: str) -> Any:
    if name != "MaskVLM":
        raise AttributeError(f"module 'mvlm.model' has no attribute {name!r}; it has MaskVLM")
    from mvlm.model.maskvlm import MaskVLM

    return MaskVLM
