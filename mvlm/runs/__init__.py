"""Run folders, their checkpoints, and trained models loaded from them."""
