"""Time to the first batch of a large index."""

import pytest

from mvlm_benchmarks.data import start_up


@pytest.mark.slow
def test_first_batch_of_a_hundred_thousand_samples_takes_little_processor_time(tmp_path) -> None:
    start_up.build(tmp_path / "start", 100_000)
    figures = start_up.seconds_to_first_batch(tmp_path / "start")
    assert figures["samples"] == 100_000
    assert figures["cpu_s"] < 3  # a million samples took 1.5 s, half of which does not depend on their number
