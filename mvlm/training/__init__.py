"""The training loop, its guards, and `pretrain`, which runs it from a configuration."""
