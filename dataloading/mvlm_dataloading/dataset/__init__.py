"""A data folder on disk or elsewhere: its description, its indices, and random access to samples."""
