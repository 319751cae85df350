"""Kernels of others, proved: a softmax as in tutorials, and layers of Liger."""
