"""Untrusted images: read from regular files, judged by their headers, decoded within limits, and brought to RGB."""
