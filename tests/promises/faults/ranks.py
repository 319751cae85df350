"""Trials of test_ranks.py, of which most compare runs on one and two ranks, and the server that does them.

    echo "1 to 2, ddp" | python tests/promises/faults/ranks.py

Equal means equal to the bit. Tolerances apply only between different numbers of ranks or different shardings of the
weights, which sum in another order.
"""

import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from copy import copy
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.extend(str(Path(__file__).parents[n]) for n in (3, 2))  # in this order: tests/mvlm must not hide mvlm

import elastic

from mvlm.model.maskvlm import MaskVLM
from mvlm.runs.checkpoint import checkpoints, read_tensors, verify_checkpoint
from mvlm.runs.folder import read_metrics
from mvlm_dataloading import ViewOptions, make_view, open_dataset
from mvlm_dataloading.links.captions import parse_captions_option
from mvlm_dataloading.loader import ring
from mvlm_dataloading.tools.link import LinkOptions, link_files
from support.faults import injections
from support.faults.campaign import MODEL, STEPS, Campaign, Failed, end_of_log, file_bytes, require, require_log
from support.faults.forks import in_child, wait
from support.folders import LOSSES
from support.gate import Gate
from support.linked import write_table, write_tars
from support.seaweed import reading_from, serve_seaweed

FP32 = {"losses": 1e-5, "gradients": 1e-4}
"""Relative tolerances of fp32 losses and gradient norms. Usual differences are 3e-7 and 2e-6."""
BF16 = {"losses": 1e-2, "gradients": 0.15}
"""Relative tolerances of bf16, which has 8 bits. Usual differences are 4e-3 and 0.05, as to one rank in fp32."""
WEIGHTS = 1e-4
"""Absolute tolerance of fp32 weights. 1e-5 is usual. AdamW moves a weight by its rate, 1e-3, even if its gradient is
almost 0."""


def weights(run: Path, part: str) -> dict[str, Tensor]:
    """Unsharded weights ("model") or their average ("ema") in the last checkpoint, by name."""
    found = {name: torch.full_like(p, torch.nan) for name, p in MaskVLM(MODEL).state_dict().items()}
    read_tensors(run / "checkpoints" / f"step_{STEPS:08d}" / part, found)
    return found


def require_close_metrics(run: Path, other: Path, losses: float, gradients: float) -> None:
    """Require every loss and gradient norm of every step of two runs to agree, to relative tolerances."""
    ours, theirs = (read_metrics(folder / "metrics.jsonl") for folder in (run, other))
    require([row["step"] for row in ours] == [row["step"] for row in theirs], "other steps")
    for a, b in zip(ours, theirs, strict=True):
        for name in LOSSES:
            most = gradients if name == "grad_norm" else losses
            off = abs(a[name] - b[name]) / abs(b[name])
            require(off < most, f"{name} of step {a['step']}: {a[name]}, not {b[name]}; off by {off:.2g} of it")


def require_close_weights(run: Path, other: Path, part: str) -> None:
    ours, theirs = weights(run, part), weights(other, part)
    worst = max((float((ours[name] - theirs[name]).abs().max()), name) for name in theirs)
    require(worst[0] < WEIGHTS, f"{part}/{worst[1]} is off by {worst[0]:.2g}")


def batches(out: Path, ranks: int) -> dict[int, list[Any]]:
    """Rows of the global batch of each step, in order, from the files of `log_batches`."""
    found: dict[int, list[Any]] = {}
    for rank in range(ranks):
        for line in out.with_suffix(f".{ranks}-{rank}").read_text().splitlines():
            step, rows = json.loads(line)
            found.setdefault(step, []).extend(rows)
    return found


