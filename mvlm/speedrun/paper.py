"""Checks of a run's files against each other and against the data, without computing a step."""

import math
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

from safetensors import safe_open

from mvlm.errors import RunError
from mvlm.files import sha256
from mvlm.runs.checkpoint import MANIFEST, OPTIMIZER, read_state, step_of, verify_checkpoint
from mvlm.runs.history import prefix_hash
from mvlm.speedrun.claims import Check, Claims, verdict
from mvlm.training.optimizer import learning_rate_factor
from mvlm_dataloading import Dataset, open_dataset
from mvlm_dataloading.dataset.description import shard_paths
from mvlm_dataloading.dataset.index_writer import fingerprint_of
from mvlm_dataloading.tools.reindex import lists_samples_of

RATES = {"lr": "lr_cross", "lr_encoder": "lr_encoder", "lr_pixels": "lr_pixels"}
"""Fields of a row with a learning rate, and the settings with their peaks."""


def check_data(claims: Claims) -> Check:
    """Hash every shard of the run's splits and of the test split; compare with dataset.json, index and history."""
    folder, problems, texts = claims.config.data, [], []
    recorded = {name: value for part in claims.parts for name, value in part["data"].items()}
    available = open_dataset(folder, "train").splits
    for split in sorted({"train", *recorded, *({"test"} & set(available))}):
        dataset = open_dataset(folder, split)
        problems += list(_damaged(dataset))
        if split == "validation" and claims.config.eval_images:
            dataset = dataset.head(claims.config.eval_images)
        for part in claims.parts:
            wanted = part["data"].get(split, dataset.fingerprint)
            if wanted != dataset.fingerprint:
                problems.append(
                    f"{split}: the run had the fingerprint {wanted[:12]}, {folder} {dataset.fingerprint[:12]}"
                )
        texts.append(f"{split} {len(dataset):,} samples, fingerprint {dataset.fingerprint[:12]}")
    return verdict("data", problems, f"{'; '.join(texts)}; sha256 of every shard")


def _damaged(dataset: Dataset) -> Iterator[str]:
    """Files of a split that do not fit: an index with the fingerprint of other samples, shards with other bytes.

    Training reads the samples where the index says. So the index of a local split may list samples of its tars alone.
    """
    if dataset.index.fingerprint != fingerprint_of(dataset.index, dataset.split, dataset.shards):
        yield f"{dataset.split}.index: its fingerprint is not that of its samples"
    if dataset.remote is not None:  # the cache compares a shard when it fetches it
        return
    for number, shard in enumerate(dataset.shards):
        tar, index = shard_paths(dataset.folder, shard)
        wanted = ((tar, shard["sha256"]), (index, shard.get("index_sha256")))
        if damaged := [file.name for file, digest in wanted if digest and sha256(file) != digest]:
            yield from (f"{name}: its sha256 is not that of dataset.json" for name in damaged)
        elif not lists_samples_of(tar, dataset.index, number):
            yield f"{dataset.split}.index: its samples are not those of {tar.name}"


def check_history(claims: Claims, revision: str) -> Check:
    """See that the parts of the run join up. Names the code that made them, and `revision`, the code of now."""
    problems = [f"a part continues after step {step}, which was not saved" for step in claims.gaps]
    commits = {part["commit"] or "unknown" for part in claims.parts}
    machines = {part["machine"]["processor"] for part in claims.parts}
    number = len(claims.parts)
    text = f"{number} part{'s' * (number > 1)} by commit {', '.join(sorted(commits))}; {'; '.join(sorted(machines))}"
    if commits != {revision or "unknown"}:
        text += f"; verified by commit {revision or 'unknown'}: check out the run's if a replay differs"
    return verdict("history", problems, text)


