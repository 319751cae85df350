"""The training loop against the bare step: `mvlm bench run`."""