def resized(campaign: Campaign, out: Path, before: int, after: int, parallel: str) -> None:
    """A run stopped after step 6 and resumed on another number of ranks equals the run that stays on one."""

    def arrange(rank: int, ranks: int, stops: int | None) -> None:
        injections.log_batches(out.with_suffix(f".{ranks}-{rank}"))
        if stops is not None:
            injections.at_step(stops, injections.kill(signal.SIGTERM))

    for ranks in (before, after):
        # Two ranks agree to stop during the step after the request.
        stops = None if ranks == after else 6 if ranks == 1 else 5
        faults = {rank: partial(arrange, rank, ranks, stops) for rank in range(ranks)}
        campaign.run(out, ranks, faults, ends=[0] * ranks, parallel=parallel)
    first, rest = batches(out, before), batches(out, after)
    require((list(first), list(rest)) == ([1, 2, 3, 4, 5, 6], [7, 8, 9, 10, 11, 12]), f"steps {[*first]}, {[*rest]}")
    stays = out.with_name("stays")  # shared by these trials: on one rank `parallel` changes nothing
    if not stays.exists():
        campaign.run(stays, 1, {0: partial(injections.log_batches, stays.with_suffix(".1-0"))})
    require(first | rest == batches(stays, 1), "other batches, or in another order")
    require_log(out, "same samples in the same order, same pixels, captions and masks")
    require_close_metrics(out, stays, **FP32)
    for part in ("model", "ema"):
        require_close_weights(out, stays, part)


def fewer(campaign: Campaign, out: Path) -> None:
    """A run killed on 4 ranks goes on with 2, which take two microbatches each, and equals the run on one rank."""
    fault = partial(injections.at_step, 8, injections.kill())
    campaign.run(out, 4, {3: fault}, ends=[1, 1, 1, -signal.SIGKILL])
    campaign.run(out, 2, ends=[0, 0], accumulate=2, checkpoint_activations=True)
    require_log(out, "ranks 2 in place of 4, accumulate 2 in place of 1, checkpoint_activations True")
    require_close_metrics(out, campaign.undisturbed(1), **FP32)
    for part in ("model", "ema"):
        require_close_weights(out, campaign.undisturbed(1), part)


def last_save(campaign: Campaign, out: Path, ranks: int) -> None:
    """The last checkpoint cannot be written: a full disk on the only rank, or a size limit on the second of two."""
    keep: dict[str, Any] = {"keep_checkpoints": 3}
    why, operation, action = "OSError: [Errno 28] No space left on device", 1, injections.disk_full
    if ranks == 2:
        why, operation, action = "OSError: [Errno 27] File too large", 0, injections.limit_file_size
    fault = partial(injections.at_save_of_step, STEPS, operation, action)
    campaign.run(out, ranks, {ranks - 1: fault}, ends=[2] * ranks, **keep)
    folder = out / "checkpoints"
    require_log(out, f"could not save {folder}/step_{STEPS:08d}: {why}; training continues")
    require_log(out, f"mvlm: {folder}/step_{STEPS:08d}: could not be written")
    kept = file_bytes(folder)
    require({name.split("/")[0] for name in kept} == {f"step_{step:08d}" for step in (3, 6, 9)}, f"found {list(kept)}")
    for path in checkpoints(folder):
        verify_checkpoint(path)
    require(len(read_metrics(out / "metrics.jsonl")) == STEPS, "rows are missing")
    campaign.run(out, ranks, ends=[0] * ranks, **keep)
    campaign.require_equal(out, ranks)
    stayed = {name: content for name, content in kept.items() if not name.startswith("step_00000003")}
    require(stayed.items() <= file_bytes(folder).items(), "an older checkpoint was changed")


def average(campaign: Campaign, out: Path) -> None:
    """Sharded weights and their average resume exactly after a kill, and are close to those of unsharded ranks."""
    fault = partial(injections.at_step, 8, injections.kill())
    campaign.run(out, 2, {1: fault}, ends=[1, -signal.SIGKILL], parallel="fsdp")
    campaign.require_resume(out, 2, parallel="fsdp")
    for part in ("model", "ema"):
        require_close_weights(out, campaign.undisturbed(2), part)
    own, averaged = weights(out, "model"), weights(out, "ema")
    require(not any(torch.equal(own[name], averaged[name]) for name in own), "the average is the weights")


def evaluated(campaign: Campaign, out: Path) -> None:
    """The average of sharded weights is evaluated during training, with the figures of unsharded weights."""
    changes: dict[str, Any] = {"eval_every_steps": 6, "max_steps": 6}
    campaign.run(out, 2, ends=[0, 0], parallel="fsdp", **changes)
    ours = read_metrics(out / "metrics.jsonl")[-1]
    for ranks in (1, 2):
        theirs = read_metrics(campaign.undisturbed(ranks, **changes) / "metrics.jsonl")[-1]
        for name in ("masked_l1", "masked_nats"):
            require(abs(ours[name] / theirs[name] - 1) < 1e-4, f"{name}: {ours[name]}, not {theirs[name]}")


