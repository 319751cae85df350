"""Reasons why a contender has no figure."""


class Missing(Exception):
    """The contender cannot run on this machine."""


class NotApplicable(Exception):
    """The contender has no implementation of this op or for this data."""


def one_line(error: BaseException) -> str:
    """The error's type and message, at most 300 characters."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]
