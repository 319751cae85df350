"""Helpers that tests of several rooms share, as plain imports: `from support.models import micro_model`."""
