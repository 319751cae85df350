"""Loading that is killed and resumed: the batches must equal those of an undisturbed process.

    python tests/promises/faults/kill_loaders.py [--kills 50]

One process imports everything and forks those that load, because an import takes longer than a trial. Prints a line.
The exit code is 1 if batches differ.
"""

import hashlib
import json
import os
import random
import signal
import sys
import time
from pathlib import Path

from mvlm_dataloading import Dataset, Loader, LoaderWork, Tokenizer, open_dataset, train_tokenizer
from mvlm_dataloading.loader.augment import Augment

sys.path.extend(str(Path(__file__).parents[n]) for n in (3, 2))  # in this order: tests/mvlm must not hide mvlm

from support.data import write_waves
from support.faults.forks import ended_well, in_child
from support.faults.kill_command import run_kills

BATCH = 8


def hashes(batch, masks) -> list[str]:
    """Sample id of each row, and a hash of its image, tokens and masks."""
    found, cuts = [], batch.cu_seqlens.tolist()
    for row, i in enumerate(batch.sample_id.tolist()):
        hidden = masks.token_ids[(masks.token_ids >= cuts[row]) & (masks.token_ids < cuts[row + 1])] - cuts[row]
        parts = [batch.images[row], batch.tokens[cuts[row] : cuts[row + 1]], masks.patch_ids[row], hidden]
        digest = hashlib.sha256(b"".join(part.numpy().tobytes() for part in parts)).hexdigest()[:16]
        found.append(f"{i}:{digest}")
    return found


def load_until_killed(dataset: Dataset, tokenizer: Tokenizer, folder: Path, steps: int | None) -> None:
    """Append the hashes of each batch to `log`, then write the loader's state, as training writes checkpoints."""
    loader = Loader(
        dataset, tokenizer, batch_size=BATCH, image_size=32, text_length=12, seed=11, work=LoaderWork(num_threads=1),
        augment=Augment(operations=2, flip=0.5),
    )  # fmt: skip
    state = folder / "state.json"
    if state.exists():
        loader.load_state_dict(json.loads(state.read_text()))
    log = os.open(folder / "log", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    for batch, masks in loader:
        os.write(log, f"{loader.step} {' '.join(hashes(batch, masks))}\n".encode())
        aside = folder / "aside"
        aside.write_text(json.dumps(loader.state_dict()))
        aside.rename(state)
        if loader.step == steps:
            break
    loader.close()


def read_log(folder: Path) -> list[tuple[int, list[str]]]:
    lines = [line.split() for line in (folder / "log").read_text().splitlines()] if (folder / "log").exists() else []
    return [(int(words[0]), words[1:]) for words in lines if len(words) == 1 + BATCH]


def run_trials(folder: Path, kills: int, rng: random.Random) -> str | None:
    """Kill `kills` loading processes. Returns the first difference from an undisturbed process, or None."""
    dataset = open_dataset(write_waves(folder / "data"), "train")
    tokenizer = train_tokenizer(dataset.captions(0), 300)
    killed, undisturbed = folder / "killed", folder / "undisturbed"
    killed.mkdir()
    undisturbed.mkdir()
    for trial in range(kills):
        log, before = killed / "log", (killed / "log").stat().st_size if trial else 0
        log.touch()
        pid = in_child(lambda: load_until_killed(dataset, tokenizer, killed, None))
        # Kill one in five while it starts, the others between batches or within one.
        while trial % 5 and log.stat().st_size == before:
            time.sleep(0.005)
        time.sleep(rng.uniform(0.0, 0.3))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    steps = max([step for step, _ in read_log(killed)], default=0) + 3
    for where in (killed, undisturbed):
        pid = in_child(lambda where=where: load_until_killed(dataset, tokenizer, where, steps))
        assert ended_well(pid), "a loading process failed"
    wanted = dict(read_log(undisturbed))
    found = read_log(killed)
    print(f"{kills} kills within {steps} batches, {len(found) - steps} of them made twice")
    for step, row in found:
        if row != wanted[step]:
            return f"batch {step} is {row} wanted {wanted[step]}"
    if {step for step, _ in found} != set(range(1, steps + 1)) or set(wanted) != set(range(1, steps + 1)):
        return "batches are missing"
    ids = [int(word.split(":")[0]) for step in range(1, steps + 1) for word in wanted[step]]
    for begin in range(0, len(ids) - len(dataset) + 1, len(dataset)):
        if sorted(ids[begin : begin + len(dataset)]) != list(range(len(dataset))):
            return f"the epoch from sample {begin} on does not have every sample once"
    return None if steps > 3 else "no batch was made before a kill"


if __name__ == "__main__":
    # Import DALI before the forks; it must start no thread in this process.
    import nvidia.dali.fn  # noqa: F401

    sys.exit(run_kills(run_trials, __doc__, "processes to kill", 50))
