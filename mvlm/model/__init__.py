"""The network and its two implementations of a training step."""

from mvlm.model.maskvlm import MaskVLM

__all__ = ["MaskVLM"]
