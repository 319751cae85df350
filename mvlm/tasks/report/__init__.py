"""The page about a fine-tuned run of one task."""