def failed(campaign: Campaign, out: Path, rank: int, hangs: bool) -> None:
    """A rank fails between two exchanges: the other ends within seconds, and one line names that failure.

    With `hangs` the failed rank takes long to end, so that its connections stay open.
    """

    def arrange() -> None:
        injections.at_step(4, injections.fail)
        if hangs:
            injections.slow_end(20)

    begun = time.monotonic()
    ended = campaign.start(out, 2, {rank: arrange}, stall_minutes=30)
    codes = {1 - rank: wait(ended[1 - rank])}
    seconds = time.monotonic() - begun
    codes[rank] = wait(ended[rank])
    require(codes == {0: 1, 1: 1}, f"ended with {codes}: {end_of_log(out)}")
    told = [line for line in out.with_suffix(".log").read_text().splitlines() if line.startswith("mvlm: ")]
    require(len(told) == 1, f"wanted one line, found {told}")
    require(f"rank {rank}: ValueError: a broken thing" in told[0], f"found {told}")
    way = f"rank {1 - rank} was waiting for " if hangs else f"rank {1 - rank} "
    require(way in told[0], f"found {told}")
    require(seconds < 20, f"took {seconds:.0f} s")
    campaign.require_resume(out, 2)


def stopped_evaluation(campaign: Campaign, out: Path, ranks: int) -> None:
    """SIGTERM to the last rank during an evaluation: it ends, and the run leaves a checkpoint and can be resumed."""
    changes: dict[str, Any] = {"eval_every_steps": 6}
    fault = partial(injections.at_evaluation, 3, injections.kill(signal.SIGTERM))
    campaign.run(out, ranks, {ranks - 1: fault}, ends=[0] * ranks, **changes)
    rows = read_metrics(out / "metrics.jsonl")
    require([row["step"] for row in rows] == list(range(1, 7)), f"rows of {[row['step'] for row in rows]}")
    require("tr_r1" not in rows[-1], "the evaluation was finished")
    verify_checkpoint(checkpoints(out / "checkpoints")[-1])
    campaign.run(out, ranks, ends=[0] * ranks, **changes)
    require("tr_r1" in read_metrics(out / "metrics.jsonl")[-1], "the last evaluation is missing")
    campaign.require_same_weights(out, ranks)


def bfloat16(campaign: Campaign, out: Path, parallel: str) -> None:
    """bf16 autocast on two ranks learns as on one, and does compute in bf16."""
    changes: dict[str, Any] = {"precision": "bf16", "max_steps": 6}
    campaign.run(out, 2, ends=[0, 0], parallel=parallel, **changes)
    require_close_metrics(out, campaign.undisturbed(1, **changes), **BF16)
    rows, exact = (read_metrics(run / "metrics.jsonl") for run in (out, campaign.undisturbed(1)))
    require(all(row["bad_steps"] == 0 for row in rows), "steps were skipped")
    require(rows[0]["loss"] != exact[0]["loss"], "computed in fp32")


OPTIONS = LinkOptions(parse_captions_option("txt,json:caption=2,json:recaption=1"))


def goes_on_elsewhere(campaign: Campaign, data: Path, out: Path, batch_size: int) -> tuple[Path, dict[int, list[Any]]]:
    """Two ranks train until both are killed in step 11, and one rank with another cache goes on.

    Requires the batches of a run that stays on one rank. Returns the folder of that run, and its `batches`.
    """
    linked = copy(campaign)
    settings: dict[str, Any] = {"batch_size": batch_size}
    linked.data = data

    def arrange(run: Path, rank: int, ranks: int, dies: bool) -> None:
        os.environ["MVLM_CACHE"] = str(run.with_suffix(f".cache-{ranks}"))
        injections.log_batches(run.with_suffix(f".{ranks}-{rank}"))
        if dies:
            injections.at_step(11, injections.kill())

    faults = {rank: partial(arrange, out, rank, 2, True) for rank in range(2)}
    codes = linked.run(out, 2, faults, **settings)
    # The first to die may break the other's exchange, which then ends by itself.
    require(-signal.SIGKILL in codes and not {0, 2} & {*codes}, f"ended with {codes}: {end_of_log(out)}")
    linked.run(out, 1, {0: partial(arrange, out, 0, 1, False)}, ends=[0], **settings)
    stays = out.with_name(f"{out.name}-stays")
    linked.run(stays, 1, {0: partial(arrange, stays, 0, 1, False)}, ends=[0], **settings)
    first, rest, wanted = batches(out, 2), batches(out, 1), batches(stays, 1)
    require(max(first) == 11 and min(rest) in (7, 10) and max(rest) == STEPS, f"steps {[*first]}, {[*rest]}")
    require(first | rest == wanted and rest | first == wanted, "other batches")
    require_close_metrics(out, stays, **FP32)
    return stays, wanted


