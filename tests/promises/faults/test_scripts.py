"""The scripts of this folder, with few trials. The targets `faults-*` of the Makefile do more."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.extended]


def run(script: str, *words: object) -> str:
    """Output of a script that ends well."""
    command = [sys.executable, str(Path(__file__).with_name(f"{script}.py")), *map(str, words)]
    # Stops a script that hangs. The longest takes 110 s alone on two cores, and up to 400 s beside other processes.
    done = subprocess.run(command, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    return done.stdout


def test_every_kind_of_fault_ends_well(tmp_path):
    """One trial of each kind; `.ci/run` has 18, and `make faults` a thousand."""
    run("campaign", "--count", 9, "--seed", 1, "--json", tmp_path / "faults.json")
    figures = json.loads((tmp_path / "faults.json").read_text())
    assert figures["trials"] == len({row["fault"] for row in figures["rows"]}) == 9
    assert figures["failed"] == []


def test_killed_builds_parts_and_merges_end_with_the_bytes_of_one_build():
    assert "the bytes of one uninterrupted build" in run("kill_writers", "builds", "--kills", 4)
    assert "the bytes of one uninterrupted build" in run("kill_writers", "parts", "--kills", 3)


def test_killed_evaluations_and_four_ranks_find_the_figures_of_one_process():
    out = run("kill_work", "evaluation", "--kills", 2)
    assert int(out.split()[0]) >= 2  # the last evaluation may be killed more often than asked for
    assert "one of two ranks killed: the other ends" in out
    assert "2 and 4 ranks: the same figures" in out


def test_killed_embeddings_and_two_ranks_write_the_files_of_one_process():
    out = run("kill_work", "embedding", "--kills", 2)
    assert int(out.split()[0]) >= 2
    assert "2 ranks: the same files" in out


def test_a_build_and_a_link_on_ray_survive_the_loss_of_a_node():
    pytest.importorskip("ray")
    out = run("kill_nodes", "--kills", 1)
    assert "1 nodes of 2 killed during builds: the bytes of one machine's build" in out
    assert "1 node killed while tars are linked: the bytes of one machine's index" in out
