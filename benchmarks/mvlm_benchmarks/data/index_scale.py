"""Opening, order and memory of data sets of up to a hundred million samples, for all ranks of a machine together.

    python -m mvlm_benchmarks.data.index_scale --out benchmarks/results

Builds a data set of each size: tars of 50 small images, whose indices list every image 200 times, so a shard has 10,000
samples. All tars are one file with many names, so a hundred million samples take the room of their index, 4.5 GB.
Several ranks open the data set together, get a first batch, jump along an epoch and get batches there. Then each orders
a whole epoch and looks every sample up.

Memory is PSS of all ranks together: a page that several processes map counts once. The figures of a data set of 10,000
samples show how much of it is Python, torch and DALI.

`--before CHECKOUT` also measures another checkout of this repository on the same DALI indices.
"""

import argparse
import contextlib
import hashlib
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mvlm_benchmarks import machine
from mvlm_benchmarks.data import index_worker, start_up
from mvlm_benchmarks.results import MACHINE_COLUMNS, device_name, file_stem, heading, write_csv

SHARD_SAMPLES = 10_000
MAX_LINKS = 30_000
"""Names of one file. Ext4 allows 65,000."""
JUMPS = tuple(k / 10 for k in range(10))
COLUMNS = (
    "code", "opened_from", "samples", "shards", "ranks", "open_s", "first_batch_s", "own_bytes_per_sample",
    "index_bytes_per_sample", "start_mb", "open_mb", "batch_mb", "jump_mb_first", "jump_mb_max", "jump_s",
    "walk_mb_first", "walk_mb_max", "walk_samples_per_s", "order_crc", "shards_in_a_batch", "run", "build_s",
    *MACHINE_COLUMNS,
)  # fmt: skip


