"""The four objectives, functions of tensors."""
