"""Processes of a run: ranks, collectives, parallel models, losses of the global batch."""

from mvlm.distributed.world import World, start

__all__ = ["World", "start"]
