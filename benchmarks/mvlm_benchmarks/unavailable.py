"""Exceptions of a contender that cannot run, and error texts for results."""


class Missing(Exception):
    """The contender cannot run on this machine."""


class NotApplicable(Exception):
    """The contender does not implement this op, or cannot read this data."""


def one_line(error: BaseException) -> str:
    """Type and message of an error as one line of at most 300 characters."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]
