"""Work on finished data folders: check, summarise, reindex, and select as a view."""
