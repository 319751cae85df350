"""Errors of mvlm. The command line prints them on one line.

ConfigError and RunError: the user can correct them; exit code 2. LostRankError and NonFiniteLossError: the run ends
early; exit code 1.
"""


class ConfigError(ValueError):
    """A setting with a value that is not allowed or cannot be used here."""


class RunError(ValueError):
    """A run folder, checkpoint or file that is missing, damaged, or not of the kind that was expected."""


class LostRankError(RuntimeError):
    """Another process of the run has died, so this one ends too. The checkpoints are intact."""


class NonFiniteLossError(RuntimeError):
    """Too many updates in a row were skipped: a loss or gradient was NaN or infinite, or the loss was a spike."""
