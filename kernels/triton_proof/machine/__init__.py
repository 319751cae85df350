"""The machine: all threads of many blocks in lockstep, its memory, and what it notices."""