def in_a_fork(work: Callable[[], object], out: Path) -> None:
    """Do work that starts threads, which the processes that are forked afterwards must not have."""
    require(wait(in_child(work, out.with_suffix(".log"))) == 0, f"failed: {end_of_log(out)}")


def linked(campaign: Campaign, out: Path) -> None:
    """Two ranks train from tars in a bucket until both are killed. One rank, elsewhere, goes on with the same batches.

    An image is damaged so that only decoding it shows it.
    """
    tars, data = write_tars(out.with_suffix(".tars"), 3, 20, damaged={13}), out.with_suffix(".links")
    (bucket := out.with_suffix(".bucket")).mkdir()
    with serve_seaweed(bucket) as server, reading_from(server.s3):
        urls = [server.put(tar.name, tar.read_bytes()) for tar in tars]
        in_a_fork(partial(link_files, urls, data, OPTIONS, workers=0), out)
        stays, wanted = goes_on_elsewhere(campaign, data, out, 12)
    used = {i for rows in wanted.values() for i, _ in rows}
    require(used == {*range(60)} - {13}, f"wanted all samples but the damaged one, found {len(used)}")
    require_log(stays, "skipped an image that cannot be decoded: s3://tests/00000.tar")


def mixed(campaign: Campaign, out: Path, built: bool) -> None:
    """As `linked`, from a view of tars and of a table that counts twice, or of tars and of half a built folder.

    In the first epoch each sample of the tars is seen once, of the table twice, and half of those of the folder.
    """
    write_tars(tars := out.with_suffix(".tars"), 2, 24)
    table = write_table(out.with_suffix(".parquet"), range(100, 196), by_datasets=False, group=1)
    links, data, texts = out.with_suffix(".links"), out.with_suffix(".view"), out.with_suffix(".texts")
    second = campaign.data if built else out.with_suffix(".links of a table")

    def make() -> None:
        link_files([str(tars / "*.tar")], links, OPTIONS, workers=0)
        if not built:
            link_files([str(table)], second, LinkOptions(parse_captions_option("caption")), workers=0)
        options = ViewOptions(splits=("train",), leaks="keep")
        make_view(data, [links, second], options, weights=[1, 0.5 if built else 2])
        view = open_dataset(data, "train")
        texts.write_text(json.dumps([view.captions(i)[0] for i in range(len(view))]))

    in_a_fork(make, out)
    captions = json.loads(texts.read_text())
    _, rows = goes_on_elsewhere(campaign, data, out, 24)
    epoch = [i for step in range(1, STEPS + 1) for i, _ in rows[step]][: len(captions)]
    require(sorted(epoch) == [*range(len(captions))] and len(captions) < 24 * STEPS, "other samples than the view's")
    found = Counter(captions[i] for i in epoch)
    require(all(found.pop(f"text {number}") == 1 for number in range(48)), "other samples of the tars")
    if built:
        require(15 < found.total() < 45, f"wanted half of 60 samples of the folder, found {found.total()}")
    else:
        require(found == {f"text {number}": 2 for number in range(100, 196)}, f"found {found} of the table")


