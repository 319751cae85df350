"""Embeddings of collections written to files, and search in them."""
