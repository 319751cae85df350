"""The comparison of vector engines: its data, its truth, and its rows."""

import numpy as np
import pytest

from mvlm_benchmarks.search.compare import exact_neighbours, measure, recall_of, synthetic_vectors
from mvlm_benchmarks.search.engines import ENGINES


def test_vectors_have_unit_length_and_the_stated_spectrum():
    vectors = synthetic_vectors(20_000, 16, seed=0)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    assert np.array_equal(vectors[:100], synthetic_vectors(20_000, 16, seed=0)[:100])
    assert not np.array_equal(vectors[:100], synthetic_vectors(100, 16, seed=1))
    variances = np.sort(np.linalg.eigvalsh(np.cov(vectors.T)))[::-1]
    assert 1.5 < variances[0] / variances[1] < 2.1  # 1/1 over 1/2, a little less for unit length
    assert 6 < variances[0] / variances[15] < 17


def test_the_truth_is_a_full_sort():
    vectors, queries = synthetic_vectors(500, 8, seed=0), synthetic_vectors(7, 8, seed=1)
    wanted = np.argsort(-(queries.astype(np.float64) @ vectors.T.astype(np.float64)), axis=1)[:, :10]
    assert np.array_equal(exact_neighbours(vectors, queries), wanted)


def test_rows_state_recall_for_each_value(tmp_path):
    vectors, queries = synthetic_vectors(300, 8, seed=0), synthetic_vectors(5, 8, seed=1)
    truth = exact_neighbours(vectors, queries)

    class Half:
        """Finds the first `value` true neighbours."""

        setting, sweep = "found", (5, 10)

        def build(self, vectors, folder):
            (folder / "index").write_bytes(bytes(1_000_000))

        def search(self, query, value, top):
            row = int(np.argmax((queries == query).all(1)))
            return [*truth[row, :value].tolist(), *[-1] * (top - value)]

    rows = list(measure("numpy", Half(), vectors, queries, truth))
    assert [(row["value"], row["recall_at_10"], row["size_mb"]) for row in rows] == [(5, 0.5, 1.0), (10, 1.0, 1.0)]
    assert [row["value"] for row in measure("numpy", Half(), vectors, queries, truth, [7])] == [7]
    assert recall_of([[0, 1], [5, 6]], np.array([[0, 2], [6, 5]])) == 0.75


@pytest.mark.slow
def test_lancedb_finds_what_it_was_given(tmp_path):
    pytest.importorskip("lancedb")
    vectors = synthetic_vectors(2_000, 16, seed=0)
    engine = ENGINES["lancedb"]()
    engine.build(vectors, tmp_path)
    found = [engine.search(vector, 256, 10)[0] for vector in vectors[:20]]
    assert found == list(range(20))
