"""PTX text, read into basic blocks of instructions."""
