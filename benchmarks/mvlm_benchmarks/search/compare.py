"""Compare vector engines: `python -m mvlm_benchmarks.search.compare --csv FILE [--engines lancedb faiss-cpu ...]`.

Vectors are synthetic: normal numbers whose variances fall as 1/i over the axes, turned at random and scaled to unit
length. Their effective dimension, (sum of variances)^2 / sum of squared variances, is about 23, as of learned
embeddings; vectors without such a spectrum have no near neighbours and say nothing about a search.

The truth is a full product in float32. A query is one call with one vector, files in the page cache: `ms_median` and
`ms_p95` by the clock, `cpu_ms` the processor time of all threads of this process, which a busy machine disturbs less.
It does not need torch.

Shape legend: n vectors, Q queries, E width.
"""

import argparse
import csv
import platform
import statistics
import tempfile
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from mvlm_benchmarks.search.engines import ENGINES, Engine, Vectors

TOP = 10
BLOCK = 100_000
SECONDS = 60.0
"""Most time for the queries of one value. An engine that needs longer is measured on fewer queries."""


def synthetic_vectors(count: int, width: int, seed: int) -> Vectors:
    """Unit vectors float32 (count, width) with variances 1/i over the axes, turned by one fixed rotation."""
    rotation = np.linalg.qr(np.random.default_rng(0).normal(size=(width, width)))[0].astype(np.float32)
    scale = (1 / np.sqrt(np.arange(1, width + 1))).astype(np.float32)
    vectors = np.empty((count, width), np.float32)
    rng = np.random.default_rng([1, seed])
    for start in range(0, count, BLOCK):
        part = rng.standard_normal((min(BLOCK, count - start), width), dtype=np.float32) * scale @ rotation
        vectors[start : start + BLOCK] = part / np.linalg.norm(part, axis=1, keepdims=True)
    return vectors


def exact_neighbours(vectors: Vectors, queries: Vectors, top: int = TOP) -> np.ndarray:
    """Ids int64 (Q, top) of the nearest vectors (n, E) to queries (Q, E), nearest first."""
    scores = np.empty((len(queries), 0), np.float32)
    ids = np.empty((len(queries), 0), np.int64)
    for start in range(0, len(vectors), BLOCK):
        part = queries @ vectors[start : start + BLOCK].T
        scores = np.concatenate([scores, part], axis=1)
        ids = np.concatenate([ids, np.broadcast_to(np.arange(start, start + part.shape[1]), part.shape)], axis=1)
        order = np.argsort(-scores, axis=1, kind="stable")[:, :top]
        scores, ids = np.take_along_axis(scores, order, 1), np.take_along_axis(ids, order, 1)
    return ids


def recall_of(found: list[list[int]], truth: np.ndarray) -> float:
    """Share of the true neighbours (Q, top) that were found."""
    hits = sum(len(set(answers) & set(right)) for answers, right in zip(found, truth.tolist(), strict=True))
    return hits / truth.size


def measure(
    name: str, engine: Engine, vectors: Vectors, queries: Vectors, truth: np.ndarray, values: list[int] | None = None
) -> Iterator[dict[str, Any]]:
    """Build one engine's index and search it at every value of its parameter: one row for each value."""
    with tempfile.TemporaryDirectory() as scratch:
        started, build_cpu = time.perf_counter(), time.process_time()
        engine.build(vectors, Path(scratch))
        seconds, build_cpu = time.perf_counter() - started, time.process_time() - build_cpu
        size = sum(file.stat().st_size for file in Path(scratch).rglob("*") if file.is_file())
        for value in values or engine.sweep:
            for query in queries[:3]:  # warm
                engine.search(query, value, TOP)
            found, times = [], []
            begin, begin_cpu = time.perf_counter(), time.process_time()
            for query in queries:
                before = time.perf_counter()
                found.append(engine.search(query, value, TOP))
                times.append(1000 * (time.perf_counter() - before))
                if time.perf_counter() - begin > SECONDS:
                    break
            cpu_ms = 1000 * (time.process_time() - begin_cpu) / len(found)
            recall = recall_of(found, truth[: len(found)])
            yield {
                "engine": name,
                "version": version(name),
                "vectors": len(vectors),
                "width": vectors.shape[1],
                "build_s": round(seconds, 1),
                "build_cpu_s": round(build_cpu, 1),
                "size_mb": round(size / 1e6, 1),
                "setting": engine.setting,
                "value": value,
                "queries": len(found),
                "recall_at_10": round(recall, 4),
                "ms_median": round(statistics.median(times), 3),
                "ms_p95": round(float(np.percentile(times, 95)), 3),
                "cpu_ms": round(cpu_ms, 3),
                "machine": f"{platform.machine()}, Python {platform.python_version()}",
            }
            if recall > 0.999:
                break


def main() -> None:
    """Measure the engines in turn and append their rows to a CSV file as they come."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--csv", type=Path, required=True)
    parser.add_argument("--engines", nargs="+", choices=list(ENGINES), default=list(ENGINES))
    parser.add_argument("--vectors", type=int, default=1_000_000)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--queries", type=int, default=300)
    parser.add_argument("--values", type=int, nargs="+", help="of the search parameter; default: the engine's own")
    options = parser.parse_args()
    vectors = synthetic_vectors(options.vectors, options.width, seed=0)
    queries = synthetic_vectors(options.queries, options.width, seed=1)
    truth = exact_neighbours(vectors, queries)
    for name in options.engines:
        for row in measure(name, ENGINES[name](), vectors, queries, truth, options.values):
            print(row, flush=True)
            new = not options.csv.exists()
            with options.csv.open("a", newline="") as file:
                writer = csv.DictWriter(file, list(row))
                if new:
                    writer.writeheader()
                writer.writerow(row)


if __name__ == "__main__":
    main()
