"""Inverted file with product quantisation: how an index of many rows is built in LanceDB, and asked.

docs/evidence/search.md has the measurements. It does not need torch.
"""

from typing import Any

PROBED, LEAST_PROBED = 1 / 10, 40
"""Share of the cells that a query reads, and the fewest: a tenth of few cells finds less."""
REFINED = 8
"""Candidates whose exact similarity is computed, as a multiple of the answers that the engine gives."""
MARGIN = 16
"""Further answers of the engine: it sorts by float32 sums; answers are sorted by float64 sums, as in evaluation."""


def build(table: Any, rows: int, width: int) -> int:
    """Build an inverted file over the column `vector`. Returns its number of cells, the square root of `rows`.

    Args:
        table: LanceDB table with a column of vectors of `width` numbers, of unit length.
    """
    from lancedb.index import IvfPq

    cells = max(1, round(rows**0.5))
    pieces = max(piece for piece in range(1, max(2, width // 4 + 1)) if width % piece == 0)
    table.create_index("vector", config=IvfPq(distance_type="dot", num_partitions=cells, num_sub_vectors=pieces))
    return cells


def cells_read(cells: int) -> int:
    """Number of cells of an inverted file of `cells` that a query reads."""
    return max(min(cells, LEAST_PROBED), round(PROBED * cells))


def limit(query: Any, top: int, probed: int = 0) -> Any:
    """A query of a LanceDB table that gives the `top` answers and MARGIN more.

    Args:
        probed: cells of the inverted file that are read, 0 for a full product. If they hold too few answers, as with a
            filter that few rows pass, the engine goes on to the others.
    """
    query = query.distance_type("dot").limit(top + MARGIN)
    if not probed:
        return query
    return query.minimum_nprobes(probed).maximum_nprobes(0).refine_factor(REFINED)  # 0: no maximum
