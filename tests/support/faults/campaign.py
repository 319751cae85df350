"""Disturbed runs compared with undisturbed ones: weights, state and metrics have to be equal to the bit."""

import json
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from mvlm.runs.folder import read_metrics
from mvlm.training.run import pretrain
from support.faults.forked_runs import STEPS, ForkedRun, run_config, start, wait
from support.shapes import copy_shapes

MEASURED = ("pairs_per_s", "data_wait_s", "seconds", "memory_mb", "mfu")
"""Fields of metrics.jsonl that differ between any two runs."""


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
            codes = self.run(out, ranks, **changes)
            require(codes == [0] * ranks, f"the undisturbed run ended with {codes}: {end_of_log(out)}")
            self._undisturbed[key] = out
        return self._undisturbed[key]

    def run(
        self, out: Path, ranks: int = 1, faults: dict[int, Callable[[], None]] | None = None, **changes: Any
    ) -> list[int]:
        """`start` a run and wait for it. Returns the ranks' exit codes."""
        return [wait(process) for process in self.start(out, ranks, faults, **changes)]

    def start(
        self, out: Path, ranks: int = 1, faults: dict[int, Callable[[], None]] | None = None, **changes: Any
    ) -> list[int]:
        """Start or resume the run `out`, one process a rank. Returns the processes' ids.

        `faults` maps a rank to the function that arranges its fault.
        """
        environment: dict[str, str] = {}
        if ranks > 1:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = free.getsockname()[1]
            environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(ranks)}
        config = run_config(self.data, out, **changes)
        processes = []
        for rank in range(ranks):
            own = environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 else {}
            processes.append(start(ForkedRun(config, out.with_suffix(".log"), own, (faults or {}).get(rank))))
        return processes

    def require_same_weights(self, out: Path, ranks: int = 1) -> None:
        """Raise Failed unless the last checkpoint of a complete run has the tensors of the undisturbed one's."""
        found, wanted = outcome(out)[0], outcome(self.undisturbed(ranks))[0]
        wrong = [name for name in wanted if name != "state" and found[name] != wanted[name]]
        require(not wrong, f"the last checkpoint differs: {wrong[:3]}")

    def require_resume(self, out: Path, ranks: int = 1, **changes: Any) -> None:
        """Resume a run. Raise Failed unless it completes and equals the undisturbed run."""
        codes = self.run(out, ranks, **changes)
        require(codes == [0] * ranks, f"resuming ended with {codes}: {end_of_log(out)}")
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
    rows = [{k: v for k, v in row.items() if k not in MEASURED} for row in read_metrics(run / "metrics.jsonl")]
    return checkpoint_bytes(run / "checkpoints" / f"step_{STEPS:08d}"), rows


def checkpoint_bytes(folder: Path) -> dict[str, Any]:
    """A checkpoint's tensors as bytes, by file and name, and its state."""
    found: dict[str, Any] = {"state": (folder / "state.json").read_text()}
    for path in sorted(folder.glob("*/*.safetensors")):
        found |= {f"{path.relative_to(folder)}/{name}": t.numpy().tobytes() for name, t in load_file(path).items()}
    return found


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
