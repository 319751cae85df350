"""Integers that launchers compute at every call. Triton's own ``cdiv`` and ``next_power_of_2`` mean the same, but serve
inside kernels too and unwrap their arguments first: many times the cost, several times a call.
"""


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def power_of_two(n: int) -> int:
    """The least power of two that is not below n >= 1."""
    return 1 << (n - 1).bit_length()
