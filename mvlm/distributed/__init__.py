"""Processes of a run: ranks, collectives, parallel models, losses of the global batch."""
