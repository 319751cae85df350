"""Readers of published data sets: each module lists the records of one format."""
