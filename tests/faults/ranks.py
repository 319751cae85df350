"""Runs of one and two ranks that are held against each other; trials of test_ranks.py.

Ranks are forked, see zygote.py. What is said to be equal is so to the bit; the tolerances are for another number of
ranks or another way to keep the weights, which add up in another order.
"""

import json
import signal
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import torch
import zygote
from campaign import STEPS, Campaign, files_of, log_of, require, told
from torch import Tensor

from mvlm.model.maskvlm import MaskVLM
from mvlm.runs.checkpoint import checkpoints, read_tensors, verify_checkpoint
from mvlm.runs.folder import read_metrics

LOSSES = ("loss", "mlm", "mim", "itc", "itm")
FP32 = {"losses": 1e-5, "gradients": 1e-4}
"""Relative tolerances of fp32 losses and gradient norms; 3e-7 and 2e-6 are usual."""
BF16 = {"losses": 1e-2, "gradients": 0.15}
"""Those of bf16, which has 8 bits: 4e-3 and 0.05 are usual, and as much to one rank in fp32."""
WEIGHTS = 1e-4
"""Absolute, of fp32 weights; 1e-5 is usual. AdamW moves by its rate, 1e-3, where a gradient is all but 0."""


def weights(run: Path, part: str) -> dict[str, Tensor]:
    """The whole weights ("model") or their average ("ema") of the last checkpoint, by name."""
    found = {name: torch.full_like(p, torch.nan) for name, p in MaskVLM(zygote.MICRO).state_dict().items()}
    read_tensors(run / "checkpoints" / f"step_{STEPS:08d}" / part, found)
    return found


def learnt_alike(run: Path, other: Path, losses: float, gradients: float) -> None:
    """The lines of two runs are alike: every loss and gradient norm of every step, to relative tolerances."""
    ours, theirs = (read_metrics(folder / "metrics.jsonl") for folder in (run, other))
    require([row["step"] for row in ours] == [row["step"] for row in theirs], "other steps")
    for a, b in zip(ours, theirs, strict=True):
        for name, most in {**dict.fromkeys(LOSSES, losses), "grad_norm": gradients}.items():
            off = abs(a[name] - b[name]) / abs(b[name])
            require(off < most, f"{name} of step {a['step']}: {a[name]}, not {b[name]}; off by {off:.2g} of it")


def weights_alike(run: Path, other: Path, part: str) -> None:
    ours, theirs = weights(run, part), weights(other, part)
    worst = max((float((ours[name] - theirs[name]).abs().max()), name) for name in theirs)
    require(worst[0] < WEIGHTS, f"{part}/{worst[1]} is off by {worst[0]:.2g}")


def samples(out: Path, ranks: int) -> dict[int, list[int]]:
    """The sample ids of the global batch of each step that was made, in order, as the ranks wrote them down."""
    found: dict[int, list[int]] = {}
    for rank in range(ranks):
        for line in out.with_suffix(f".{ranks}-{rank}").read_text().splitlines():
            step, ids = json.loads(line)
            found.setdefault(step, []).extend(ids)
    return found


def resized(campaign: Campaign, out: Path, before: int, after: int, parallel: str) -> None:
    """Begun on one number of ranks, stopped after step 6 and continued on another: as the run that stays on one."""

    def noting(rank: int, ranks: int, stops: int | None) -> None:
        zygote.note_samples(out.with_suffix(f".{ranks}-{rank}"))
        if stops is not None:
            zygote.at_step(stops, zygote.kill(signal.SIGTERM))

    for ranks in (before, after):
        # Two ranks tell each other during the step after.
        stops = None if ranks == after else 6 if ranks == 1 else 5
        faults = {rank: partial(noting, rank, ranks, stops) for rank in range(ranks)}
        codes = campaign.run(out, ranks, faults, parallel=parallel)
        require(codes == [0] * ranks, f"ended with {codes}: {log_of(out)}")
    first, rest = samples(out, before), samples(out, after)
    require((list(first), list(rest)) == ([1, 2, 3, 4, 5, 6], [7, 8, 9, 10, 11, 12]), f"steps {[*first]}, {[*rest]}")
    stays = out.with_name("stays")  # one run for all of these trials: on one rank there is nothing to be parallel
    if not stays.exists():
        campaign.run(stays, 1, {0: partial(zygote.note_samples, stays.with_suffix(".1-0"))})
    require(first | rest == samples(stays, 1), "other samples, or in another order")
    told(out, "and the same pixels, captions and masks")
    learnt_alike(out, stays, **FP32)
    for part in ("model", "ema"):
        weights_alike(out, stays, part)


