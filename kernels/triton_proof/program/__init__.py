"""Executable form of a kernel: one Python function for each instruction, grouped in basic blocks."""
