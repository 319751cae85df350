"""Speed of exported programs beside eager torch: `python -m mvlm_benchmarks.run.export_rate RUN --csv FILE`.

The three parts of a model run on the same inputs as eager modules, as programs of torch.export, and by onnxruntime, in
turns in one process, in fp32 on a CPU. The ratios are the figures: eager's time over a contender's, in each round, and
then the median; above 1 the contender is faster. `wall_ratio` is by the clock, with the middle half of the rounds. On a
machine with other work the clock swings, and `cpu_ratio`, of the processor's time, is the steadier one.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from mvlm.portable.folder import export_programs
from mvlm.portable.modules import example_inputs, parts
from mvlm.portable.programs import load_program
from mvlm.runs.load import load_model
from mvlm_benchmarks.machine import describe
from mvlm_benchmarks.results import RowFile

COLUMNS = (
    "part", "batch", "length", "contender", "ms", "wall_ratio", "low", "high", "cpu_ms", "cpu_ratio", "rounds",
    "threads",
)  # fmt: skip
Times = dict[str, list[tuple[float, float]]]
"""Of each contender: milliseconds of each round, by the clock and of the processor."""


def contenders(run: Path, folder: Path, threads: int) -> Iterator[tuple[str, dict[str, Callable[[Any], object]], Any]]:
    """For each part: its name, what runs it by contender, and the network for its inputs."""
    for format in ("pt2", "onnx"):
        export_programs(run, folder / format, format)
    network = load_model(run, "cpu", "fp32").network
    for part in parts(network):
        runners: dict[str, Callable[[Any], object]] = {"eager": lambda inputs, part=part: part.module(**inputs)}
        for format in ("pt2", "onnx"):
            runners[format] = load_program(folder / format / f"{part.name}.{format}", threads)
        yield part.name, runners, network


@torch.no_grad()
def rounds_of(runners: dict[str, Callable[[Any], object]], inputs: Any, rounds: int) -> Times:
    """Times of each contender in each round, after one round that is not counted."""
    times: Times = {name: [] for name in runners}
    order = list(runners)
    for number in range(rounds + 1):
        for name in order[number % len(order) :] + order[: number % len(order)]:  # each is first equally often
            wall, cpu = time.perf_counter(), time.process_time()
            runners[name](inputs)
            times[name].append((1000 * (time.perf_counter() - wall), 1000 * (time.process_time() - cpu)))
    return {name: found[1:] for name, found in times.items()}


def rows_of(times: Times) -> list[dict[str, Any]]:
    """Median times of each contender; medians and the middle half of eager's time over its own, round by round."""
    rows = []
    for name, found in times.items():
        pairs = list(zip(times["eager"], found, strict=True))
        low, middle, high = statistics.quantiles([eager[0] / own[0] for eager, own in pairs], n=4)
        figures = {
            "ms": statistics.median(wall for wall, _ in found),
            "wall_ratio": middle,
            "low": low,
            "high": high,
            "cpu_ms": statistics.median(cpu for _, cpu in found),
            "cpu_ratio": statistics.median(eager[1] / own[1] for eager, own in pairs),
        }
        rows.append({"contender": name, **{key: round(value, 3) for key, value in figures.items()}})
    return rows


def main() -> None:
    """Measure, print, and write the rows to a CSV file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--csv", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    about = describe("cpu", ["onnx", "onnxscript", "onnxruntime"])
    file = None if options.csv is None else RowFile(options.csv, about, COLUMNS)
    with tempfile.TemporaryDirectory() as folder:
        for part, runners, network in contenders(options.run, Path(folder), options.threads):
            for batch in options.batches:
                length = network.config.text_length
                inputs = example_inputs(network, batch, length)[part]
                rows = rows_of(rounds_of(runners, inputs, options.rounds))
                given = {"part": part, "batch": batch, "length": length}
                found = [{**given, **row, "rounds": options.rounds, "threads": options.threads} for row in rows]
                for row in found:
                    print(row)
                if file is not None:
                    file.append(found)


if __name__ == "__main__":
    main()
