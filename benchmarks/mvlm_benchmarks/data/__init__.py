"""`mvlm bench data`: the data loader against other loaders on the same shards."""