def last_save(campaign: Campaign, out: Path, ranks: int) -> None:
    """The last checkpoint cannot be written: one rank finds no space, or the second of two a file too large."""
    keep: dict[str, Any] = {"keep_checkpoints": 3}
    why, operation, action = "OSError: [Errno 28] No space left on device", 1, zygote.disk_full
    if ranks == 2:
        why, operation, action = "OSError: [Errno 27] File too large", 0, zygote.no_room
    fault = partial(zygote.in_save_of, STEPS, operation, action)
    codes = campaign.run(out, ranks, {ranks - 1: fault}, **keep)
    require(codes == [2] * ranks, f"ended with {codes}: {log_of(out)}")
    folder = out / "checkpoints"
    told(out, f"could not save {folder}/step_{STEPS:08d}: {why}; training continues, older checkpoints are unchanged")
    told(out, f"mvlm: {folder}/step_{STEPS:08d}: could not be written (the reason is above), and the run ends here")
    kept = files_of(folder)
    require({name.split("/")[0] for name in kept} == {f"step_{step:08d}" for step in (3, 6, 9)}, f"found {list(kept)}")
    for path in checkpoints(folder):
        verify_checkpoint(path)
    require(len(read_metrics(out / "metrics.jsonl")) == STEPS, "lines are missing")
    codes = campaign.run(out, ranks, **keep)
    require(codes == [0] * ranks, f"resuming ended with {codes}: {log_of(out)}")
    campaign.is_as_undisturbed(out, ranks)
    stayed = {name: content for name, content in kept.items() if not name.startswith("step_00000003")}
    require(stayed.items() <= files_of(folder).items(), "an older checkpoint was changed")


def average(campaign: Campaign, out: Path) -> None:
    """Weights split over two ranks and their average: exact after a kill, and as those that each rank has whole."""
    fault = partial(zygote.at_step, 8, zygote.kill())
    codes = campaign.run(out, 2, {1: fault}, parallel="fsdp")
    require(codes == [1, -signal.SIGKILL], f"ended with {codes}: {log_of(out)}")
    campaign.ends_as_undisturbed(out, 2, parallel="fsdp")
    for part in ("model", "ema"):
        weights_alike(out, campaign.whole(2), part)
    own, averaged = weights(out, "model"), weights(out, "ema")
    require(not any(torch.equal(own[name], averaged[name]) for name in own), "the average is the weights")


def evaluated(campaign: Campaign, out: Path) -> None:
    """The average of split weights is evaluated during training, with the figures of whole ones."""
    changes: dict[str, Any] = {"eval_every_steps": 6, "max_steps": 6}
    codes = campaign.run(out, 2, parallel="fsdp", **changes)
    require(codes == [0, 0], f"ended with {codes}: {log_of(out)}")
    ours, theirs = (read_metrics(run / "metrics.jsonl")[-1] for run in (out, campaign.whole(2, **changes)))
    for name in ("masked_l1", "masked_nats"):
        require(abs(ours[name] / theirs[name] - 1) < 1e-4, f"{name}: {ours[name]}, not {theirs[name]}")


def half(campaign: Campaign, out: Path, parallel: str) -> None:
    """bf16 autocast on two ranks, as on one; and it is bf16."""
    changes: dict[str, Any] = {"precision": "bf16", "max_steps": 6}
    codes = campaign.run(out, 2, parallel=parallel, **changes)
    require(codes == [0, 0], f"ended with {codes}: {log_of(out)}")
    learnt_alike(out, campaign.whole(1, **changes), **BF16)
    rows, exact = (read_metrics(run / "metrics.jsonl") for run in (out, campaign.whole(1)))
    require(all(row["bad_steps"] == 0 for row in rows), "steps were skipped")
    require(rows[0]["loss"] != exact[0]["loss"], "computed in fp32")


LAYOUTS = [(a, b, kind) for a, b in ((1, 2), (2, 1)) for kind in ("ddp", "fsdp")]
TRIALS: dict[str, Callable[[Campaign, Path], None]] = {
    **{f"{a} to {b}, {kind}": partial(resized, before=a, after=b, parallel=kind) for a, b, kind in LAYOUTS},
    **{f"last save, {ranks}": partial(last_save, ranks=ranks) for ranks in (1, 2)},
    **{f"bf16, {kind}": partial(half, parallel=kind) for kind in ("ddp", "fsdp")},
    "average": average,
    "evaluated average": evaluated,
}
