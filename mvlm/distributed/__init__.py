"""Ranks of a run, collectives, parallel models, and the losses of the global batch."""

from mvlm.distributed.world import World, start

__all__ = ["World", "start"]
