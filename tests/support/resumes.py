"""Runs that end by an exception between two steps, to be resumed."""

import pytest

from mvlm.training.run import pretrain
from mvlm.training.trainer import Trainer


class Interrupted(Exception):
    pass


def interrupt(config, at):
    """Train until the run has made so many steps, and end it by an exception."""
    one_step = Trainer.one_step

    def stop(run, batches):
        if run.step == at:
            raise Interrupted
        return one_step(run, batches)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "one_step", stop)
        with pytest.raises(Interrupted):
            pretrain(config)
