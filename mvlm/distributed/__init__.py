"""Ranks of a run, collectives, parallel models, and the losses of the global batch."""

from mvlm.distributed.world import World, join_ranks

__all__ = ["World", "join_ranks"]
