"""Runs that are disturbed on purpose, and the comparison with an undisturbed run."""
