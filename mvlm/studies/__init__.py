"""Studies: the same run with one thing changed, over several seeds, compared pair by pair (docs/guides/studies.md)."""
