"""The DALI loader: batches of image-text pairs and their masks."""
