"""Costs of a training step: FLOPs, memory, cluster plans, model FLOPs utilization."""
