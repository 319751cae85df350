"""Inputs, oracles and guard bands of the kernel tests."""
