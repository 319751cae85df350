"""Run folders, their checkpoints, and trained models loaded from them."""

from mvlm.runs.folder import RunFolder
from mvlm.runs.load import export, load_model

__all__ = ["RunFolder", "export", "load_model"]
