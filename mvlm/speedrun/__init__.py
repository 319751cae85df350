"""The speedrun: tracks with fixed data and targets, and the proof that a run did what its folder says."""

from mvlm.speedrun.verify import verify_run

__all__ = ["verify_run"]
