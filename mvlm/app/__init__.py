"""`mvlm app`: a local web page on which a trained model answers."""
