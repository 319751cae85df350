"""Why a contender has no figure, and what an exception says on one line."""


class Missing(Exception):
    """The peer cannot run on this machine."""


class NotApplicable(Exception):
    """The peer has nothing that computes the op."""


def one_line(error: BaseException) -> str:
    """The error's type and message, at most 300 characters."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]