def build(folder: Path, samples: int, *, dali: bool) -> None:
    """Write a data set of `samples`, a multiple of 10,000, with DALI indices or with the index of the split."""
    from mvlm_dataloading.dataset.dali_index import parse_index
    from mvlm_dataloading.dataset.durable_files import replaced_durably
    from mvlm_dataloading.dataset.index_writer import IndexWriter, pack_records
    from mvlm_dataloading.dataset.sample_index import index_path

    tar, lines = start_up.write_images(folder.with_name(f"{folder.name}.one"))
    repeated = "\n".join([f"v1.2 {SHARD_SAMPLES}", *(lines * (SHARD_SAMPLES // len(lines)))]) + "\n"
    folder.mkdir(parents=True)
    digest, shards = hashlib.sha256(tar).hexdigest(), []
    names = [f"train-{number:06d}" for number in range(samples // SHARD_SAMPLES)]
    for suffix, content in ((".tar", tar), (".idx", repeated.encode())) if dali else ((".tar", tar),):
        for number, name in enumerate(names):
            path = (folder / name).with_suffix(suffix)
            if number % MAX_LINKS:
                path.hardlink_to((folder / names[number - number % MAX_LINKS]).with_suffix(suffix))
            else:
                path.write_bytes(content)
    shards = [{"tar": f"{n}.tar", "samples": SHARD_SAMPLES, "bytes": len(tar), "sha256": digest} for n in names]
    splits = {"train": {"samples": samples, "captions": samples, "shards": shards}}
    (folder / "dataset.json").write_text(json.dumps({"format_version": 1, "splits": splits}))
    if not dali:
        parsed = parse_index(repeated.encode())
        records = pack_records(parsed)
        with replaced_durably(index_path(folder, "train")) as file:
            writer = IndexWriter(file, "train", shards)
            for _ in shards:
                writer.add(records, parsed.keys)
            writer.finish()


class Ranks:
    """Processes that run `index_worker` on one data set, in step."""

    def __init__(self, folder: Path, ranks: int, checkout: Path | None):
        root = checkout or Path(__file__).parents[3]
        places = [root, *(root / name for name in ("kernels", "dataloading", "benchmarks"))]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, places)), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-W", "ignore", index_worker.__file__, str(folder)]
        self._processes = [
            subprocess.Popen(
                [*command, str(rank), str(ranks), str(SHARD_SAMPLES)], env=environment, text=True,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            )
            for rank in range(ranks)
        ]  # fmt: skip
        self._answers()

    def do(self, command: str) -> list[dict[str, Any]]:
        """Send a command to all ranks. Returns their answers when the last one has answered."""
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.write(command + "\n")
            process.stdin.flush()
        return self._answers()

    def seconds(self, command: str) -> float:
        """Seconds of the slowest rank."""
        return max(answer["s"] for answer in self.do(command))

    def memory_mb(self) -> float:
        """PSS of all ranks together, in MB (10^6)."""
        return sum(kilobytes(process.pid, "Pss") for process in self._processes) / 1e3 * 1.024

    def own_bytes(self) -> float:
        """Anonymous memory of a rank, in bytes: the mean."""
        return statistics.fmean(1024 * kilobytes(process.pid, "Pss_Anon") for process in self._processes)

    def close(self) -> None:
        for process in self._processes:
            process.kill()
            process.communicate()

    def _answers(self) -> list[dict[str, Any]]:
        return [json.loads(process.stdout.readline()) for process in self._processes if process.stdout is not None]


def kilobytes(process: int, field: str) -> int:
    """A field of a process's memory map, summed over all mappings, in units of 1,024 bytes."""
    found = re.search(rf"^{field}: *(\d+) kB$", Path(f"/proc/{process}/smaps_rollup").read_text(), re.MULTILINE)
    assert found is not None, field
    return int(found[1])


def measure(folder: Path, samples: int, ranks: int, checkout: Path | None = None) -> dict[str, Any]:
    """Measure one data set. Seconds are those of the slowest rank, without imports."""
    with contextlib.closing(Ranks(folder, ranks, checkout)) as running:
        row: dict[str, Any] = {"samples": samples, "shards": samples // SHARD_SAMPLES, "ranks": ranks}
        start, own = running.memory_mb(), running.own_bytes()
        row["open_s"] = running.seconds("open")
        row["own_bytes_per_sample"] = (running.own_bytes() - own) / samples
        row |= {"start_mb": start, "open_mb": running.memory_mb()}
        row["first_batch_s"] = row["open_s"] + running.seconds("batch")
        row["batch_mb"] = running.memory_mb()
        jumped = [(running.seconds(f"jump {place}"), running.memory_mb()) for place in JUMPS]
        row["jump_s"] = statistics.median(seconds for seconds, _ in jumped)
        row |= {"jump_mb_first": jumped[0][1], "jump_mb_max": max(memory for _, memory in jumped)}
        order = running.do("order")[0]
        row |= {"order_crc": f"{order['crc']:08x}"} | {name: order[name] for name in ("shards_in_a_batch", "run")}
        walked = [(running.do(f"walk {tenth}"), running.memory_mb()) for tenth in range(10)]
        assert all(answer["sum_is_right"] for answer in walked[-1][0])  # every sample once, up to a coincidence
        row |= {"walk_mb_first": walked[0][1], "walk_mb_max": max(memory for _, memory in walked)}
        row["walk_samples_per_s"] = samples / sum(max(answer["s"] for answer in answers) for answers, _ in walked)
    return row


@contextlib.contextmanager
def built(place: Path, samples: int, *, dali: bool) -> Iterator[tuple[Path, float]]:
    """A data set in a new folder under `place`, removed afterwards; and the seconds to build it."""
    with tempfile.TemporaryDirectory(prefix="mvlm-index-scale-", dir=place) as folder:
        started = time.perf_counter()
        build(Path(folder) / "data", samples, dali=dali)
        yield Path(folder) / "data", time.perf_counter() - started


def rows_of(place: Path, samples: int, ranks: int, before: Path | None, most_dali: int) -> Iterator[dict[str, Any]]:
    """Measure a size: from the index, and up to `most_dali` samples from DALI indices."""
    with built(place, samples, dali=False) as (folder, seconds):
        size = (folder / "train.index").stat().st_size
        common = {"build_s": seconds, "index_bytes_per_sample": size / samples}
        yield {"code": "now", "opened_from": "index"} | common | measure(folder, samples, ranks)
    if samples > most_dali:
        return
    with built(place, samples, dali=True) as (folder, seconds):
        size = (folder / "train-000000.idx").stat().st_size
        common = {"build_s": seconds, "index_bytes_per_sample": size / SHARD_SAMPLES, "opened_from": "DALI indices"}
        yield {"code": "now"} | common | measure(folder, samples, ranks)
        if before is not None:
            yield {"code": "before"} | common | measure(folder, samples, ranks, before)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m mvlm_benchmarks.data.index_scale", description=(__doc__ or "").split("\n")[0]
    )
    sizes = [10_000, 1_000_000, 4_000_000, 100_000_000]
    parser.add_argument("--samples", type=int, nargs="+", default=sizes, help="sizes, multiples of 10,000")
    parser.add_argument("--ranks", type=int, default=4, help="processes that load together")
    parser.add_argument("--most-dali", type=int, default=4_000_000, help="largest size opened from DALI indices")
    parser.add_argument("--before", type=Path, help="another checkout, measured on DALI indices too")
    parser.add_argument("--place", type=Path, default=Path(tempfile.gettempdir()), help="folder of the data sets")
    parser.add_argument("--out", type=Path, default=Path(), help="folder of the CSV")
    arguments = parser.parse_args()
    if any(samples < SHARD_SAMPLES or samples % SHARD_SAMPLES for samples in arguments.samples):
        parser.error(f"--samples: wanted multiples of {SHARD_SAMPLES}, got {arguments.samples}")
    about = machine.describe("cpu", ["nvidia-dali-cuda130", "numpy"])
    about |= {"figures": f"loader only, no model, {os.cpu_count()} cores"}
    print(heading(about))
    rows = []
    for samples in arguments.samples:
        for row in rows_of(arguments.place, samples, arguments.ranks, arguments.before, arguments.most_dali):
            rows.append({k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()})
            print(json.dumps(rows[-1]), flush=True)
            write_csv(rows, about, arguments.out / f"{file_stem('index', device_name(about))}.csv", COLUMNS)


if __name__ == "__main__":
    main()
