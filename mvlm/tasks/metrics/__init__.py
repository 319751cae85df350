"""Official metrics of the downstream tasks, from records of predictions and references alone.

These modules need numpy and the standard library: no torch, no model.
"""
