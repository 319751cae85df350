"""Errors of mvlm. The command line prints them on one line.

ConfigError and RunError are mistakes that a user can correct; the command exits with code 2. After the others, which
end a run, it exits with code 1.
"""


class ConfigError(ValueError):
    """A setting with a value that is not allowed or cannot be used here."""


class RunError(ValueError):
    """A run folder, checkpoint or file that is missing, damaged, or not of the kind that was expected."""


class LostRankError(RuntimeError):
    """Another process of the run has died, so this one ends too. The checkpoints are intact."""


class NonFiniteLossError(RuntimeError):
    """A loss or gradient is NaN or infinite. The update was not made."""
