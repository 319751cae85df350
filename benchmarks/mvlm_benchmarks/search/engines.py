"""Vector engines behind one interface: LanceDB, faiss, usearch and Milvus Lite.

Each engine is imported when it is used, and none of them is a dependency of this package. Similarity is the inner
product of vectors of unit length.

Shape legend: n vectors, Q queries, E width.
"""

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from mvlm.search import inverted_file

Vectors = NDArray[np.float32]
PARTITIONS = 1024
"""Cells of faiss's and Milvus Lite's inverted files, about the square root of a million."""
SAMPLES = 64
"""Vectors of each cell that faiss is trained on."""


class Engine(Protocol):
    """An index of one engine, on disk in a folder or in memory with a file of its own."""

    setting: str
    """Name of the search parameter that trades recall for time."""
    sweep: tuple[int, ...]
    """Values of it, rising."""

    def build(self, vectors: Vectors, folder: Path) -> None:
        """Index vectors (n, E) and write the index to an empty folder. Vector i has the id i."""
        ...

    def search(self, query: Vectors, value: int, top: int) -> list[int]:
        """Ids of the `top` nearest vectors to one query (E,), with the search parameter at `value`."""
        ...


class Lance:
    """LanceDB as `mvlm search` builds and asks it: product quantisation, exact distances for the first candidates."""

    setting, sweep = "cells read", (16, 32, 40, 64, 100, 125, 250)

    def build(self, vectors: Vectors, folder: Path) -> None:
        lancedb, pa = import_module("lancedb"), import_module("pyarrow")
        width = vectors.shape[1]
        schema = pa.schema([("id", pa.int64()), ("vector", pa.list_(pa.float32(), width))])

        def batches() -> Any:
            for start in range(0, len(vectors), 50_000):
                part = vectors[start : start + 50_000]
                column = pa.FixedSizeListArray.from_arrays(part.reshape(-1), width)
                ids = pa.array(np.arange(start, start + len(part)))
                yield pa.RecordBatch.from_arrays([ids, column], schema=schema)

        self.table = lancedb.connect(folder).create_table("vectors", batches(), schema=schema)
        inverted_file.build(self.table, len(vectors), width)

    def search(self, query: Vectors, value: int, top: int) -> list[int]:
        found = inverted_file.limit(self.table.search(query), top, value)
        return found.select(["id", "_distance"]).to_arrow()["id"].to_pylist()[:top]


class FaissInvertedFile:
    """faiss: an inverted file of whole vectors, in memory."""

    setting, sweep = "nprobe", (4, 8, 16, 32, 64, 128, 256)

    def build(self, vectors: Vectors, folder: Path) -> None:
        faiss = import_module("faiss")

        self.index = faiss.index_factory(vectors.shape[1], f"IVF{PARTITIONS},Flat", faiss.METRIC_INNER_PRODUCT)
        self.index.train(vectors[: SAMPLES * PARTITIONS])
        self.index.add(vectors)
        faiss.write_index(self.index, str(folder / "index"))

    def search(self, query: Vectors, value: int, top: int) -> list[int]:
        self.index.nprobe = value
        return self.index.search(query[None], top)[1][0].tolist()


class Usearch:
    """usearch: a graph (HNSW) of half-precision vectors, in memory."""

    setting, sweep = "expansion_search", (16, 32, 64, 128, 256, 512)

    def build(self, vectors: Vectors, folder: Path) -> None:
        self.index = import_module("usearch.index").Index(
            ndim=vectors.shape[1], metric="ip", dtype="f16", connectivity=16, expansion_add=100
        )
        self.index.add(np.arange(len(vectors)), vectors)
        self.index.save(str(folder / "index"))

    def search(self, query: Vectors, value: int, top: int) -> list[int]:
        self.index.expansion_search = value
        return self.index.search(query, top).keys.tolist()


class Milvus:
    """Milvus Lite: an inverted file of whole vectors, in a local file."""

    setting, sweep = "nprobe", (4, 8, 16, 32, 64, 128, 256)

    def build(self, vectors: Vectors, folder: Path) -> None:
        pymilvus = import_module("pymilvus")
        self.client = pymilvus.MilvusClient(str(folder / "milvus.db"))
        schema = self.client.create_schema(auto_id=False)
        schema.add_field("id", pymilvus.DataType.INT64, is_primary=True)
        schema.add_field("vector", pymilvus.DataType.FLOAT_VECTOR, dim=vectors.shape[1])
        index = self.client.prepare_index_params()
        index.add_index("vector", index_type="IVF_FLAT", metric_type="IP", params={"nlist": PARTITIONS})
        self.client.create_collection("vectors", schema=schema)
        for start in range(0, len(vectors), 10_000):
            rows = [{"id": start + i, "vector": v} for i, v in enumerate(vectors[start : start + 10_000])]
            self.client.insert("vectors", rows)
        self.client.create_index("vectors", index)
        self.client.load_collection("vectors")

    def search(self, query: Vectors, value: int, top: int) -> list[int]:
        parameters = {"metric_type": "IP", "params": {"nprobe": value}}
        found = self.client.search("vectors", [query.tolist()], limit=top, search_params=parameters)
        return [hit["id"] for hit in found[0]]


ENGINES: dict[str, Callable[[], Engine]] = {
    "lancedb": Lance,
    "faiss-cpu": FaissInvertedFile,
    "usearch": Usearch,
    "milvus-lite": Milvus,
}
"""Engines by the name of their distribution."""
