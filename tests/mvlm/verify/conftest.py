"""Fixtures of the tests of `mvlm verify`: an honest run with its evaluation, and one with another seed."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from mvlm.commands.evaluate import eval_retrieval
from mvlm.training.run import pretrain
from mvlm.verify.verify import verify_run
from support.forgery import short_run


@pytest.fixture(scope="session")
def honest_run(tmp_path_factory, scenes) -> Path:
    """A finished run that evaluates at its fourth step, and its figures on the test split. Read only."""
    config = short_run(scenes, tmp_path_factory.mktemp("honest") / "run", eval_every_steps=4)
    pretrain(config)
    eval_retrieval(checkpoint=config.out, data=scenes, out=config.out / "eval/test.json", device="cpu")
    return config.out


@pytest.fixture(scope="session")
def other_run(tmp_path_factory, scenes) -> Path:
    """A run of the same settings with another seed. Read only."""
    config = short_run(scenes, tmp_path_factory.mktemp("other") / "run", seed=1)
    pretrain(config)
    return config.out


@pytest.fixture
def run(honest_run, tmp_path) -> Path:
    """A copy of the honest run, to be forged."""
    return Path(shutil.copytree(honest_run, tmp_path / "run"))


@pytest.fixture
def bare_run(run) -> Path:
    """A copy of the honest run, to be forged, without its figures on the test split, which then are not computed."""
    (run / "eval/test.json").unlink()
    return run


@pytest.fixture
def problems() -> Callable[..., list[str]]:
    """Verifies a run, with its last segment alone or `steps` more; returns what is not as claimed."""

    def verify(run: Path, data: Path | None = None, steps: int = 0) -> list[str]:
        found = [problem for check in verify_run(run, data, steps=steps) for problem in check.problems]
        missing = not (run / "eval/test.json").exists()  # a problem too, but not the forged one
        return [problem for problem in found if not (missing and problem.startswith(f"no {run}/eval/test.json"))]

    return verify
