"""Inference with a trained model: features, reconstructions, filled-in captions."""
