"""Runs in forked processes. Disturbed ones have to equal undisturbed ones: weights, state and metrics, to the bit."""

import json
import logging
import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from mvlm import cli
from mvlm.config.pretrain import PretrainConfig
from mvlm.training.run import pretrain
from support.faults.forks import in_child, wait
from support.folders import checkpoint_contents, reproducible_rows
from support.models import micro_config, pretrain_config
from support.ports import free_port
from support.shapes import copy_shapes

STEPS = 12
MODEL = micro_config(
    image_layers=1,
    text_layers=1,
    cross_layers=1,
    decoder_layers=1,
    image_mean=(0.5, 0.5, 0.5),
    image_std=(0.5, 0.5, 0.5),
)


def run_config(data: Path, out: Path, **changes: Any) -> PretrainConfig:
    """A run of 12 steps with a checkpoint every third step. It takes one or two seconds."""
    settings: dict[str, Any] = {
        "max_steps": STEPS,
        "batch_size": 4,
        "precision": "fp32",
        "checkpoint_every_steps": 3,
        "keep_checkpoints": 2,
        "ema_decay": 0.9,
        "resume": True,
        "model": MODEL,
    }
    return pretrain_config(data, out, **(settings | changes))


def start(
    config: PretrainConfig,
    log: Path,
    environment: dict[str, str] | None = None,
    before: Callable[[], object] | None = None,
) -> int:
    """Fork a process that does the run, with the messages and the exit code of `mvlm pretrain`. Returns its id.

    Args:
        log: file that its output is appended to.
        environment: variables of the process.
        before: called in the process before the run, to arrange a fault.
    """

    def work(_: Any) -> None:
        if before is not None:
            before()
        pretrain(config)

    def as_command() -> int:
        os.environ.update(environment or {})
        cli.find_command = lambda _: partial(work, None)
        logging.basicConfig(stream=sys.stderr, force=True)
        try:
            cli.main()
        except SystemExit as end:
            return int(end.code or 0)
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
            return 1
        return 0

    return in_child(as_command, log)


class Failed(Exception):
    """A trial ended otherwise than it has to."""


class Campaign:
    """Runs in one folder, and the undisturbed runs to compare them with."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.data = folder, copy_shapes(folder / "data")
        # This run imports and sets up whatever is set up on first use, so that no fork has to.
        pretrain(run_config(self.data, folder / "warm"))
        self._undisturbed: dict[str, Path] = {}

    def undisturbed(self, ranks: int = 1, **changes: Any) -> Path:
        """The undisturbed run with these changes of the configuration. It is made on first use."""
        key = json.dumps([ranks, changes], sort_keys=True)
        if key not in self._undisturbed:
            out = self.folder / f"undisturbed-{len(self._undisturbed)}"
            self.run(out, ranks, ends=[0] * ranks, **changes)
            self._undisturbed[key] = out
        return self._undisturbed[key]

    def run(
        self,
        out: Path,
        ranks: int = 1,
        faults: dict[int, Callable[[], None]] | None = None,
        ends: Sequence[int] | None = None,
        **changes: Any,
    ) -> list[int]:
        """`start` a run and wait for it. Returns the ranks' exit codes. Raises Failed if they are not `ends`."""
        codes = [wait(process, 60.0) for process in self.start(out, ranks, faults, **changes)]
        if ends is not None:
            require(codes == list(ends), f"wanted exit codes {ends}, found {codes}: {end_of_log(out)}")
        return codes

    def start(
        self, out: Path, ranks: int = 1, faults: dict[int, Callable[[], None]] | None = None, **changes: Any
    ) -> list[int]:
        """Start or resume the run `out`, one process a rank. Returns the processes' ids.

        `faults` maps a rank to the function that arranges its fault.
        """
        environment: dict[str, str] = {}
        if ranks > 1:
            environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(ranks)}
        config = run_config(self.data, out, **changes)
        processes = []
        for rank in range(ranks):
            own = environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 else {}
            processes.append(start(config, out.with_suffix(".log"), own, (faults or {}).get(rank)))
        return processes

    def require_same_weights(self, out: Path, ranks: int = 1) -> None:
        """Raise Failed unless the last checkpoint of a complete run has the tensors of the undisturbed one's."""
        found, wanted = outcome(out)[0], outcome(self.undisturbed(ranks))[0]
        wrong = [name for name in wanted if name != "state.json" and found[name] != wanted[name]]
        require(not wrong, f"the last checkpoint differs: {wrong[:3]}")

    def require_resume(self, out: Path, ranks: int = 1, **changes: Any) -> None:
        """Resume a run. Raise Failed unless it completes and equals the undisturbed run."""
        self.run(out, ranks, ends=[0] * ranks, **changes)
        self.require_equal(out, ranks, **changes)

    def require_equal(self, out: Path, ranks: int = 1, **changes: Any) -> None:
        """Raise Failed unless a complete run equals the undisturbed one: tensors, state and metrics, to the bit."""
        state, rows = outcome(out)
        wanted_state, wanted_rows = outcome(self.undisturbed(ranks, **changes))
        wrong = [name for name in wanted_state if state.get(name) != wanted_state[name]]
        require(not wrong and state.keys() == wanted_state.keys(), f"the last checkpoint differs: {wrong[:3]}")
        require(rows == wanted_rows, "metrics differ")


def outcome(run: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The last checkpoint of a complete run, and its rows of metrics without what was measured."""
    return checkpoint_contents(run / "checkpoints" / f"step_{STEPS:08d}"), reproducible_rows(run)


def file_bytes(folder: Path) -> dict[str, bytes]:
    """The contents of every file under a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def require(condition: bool, message: str) -> None:
    if not condition:
        raise Failed(message)


def require_log(out: Path, text: str) -> None:
    require(text in out.with_suffix(".log").read_text(), f"wanted {text!r} in: {end_of_log(out)}")


def end_of_log(out: Path) -> str:
    lines = out.with_suffix(".log").read_text().splitlines()
    return " | ".join(lines[-3:])
