"""Ranks of a run, collectives, parallel models, and the losses of the global batch."""
