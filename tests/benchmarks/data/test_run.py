"""`mvlm bench data`: its data, the lead of our loader with a margin, and its output with contenders of known rates."""

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from mvlm.errors import ConfigError
from mvlm_benchmarks.data import photos, run
from mvlm_dataloading import ShardWriter
from support.data import make_image

SETTINGS = {"rounds": 3, "batches": 8, "batch": 32, "size": 224, "threads": 2}


@pytest.fixture(scope="module")
def photographs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "photos"
    photos.build(folder, 160)
    return folder


@pytest.mark.extended
@pytest.mark.slow
def test_our_loader_takes_less_processor_time_than_the_others(photographs) -> None:
    """Processor time, because a busy machine distorts it least, in interleaved rounds. Measured: 2.6 and 1.7."""
    least = {"pil": 1.7, "decode_jpeg": 1.3}
    rows = {row["contender"]: row for row in run.measure_recipe(["ours", *least], "crop", photographs, SETTINGS)}
    assert {row["status"] for row in rows.values()} == {"ok"}
    for name, ratio in least.items():
        assert rows[name]["ours_over_cpu"] >= ratio, rows


@pytest.fixture
def few(tmp_path) -> Path:
    """A data set of one image."""
    with ShardWriter(tmp_path / "few", name="few", source="", licence="", attribution="", recipe={}) as writer:
        writer.add("0", make_image(0), ["words"])
    return tmp_path / "few"


def test_a_batch_of_more_images_than_there_are_is_refused(tmp_path, few) -> None:
    """PyTorch's DataLoader drops the last batch, so it would wait for ever."""
    with pytest.raises(ConfigError, match="batch: wanted at most 1"):
        run.run(few, 1, tmp_path, batch=4)


def test_a_loader_that_dies_has_no_figure_and_the_others_go_on(tmp_path, monkeypatch) -> None:
    """One ends before its first batch, one when it has made a turn that counts."""
    program = """#!/bin/sh
[ "$3" = ours ] && exit 1
echo '{"status": "ok", "note": "", "seconds": 1}'
read -r turn; echo '{"seconds": 0.5, "rss_mb": 1}'
read -r turn; echo '{"seconds": 0.5, "rss_mb": 1}'
[ "$3" = pil ] && exit 7
while read -r turn; do echo '{"seconds": 0.5, "rss_mb": 1}'; done
"""
    (tmp_path / "python").write_text(program)
    (tmp_path / "python").chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    dead, dying, alive = run.measure_recipe(["ours", "pil", "decode_jpeg"], "crop", tmp_path, SETTINGS)
    assert (dead["status"], dead["note"], dead["images_per_s"]) == ("error", "ended with code 1", None)
    assert (dying["status"], dying["note"], dying["images_per_s"]) == ("error", "ended with code 7", None)
    assert alive["status"] == "ok"
    assert alive["images_per_s"] > 0


@pytest.mark.slow
def test_no_loader_outlives_a_terminated_benchmark(tmp_path) -> None:
    """Neither one that waits for its turn nor one that is starting."""
    (tmp_path / "python").write_text(
        f"""#!/bin/sh
touch {tmp_path}/$3.$$
[ $3 = ours ] || exec sleep 60
echo '{{"status": "ok", "note": ""}}'
read -r turn; sleep 60
"""
    )
    (tmp_path / "python").chmod(0o755)
    script = f"""
import sys
from pathlib import Path
from mvlm_benchmarks.data import run
sys.executable = {str(tmp_path / "python")!r}
run.measure_recipe(["ours", "pil"], "crop", Path(), {SETTINGS})
"""
    benchmark = subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.DEVNULL)
    wait_until(lambda: len(list(tmp_path.glob("*.*"))) == 2)
    benchmark.terminate()
    assert benchmark.wait(30) != 0
    loaders = [path.suffix.removeprefix(".") for path in tmp_path.glob("*.*")]
    wait_until(lambda: not any(Path("/proc", loader).exists() for loader in loaders))


def wait_until(holds: Callable[[], bool]) -> None:
    end = time.monotonic() + 30
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.05)
