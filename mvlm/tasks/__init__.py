"""Downstream tasks: what a pretrained model is fine-tuned for, and how its answers are judged."""
