"""Checks of what is released: versions that pyproject.toml allows, and the contents of the distributions."""
