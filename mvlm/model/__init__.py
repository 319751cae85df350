"""The network and its two implementations of a training step."""