def check_metrics(claims: Claims) -> Check:
    """See that all rows are there, follow from the settings where they can, and are those that were saved."""
    config, rows = claims.config, claims.rows
    steps, last = [row["step"] for row in rows], config.max_steps
    due = {step for step in range(1, last + 1) if claims.row_due(step)}
    rates = RATES | ({"lr_muon": "lr_muon"} if config.optimizer == "muon" else {})
    problems = [f"no row of step {step}" for step in sorted(due - set(steps))]
    if steps != sorted(set(steps)) or (steps and steps[-1] > last):
        problems.append("rows are not in the order of steps")
    for row in rows:
        factor = learning_rate_factor(row["step"] - 1, config)
        wanted = {name: getattr(config, peak) * factor for name, peak in rates.items()}
        wanted["pairs_seen"] = row["step"] * config.batch_size
        problems += [
            f"step {row['step']}: {name} {row.get(name)}, the settings give {value:g}"
            for name, value in wanted.items()
            if not _close(row.get(name), value, 1e-9)
        ]
    problems += list(_odd_times(claims))
    for save in claims.saves.values():
        if prefix_hash(claims.run.metrics, save["metrics_bytes"]) != save["metrics"]:
            problems.append(f"rows up to step {save['step']} are not those that were saved with its checkpoint")
            break
    final = claims.saves.get(last)
    if final is not None and claims.run.metrics.stat().st_size != final["metrics_bytes"]:
        problems.append("rows were added after the last checkpoint")
    return verdict("metrics", problems, f"{len(rows):,} rows, none missing; rates, pairs and times add up")


def _odd_times(claims: Claims) -> Iterator[str]:
    """Rows whose `seconds` do not follow from the row before and the rate. Where a part begins, time may be lost."""
    begins = {part["step"] for part in claims.parts[1:]}  # at 0 too, if a run was killed before it saved
    rows: list[dict[str, Any]] = [{"step": 0, "seconds": 0.0}, *claims.rows]
    for before, row in pairwise(rows):
        times = (before.get("seconds"), row.get("seconds"), row.get("pairs_per_s"))
        if not all(isinstance(x, float) and math.isfinite(x) for x in times) or row["pairs_per_s"] <= 0:
            yield f"step {row['step']}: seconds or pairs_per_s is missing"
            return
        began = [step for step in begins if before["step"] <= step < row["step"]]
        steps = row["step"] - max([before["step"], *began])
        spent, counted = row["seconds"] - before["seconds"], steps * claims.config.batch_size / row["pairs_per_s"]
        slack = 1e-6 * max(1.0, row["seconds"])
        if spent < counted - slack or (spent > counted + slack and not began):
            yield f"step {row['step']}: {spent:.3f} s since the last row, its rate gives {counted:.3f} s"


def check_checkpoints(claims: Claims) -> Check:
    """Hash the files of every kept checkpoint, and compare manifest, step, position in the data and updates."""
    problems = []
    for path in claims.kept:
        problems += [f"{path.name}: {problem}" for problem in _problems_of(path, claims)]
    names = ", ".join(str(step_of(path)) for path in claims.kept)
    return verdict("checkpoints", problems, f"steps {names}: hashes are those of the history, AdamW made every update")


def _problems_of(path: Path, claims: Claims) -> Iterator[str]:
    step = step_of(path)
    try:
        verify_checkpoint(path)
    except (RunError, PermissionError) as error:
        yield str(error)
        return
    save = claims.saves.get(step)
    if save is None:
        yield "the history has no such save"
    elif sha256(path / MANIFEST) != save["manifest"]:
        yield "its manifest is not the one that the history has"
    try:
        state = read_state(path)
        batches, fingerprint = state["loader"]["step"], state["loader"]["fingerprint"]
        reached, skipped = state["step"], state["bad"]["total"]
    except (ValueError, KeyError, TypeError) as error:
        yield f"wanted the state of a run in state.json, found {error!r}"
        return
    if reached != step:
        yield f"is of step {reached}"
    if batches != step * claims.config.accumulate:
        yield f"the loader had yielded {batches} batches"
    if fingerprint != claims.part_of(step)["data"].get("train"):
        yield f"its data have the fingerprint {fingerprint[:12]}"
    made = updates_made(path)
    if made != step - skipped:
        yield f"AdamW made {made} updates in {step} steps, of which {skipped} were skipped as bad"


def updates_made(checkpoint: Path) -> int:
    """Updates that AdamW has made, by its own count: the largest over all parameters."""
    counts = [0]
    for file in sorted((checkpoint / OPTIMIZER).glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            names = opened.keys()
            counts += [int(opened.get_tensor(name)) for name in names if name.endswith("/step")]
    return max(counts)


def _close(value: Any, wanted: float, bound: float) -> bool:
    return isinstance(value, int | float) and math.isclose(value, wanted, rel_tol=bound, abs_tol=1e-15)
