"""`verify_run`: all checks of a finished run."""

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from mvlm.runs.checkpoint import step_of
from mvlm.runs.load import load_model
from mvlm.verify.claims import Claims, read_claims, wrong_checkpoints, wrong_data, wrong_rows
from mvlm.verify.replay import Replay, check_machine, choose_segments, threads
from mvlm_dataloading import open_dataset
from mvlm_dataloading.files import finite

log = logging.getLogger(__name__)


class Check(NamedTuple):
    """One thing that was looked at."""

    what: str
    problems: list[str]
    """What is not as claimed. Empty: all is."""


def verify_run(path: Path, data: Path | None = None, *, steps: int = 0, device: str = "auto") -> Iterator[Check]:
    """Verify a finished pretraining run, check by check. Nothing in its folder is changed.

    Its files are compared with the history and the data. Where data and checkpoints are sound, the steps from the last
    checkpoint but one to the end are made again, and the final weights are evaluated.

    Args:
        path: folder of the run.
        data: folder of its data. Default: that of its config.json.
        steps: random steps to replay too, each with all steps from the checkpoint before it to the one after it.
        device: device of the replay and the evaluation: auto, cpu or cuda.

    Raises:
        RunError: there is no such run, it is not finished, or this machine may give other bits than the run's.
        DataError: the data are missing.
    """
    claims = read_claims(path, data)
    yield (same := Check("data: hashes and fingerprints are those of the run", list(wrong_data(claims))))
    yield Check("rows of metrics: hashes are those of the history", list(wrong_rows(claims)))
    yield (sound := Check("checkpoints: hashes are those of the history", list(wrong_checkpoints(claims))))
    if sound.problems or same.problems:  # a replay would only say the same
        return
    replay = Replay(claims, device)
    for segment in choose_segments([step_of(path) for path in claims.kept], steps):
        log.info("replaying %s", segment)
        problems = [f"{segment}: {problem}" for problem in replay.differences(segment)]
        yield Check(f"{segment}: replayed, rows and weights are equal bit for bit", problems)
    yield Check("eval/test.json: evaluated again, figures are equal", list(wrong_figures(claims, replay)))


def wrong_figures(claims: Claims, replay: Replay) -> Iterator[str]:
    """Evaluate the final weights on the test split, as `mvlm eval retrieval` does, and compare with eval/test.json.

    RunError if it was evaluated on a machine that may give other bits.
    """
    file, claimed = claims.run.evaluation, claims.figures
    if claimed is None:
        yield f"no {file}: run `mvlm eval retrieval --checkpoint RUN --data DATA --out` it"
        return
    check_machine(str(file), replay.world.device, claimed["machine"], claimed["versions"])
    with threads(claimed["machine"]["threads"]):
        model = load_model(claims.kept[-1], replay.world.device, claimed["precision"])
        if claimed.get("split") != "test":
            yield f"{file} is of the split {claimed.get('split')} and not of test; evaluate the run again"
        elif claimed.get("model") != model.sha256:
            other = "of other weights than the last checkpoint's, or at another image size or text length"
            yield f"{file} is {other}; evaluate the run again"
        else:
            test, train = (open_dataset(claims.config.data, name) for name in ("test", "train"))
            found = model.evaluate(test, train, claimed["rerank"]).figures
            found.pop("seconds")
            yield from _differences(claimed, json.loads(json.dumps(finite(found))))


def _differences(claimed: Any, found: Any, name: str = "") -> Iterator[str]:
    """Figures, however deep, that are not those of `found`, by dotted name."""
    if isinstance(claimed, dict) and isinstance(found, dict):
        for key, value in found.items():
            yield from _differences(claimed.get(key), value, f"{name}.{key}")
    elif claimed != found:
        yield f"{name[1:]} is {claimed}, found {found}"
