"""Writing a data folder: checked images, shards, duplicates, and resuming after a kill."""
