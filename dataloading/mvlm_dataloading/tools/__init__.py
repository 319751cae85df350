"""Tools for finished data folders: check, summary, reindexing, views."""
