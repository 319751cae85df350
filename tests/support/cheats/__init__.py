"""Contenders that look fast without being fast. Each module has a `make()`, which returns a function of the toy case.

The toy case is y = 2 x. A cheat that knows of the check before timing is honest for its first calls.
"""

HONEST_CALLS = 4
"""More calls than the check before timing makes."""
