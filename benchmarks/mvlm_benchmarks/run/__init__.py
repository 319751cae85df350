"""`mvlm bench run`: the training loop against its step alone, which is forward, backward and update."""
