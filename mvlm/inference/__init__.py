"""Questions to a trained model: features, reconstructions, filled-in words."""
