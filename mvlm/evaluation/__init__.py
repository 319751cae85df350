"""Evaluation without training: retrieval, cross-modal gain, and the trivial predictors to compare with."""
