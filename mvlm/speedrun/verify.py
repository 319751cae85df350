"""`verify_run`: all checks of a finished run, and the record that a verified run becomes."""

import secrets
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import Any

from mvlm.config.json_files import config_json
from mvlm.costs.mfu import flops_per_pair
from mvlm.evaluation.evaluate import evaluate
from mvlm.machine import code_revision, describe_machine, package_versions
from mvlm.runs.checkpoint import step_of
from mvlm.runs.load import load_model
from mvlm.speedrun.bounds import BOUNDS, compare_figures
from mvlm.speedrun.claims import Check, Claims, read_claims, verdict
from mvlm.speedrun.paper import check_checkpoints, check_data, check_history, check_metrics
from mvlm.speedrun.replay import Replay, check_replay, not_begun, not_replayed, plan_segments, threads
from mvlm.speedrun.tracks import Track, check_track
from mvlm_dataloading import open_dataset

FORMAT_VERSION = 1
LOGGED = (
    "step",
    "seconds",
    "loss",
    "mlm",
    "mim",
    "itc",
    "itm",
    "grad_norm",
    "lr",
    "tr_r1",
    "ir_r1",
    "gain_text_nats",
    "gain_pixels_pct",
)
"""Columns of a record's log, which is one text of values separated by commas for each row."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """Outcome of a verification."""

    claims: Claims
    checks: list[Check]
    figures: dict[str, Any]
    """Figures on the test split, found here; empty if they were not computed."""
    seed: int
    """Seed of the choice of steps."""

    @property
    def verified(self) -> bool:
        """True if no check failed."""
        return all(check.passed is not False for check in self.checks)

    def to_dict(self) -> dict[str, Any]:
        """The verdict as plain values for JSON."""
        return {
            "run": str(self.claims.run.path),
            "verified": self.verified,
            "seed": self.seed,
            "checks": [asdict(check) for check in self.checks],
            "figures": self.figures,
        }


def verify_run(
    path: Path,
    data: Path | None = None,
    *,
    steps: int = 3,
    reach: int = 64,
    seed: int | None = None,
    device: str = "auto",
    track: Track | None = None,
    report: Callable[[Check], object] = lambda check: None,
) -> Verdict:
    """Verify a finished pretraining run. Nothing in its folder is changed.

    Args:
        path: folder of the run.
        data: folder of its data. Default: that of its config.json.
        steps: random steps to replay (`mvlm.speedrun.replay.plan_segments`).
        reach: most steps to replay after a checkpoint.
        seed: seed of the choice of steps; drawn if None.
        device: device of the replay and the evaluation: auto, cpu or cuda.
        track: rules and targets to compare the run with.
        report: called with each check as it is made.

    Raises:
        RunError: there is no such run, or it is not finished.
        DataError: the data are missing.
    """
    claims = read_claims(path, data)
    seed = secrets.randbits(32) if seed is None else seed
    made = Verdict(claims, [], {}, seed)

    def add(check: Check) -> bool:
        made.checks.append(check)
        report(check)
        return check.passed is not False

    same_data = add(check_data(claims))
    add(check_history(claims, code_revision()))
    add(check_metrics(claims))
    sound = add(check_checkpoints(claims))
    if not (same_data and sound):
        add(Check("replay", None, "nothing was replayed or evaluated, for the reason above"))
        return made
    replay = Replay(claims, device)
    kept, rows = [step_of(checkpoint) for checkpoint in claims.kept], [row["step"] for row in claims.rows]
    segments = plan_segments(kept, rows, steps, reach, Random(seed))
    for segment in segments:
        add(check_replay(replay, segment))
    for check in (not_replayed(segments, claims.config.max_steps), not_begun(segments, kept, reach)):
        if check is not None:
            add(check)
    if not segments or segments[-1].stop != claims.config.max_steps:
        add(
            Check(
                "replay", False, f"the last checkpoint but one is more than {reach} steps before the end; raise --reach"
            )
        )
    check, figures = check_evaluation(claims, replay)
    made.figures.update(figures)
    add(check)
    if track is not None:
        for check in check_track(claims, track, figures):
            add(check)
    return made


def check_evaluation(claims: Claims, replay: Replay) -> tuple[Check, dict[str, Any]]:
    """Evaluate the final weights on the test split, as `mvlm eval retrieval` does, and compare with eval/test.json."""
    dataset = open_dataset(claims.config.data, "test")
    if claims.figures is None:
        missing = f"no {claims.run.evaluation}: run `mvlm eval retrieval --checkpoint RUN --data DATA --out` it"
        return Check("evaluation", False, missing), {}
    train = open_dataset(claims.config.data, "train")
    claimed = claims.figures
    precision = claimed.get("precision", claims.parts[-1]["precision"])
    machine = claimed.get("machine", {})
    with threads(machine.get("threads", claims.parts[-1]["machine"]["threads"])):
        model = load_model(claims.kept[-1], replay.world.device, precision)
        if problem := _other_evaluation(claimed, model.sha256):
            return Check("evaluation", False, f"{claims.run.evaluation} is {problem}; evaluate the run again"), {}
        rerank = int(claimed.get("rerank", 32))
        figures = evaluate(model.network, dataset, train, model.tokenizer, rerank, precision)
        equal_machine = machine == describe_machine(replay.world.device)
    exact = equal_machine and replay.world.device.type == "cpu" and claimed.get("versions") == package_versions()
    bound = 0.0 if exact else BOUNDS[precision].figures
    problems = compare_figures(claimed, figures, bound)
    how = "are equal" if exact else f"agree within {bound:g} points and {bound / 100:g} nats"
    return verdict("evaluation", problems, f"figures on the test split {how} ({figures['seconds']:.0f} s)"), figures


def _other_evaluation(claimed: dict[str, Any], model: str) -> str:
    """Subject of figures that are not of the run's last weights on the test split; empty if they are."""
    if (split := claimed.get("split", "test")) != "test":
        return f"of the split {split} and not of test"
    if claimed.get("model", model) != model:
        return "of other weights than the last checkpoint's, or at another image size or text length"
    return ""


