"""Scalar instructions: a function of the machine that computes the result for all threads at once."""
