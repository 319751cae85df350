"""Errors that are the user's to mend. The command line prints them on one line and exits with code 2."""


class ConfigError(ValueError):
    """A setting that cannot be."""


class RunError(ValueError):
    """A run folder or checkpoint that is not what was asked for."""


class LostRankError(RuntimeError):
    """Another process of the run is gone, and with it this run; the checkpoints are as they were."""


class NonFiniteLossError(RuntimeError):
    """A loss or gradient became NaN or infinite; the update was not made."""
