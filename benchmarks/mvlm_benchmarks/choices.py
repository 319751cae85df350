"""Check of names that a user chooses from a list: ops, peers, contenders, recipes."""

from collections.abc import Sequence

from mvlm.errors import ConfigError


def choose(option: str, wanted: Sequence[str], known: Sequence[str]) -> list[str]:
    """The wanted names, or all known names if `wanted` is empty.

    Raises:
        ConfigError: a wanted name is unknown.
    """
    unknown = [name for name in wanted if name not in known]
    if unknown:
        raise ConfigError(f"{option}: wanted some of {', '.join(known)}, got {', '.join(map(repr, unknown))}")
    return list(wanted) or list(known)