def record_of(verdict: Verdict, track: str, targets: dict[str, float]) -> dict[str, Any]:
    """The record of a verified run: settings, time, FLOPs, commit, machine, figures, checks and log."""
    claims = verdict.claims
    config, last = claims.config, claims.rows[-1]
    dataset = open_dataset(config.data, "train")
    tokens = mean_tokens(claims)
    settings = {name: value for name, value in config_json(config).items() if name not in ("data", "out")}
    return {
        "format_version": FORMAT_VERSION,
        "track": track,
        "seconds": round(last["seconds"], 1),
        "flops": flops_per_pair(config, tokens) * config.batch_size * config.max_steps,
        "steps": config.max_steps,
        "targets": targets,
        "figures": verdict.figures,
        "data": {"name": dataset.description.get("name"), **claims.parts[0]["data"]},
        "parts": claims.parts,
        "settings": settings,
        "verified": {
            "commit": code_revision(),
            "seed": verdict.seed,
            "checks": [str(check) for check in verdict.checks],
        },
        "log": [",".join(LOGGED), *(",".join(_short(row.get(name)) for name in LOGGED) for row in claims.rows)],
    }


def mean_tokens(claims: Claims) -> float:
    """Mean number of tokens of the first captions of the training images."""
    dataset = open_dataset(claims.config.data, "train")
    tokenizer = load_model(claims.kept[-1], "cpu").tokenizer
    captions = [dataset.captions(i)[0] for i in range(min(512, len(dataset)))]
    return float(tokenizer.encode(captions, claims.config.model.text_length)[1].mean())


def _short(value: Any) -> str:
    return "" if value is None else f"{value:.6g}"
