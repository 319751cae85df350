"""Stages of measurements on a rented GPU: `benchmarks/gpu_run.py` runs one of them."""
