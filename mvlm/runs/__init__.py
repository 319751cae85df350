"""The folder of a run, its checkpoints, and trained models loaded from it."""

from mvlm.runs.folder import RunFolder
from mvlm.runs.load import export, load_model

__all__ = ["RunFolder", "export", "load_model"]
