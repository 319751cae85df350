"""Tracks of the speedrun: fixed data, fixed targets, and the machine on which time counts (LEADERBOARD.md)."""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from mvlm.errors import ConfigError
from mvlm.runs.checkpoint import step_of
from mvlm.speedrun.claims import Check, Claims, verdict
from mvlm_dataloading import open_dataset

EMOJI = {
    "train": "547421f5ba04fb7c907ef9e97e6589c1",
    "validation": "1155ec40198b4213639d2f702fd54fe2",
    "test": "5fea3df7b9f77dd8a4ceb08453fd79ac",
}
"""Fingerprints of the splits of `mvlm data emoji`."""
TARGETS = {"tr.r1": 42.0, "ir.r1": 32.0, "gain_text_nats": 0.85, "gain_pixels_pct": 15.0}
"""Least figures on the test split: R@1 of both directions, re-ranked, in per cent, and both cross-modal gains."""

RERANK = 32
"""Candidates of each query that the evaluation re-ranks: the default of `mvlm eval retrieval`."""
MOST_APART = 64
"""Most steps between two checkpoints of a record, so that each of its steps can be replayed from the one before."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Track:
    """One competition: the shortest time to the targets on one kind of machine."""

    machine: str
    """In words."""
    cores: int | None = None
    """Most cores that the run may use, without a GPU; None where a GPU trains."""
    gpu: str | None = None
    """Part of the name of the one GPU that trains."""
    data: dict[str, str]
    """Fingerprint of each split."""
    targets: dict[str, float]
    """Least figures on the test split, by their dotted names in eval/test.json."""


TRACKS = {
    "two-cores": Track(machine="two CPU cores", cores=2, data=EMOJI, targets=TARGETS),
    "one-h100": Track(machine="one NVIDIA H100", gpu="H100", data=EMOJI, targets=TARGETS),
}


def find_track(name: str) -> Track:
    """The track of a name. ConfigError if there is none."""
    if name not in TRACKS:
        raise ConfigError(f"track: wanted {' or '.join(TRACKS)}, got {name!r}")
    return TRACKS[name]


def figure(figures: dict[str, Any], name: str) -> float:
    """The figure of a dotted name; minus infinity if there is none."""
    value: Any = figures
    for part in name.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return float(value) if isinstance(value, int | float) else float("-inf")


def check_track(claims: Claims, track: Track, figures: dict[str, Any]) -> list[Check]:
    """Compare a run with the rules of a track.

    Args:
        figures: figures on the test split, found here.
    """
    return [_check_rules(claims, track), check_targets(track, figures)]


def _check_rules(claims: Claims, track: Track) -> Check:
    config, problems = claims.config, []
    for split, wanted in track.data.items():
        found = open_dataset(config.data, split).fingerprint
        if found != wanted:
            problems.append(f"{split}: wanted the fingerprint {wanted[:12]}, found {found[:12]}")
    if config.initial_model or config.image_weights or config.text_weights:
        problems.append("wanted a start from random weights, found pretrained ones")
    if config.tokenizer is not None:
        problems.append("wanted a tokenizer made from the training captions, found a file")
    elif open_dataset(config.data, "train").tokenizer_sha256 is not None:  # training takes it
        problems.append("wanted a tokenizer made from the training captions, found one stored with the data")
    for part in claims.parts:
        if (every := part.get("log_every", config.log_every)) != 1:
            problems.append(f"wanted a row of every step, found one every {every} steps")
    reranked = (claims.figures or {}).get("rerank")
    if reranked != RERANK:
        problems.append(f"wanted an evaluation with --rerank {RERANK}, found {reranked}")
    apart = max(b - a for a, b in pairwise([0, *map(step_of, claims.kept)]))
    if apart > MOST_APART:
        problems.append(f"wanted checkpoints at most {MOST_APART} steps apart, found two with {apart} steps between")
    for part in claims.parts:
        machine, commit = part["machine"], part["commit"]
        if not commit or commit.endswith("-dirty"):
            problems.append(f"wanted a committed revision of the code, found {commit or 'none'}")
        if track.cores is not None and (machine["device"] != "cpu" or machine["cores"] > track.cores):
            problems.append(f"wanted {track.machine}, found {machine['cores']} cores, device {machine['device']}")
        if track.cores is not None and machine["ranks"] != 1:  # ranks may be on other machines
            problems.append(f"wanted {track.machine} and one process, found {machine['ranks']} ranks")
        if track.gpu is not None and (track.gpu not in machine["device"] or machine["ranks"] != 1):
            problems.append(f"wanted {track.machine}, found {machine['ranks']} x {machine['device']}")
    return verdict("rules", problems, f"data, start, commit and machine are those of the track: {track.machine}")


def check_targets(track: Track, figures: dict[str, Any]) -> Check:
    """Compare figures on the test split with the targets of a track."""
    reached = {name: figure(figures, name) for name in track.targets}
    short = [
        f"{name} is {reached[name]:.2f}, wanted {least:g}"
        for name, least in track.targets.items()
        if reached[name] < least
    ]
    return verdict(
        "targets", short, ", ".join(f"{name} {reached[name]:.2f} of {track.targets[name]:g}" for name in reached)
    )