def away(campaign: Campaign, out: Path) -> None:
    """A bucket refuses 50 connections in training: one line says so, and batches and weights are the same."""
    data = out.with_suffix(".links")
    settings: dict[str, Any] = {"batch_size": 12}
    calm, disturbed = copy(campaign), out.with_name(f"{out.name}-disturbed")
    calm.data = data
    (bucket := out.with_suffix(".bucket")).mkdir()

    def arrange(run: Path, shuts: bool) -> None:
        os.environ["MVLM_CACHE"] = str(run.with_suffix(".cache"))
        injections.log_batches(run.with_suffix(".1-0"))
        ring.AHEAD_SAMPLES, ring.AHEAD_S = 0, 0.0  # else all samples are there before the first step
        if shuts:
            gate = Gate(("127.0.0.1", int(server.s3.rpartition(":")[2])))
            os.environ["AWS_ENDPOINT_URL"] = gate.address
            injections.at_step(3, lambda: gate.shut(refuses=50))

    with serve_seaweed(bucket) as server, reading_from(server.s3):
        urls = [server.put(tar.name, tar.read_bytes()) for tar in write_tars(out.with_suffix(".tars"), 9, 20)]
        in_a_fork(partial(link_files, urls, data, OPTIONS, workers=0), out)
        for run in (out, disturbed):
            calm.run(run, 1, {0: partial(arrange, run, run is disturbed)}, ends=[0], **settings)
    require(batches(disturbed, 1) == batches(out, 1), "other batches")
    told = [
        line for line in disturbed.with_suffix(".log").read_text().splitlines() if "store cannot be reached" in line
    ]
    require(len(told) == 1, f"wanted one line, found {told}")
    require(file_bytes(disturbed / "checkpoints") == file_bytes(out / "checkpoints"), "other weights")


def mirrored(campaign: Campaign, out: Path, ranks: int) -> None:
    """Stop ranks that copy their checkpoints to a bucket. As many go on from an empty folder, bit for bit."""
    (bucket := out.with_suffix(".bucket")).mkdir()
    with serve_seaweed(bucket) as server, reading_from(server.s3):
        place: dict[str, Any] = {"mirror": Path("s3://tests/run")}
        fault = partial(injections.at_step, 5, injections.kill(signal.SIGTERM))
        campaign.run(out, ranks, {ranks - 1: fault}, ends=[0] * ranks, **place)
        shutil.rmtree(out)
        campaign.run(out, ranks, ends=[0] * ranks, **place)
    for told in ("step_00000006 is at s3://tests/run", "restoring step_00000006 from s3://tests/run"):
        found = out.with_suffix(".log").read_text().count(told)
        require(found == 1, f"wanted {told!r} once, found it {found} times")
    campaign.require_equal(out, ranks)


ENDS = ("ends", "hangs")
LAYOUTS = [(a, b, kind) for a, b in ((1, 2), (2, 1)) for kind in ("ddp", "fsdp")]
TRIALS: dict[str, Callable[[Campaign, Path], None]] = {
    **{f"{a} to {b}, {kind}": partial(resized, before=a, after=b, parallel=kind) for a, b, kind in LAYOUTS},
    "4 to 2": fewer,
    **{f"last save, {ranks}": partial(last_save, ranks=ranks) for ranks in (1, 2)},
    **{f"bf16, {kind}": partial(bfloat16, parallel=kind) for kind in ("ddp", "fsdp")},
    "average": average,
    "linked": linked,
    "view of links": partial(mixed, built=False),
    "links and a folder": partial(mixed, built=True),
    "store away": away,
    **{f"mirror, {ranks}": partial(mirrored, ranks=ranks) for ranks in (2, 4)},
    "evaluated average": evaluated,
    **{f"failed rank, {r}, {end}": partial(failed, rank=r, hangs=end == "hangs") for r in (0, 1) for end in ENDS},
    **{f"stopped evaluation, {ranks}": partial(stopped_evaluation, ranks=ranks) for ranks in (1, 2)},
    **elastic.TRIALS,
}


def main() -> None:
    """Read names of trials from stdin, one a line. Answer each with a line of JSON: null, or why the trial failed.

    All trials share this process, which has everything imported. Each gets the name of a new folder. All other output
    goes to stderr.
    """
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    with tempfile.TemporaryDirectory(prefix="mvlm-trials-") as folder:
        campaign = Campaign(Path(folder))
        for number, line in enumerate(sys.stdin):
            try:
                TRIALS[line.strip()](campaign, Path(folder) / f"trial-{number}")
                answers.write("null\n")
            except (Failed, TimeoutError) as error:
                answers.write(json.dumps(str(error)) + "\n")


if __name__ == "__main__":
    main()
