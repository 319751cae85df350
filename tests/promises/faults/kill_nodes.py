"""Builds on a Ray cluster of several nodes, one of which is killed: the bytes must be those of one machine's build.

    python tests/promises/faults/kill_nodes.py --kills 20 [--json FILE]

A real cluster on this machine: a head without cores and three nodes of one core each (`make test`: two), every one with
its own raylet and workers. In each trial a drawn node is killed at a drawn moment of the build, and a new node joins
for the next trial. Pieces that were finished at that moment must not be read again, and a lost piece must be read once
more only. Every other data set is built at a URL of an object store on this machine (moto's S3). In two of five trials
the process that asked for the build is killed too, and the build is resumed. In the end tars are linked on the cluster,
and again a node is killed. The exit code is 1 if anything differs.
"""

import contextlib
import hashlib
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
from pathlib import Path
from typing import Any

import ray
from ray.cluster_utils import Cluster

from mvlm_dataloading.build.build import build_shards
from mvlm_dataloading.build.workers import finished_pieces
from mvlm_dataloading.dataset.folders import open_folder
from mvlm_dataloading.links.captions import parse_captions_option
from mvlm_dataloading.options import BuildOptions
from mvlm_dataloading.sources.record import Source
from mvlm_dataloading.tools.link import LinkOptions, link_files
from mvlm_dataloading.urls import is_remote

sys.path.extend(str(Path(__file__).parents[n]) for n in (3, 2))  # in this order: tests/mvlm must not hide mvlm
sys.path.insert(0, str(Path(__file__).parent))

from kill_writers import contents, source

from support.faults.kill_command import run_kills
from support.faults.pieces import LoggedPiece, readings
from support.object_store import serve_s3

OPTIONS = BuildOptions(shard_bytes=40_000, drop_duplicates=True)
EACH = 4
SECONDS = 0.4


def logged_source(images: Path, log: Path, seconds: float = SECONDS) -> Source:
    """The data set of `kill_writers` in pieces of four records, whose readings are noted in `log`."""
    known = source(images)
    listed: list[tuple[str, Any]] = []
    for piece in known.pieces:
        records = list(piece.records(1 << 30))
        listed += [(piece.split, records[begin : begin + EACH]) for begin in range(0, len(records), EACH)]
    pieces = [LoggedPiece(split, records, i, log, seconds) for i, (split, records) in enumerate(listed)]
    return Source(known.name, known.origin, known.licence, known.recipe, pieces)


def finished(out: Path | str) -> set[int]:
    """Numbers of the finished pieces of an unfinished data set."""
    parent, _, name = str(out).rpartition("/")
    return finished_pieces(open_folder(f"{parent}/.{name}.partial"))


def build(images: Path, out: Path | str, log: Path) -> None:
    build_shards(logged_source(images, log), out, OPTIONS, executor="ray")


def kill_asker(images: Path, out: Path | str, log: Path, pieces: int) -> None:
    """Kill a process that builds when so many pieces are finished."""
    words = [sys.executable, __file__, "--build", str(images), str(out), str(log)]
    process = subprocess.Popen(words, stderr=subprocess.DEVNULL)
    while process.poll() is None and len(finished(out)) < pieces:
        time.sleep(0.01)
    assert process.poll() is None, "the build ended before it was to be killed"
    process.send_signal(signal.SIGKILL)
    process.wait()
    time.sleep(1)  # its tasks end with it


def trial(
    cluster: Cluster, nodes: list[Any], images: Path, out: Path | str, log: Path, asker: bool, rng: random.Random
) -> str:
    """Build with a killed node. Returns what happened. Raises AssertionError if the work was not done once."""
    of = len(nodes)
    pieces = len(logged_source(images, log).pieces)
    done: list[dict[int, tuple[int, int]]] = []  # readings of finished pieces, at each interruption

    def note() -> None:
        here = finished(out)
        done.append({number: times for number, times in readings(log).items() if number in here})

    if asker:
        kill_asker(images, out, log, rng.randrange(1, pieces // 2))
        note()
    at = rng.uniform(len(finished(out)), pieces)
    victim = nodes.pop(rng.randrange(len(nodes)))

    ended = threading.Event()

    def kill_node() -> None:
        while len(finished(out)) < int(at) and not ended.is_set():
            time.sleep(0.01)
        time.sleep((at % 1) * SECONDS)
        note()
        cluster.remove_node(victim, allow_graceful=False)

    killer = threading.Thread(target=kill_node)
    killer.start()
    try:
        build(images, out, log)
    finally:
        ended.set()
        killer.join()
    found = readings(log)
    again = {number: begun for number, (begun, _) in found.items() if begun > 1}
    assert set(found) == set(range(pieces))
    # Each interruption loses at most what was in work: one piece of the node, or those of all nodes.
    assert len(again) <= 1 + of * asker, again
    assert max((1, *again.values())) <= 2 + asker, again
    for finished_then in done:
        repeated = {number for number, times in finished_then.items() if found[number] != times}
        assert not repeated, f"finished pieces {repeated} were read again: {finished_then} {found}"
    return f"{'s3' if is_remote(out) else 'disk'}, killed at {at:.1f} of {pieces} pieces, {len(again)} read again" + (
        ", asker killed too" if asker else ""
    )


def link_with_a_killed_node(cluster: Cluster, nodes: list[Any], image: Path, folder: Path) -> None:
    """Link tars on the cluster, and kill a node once one tar is done. Raises AssertionError if the index differs."""
    folder.mkdir()
    with tarfile.open(folder / "0.tar", "w") as tar:
        (text := folder / "text").write_text("a text")
        for number in range(6000):
            tar.add(image, f"{number}.png")
            tar.add(text, f"{number}.txt")
    for number in range(1, 8):
        os.link(folder / "0.tar", folder / f"{number}.tar")
    given, options = [str(folder / "*.tar")], LinkOptions(parse_captions_option("txt"))
    link_files(given, folder / "whole" / "out", options, workers=0)
    pieces, victim, found = folder / "ray" / ".out.link" / "pieces", nodes.pop(), list[int]()

    def kill_node() -> None:
        while not (done := len(list(pieces.rglob("*.json")))) and not ended.is_set():
            time.sleep(0.01)
        found.append(done)
        cluster.remove_node(victim, allow_graceful=False)

    ended, killer = threading.Event(), threading.Thread(target=kill_node)
    killer.start()
    try:
        link_files(given, folder / "ray" / "out", options, executor="ray")
    finally:
        ended.set()
        killer.join()
    assert 0 < found[0] < 8, f"killed at {found[0]} of 8 tars"
    assert contents(folder / "ray" / "out") == contents(folder / "whole" / "out"), "links differ"


def run_trials(folder: Path, kills: int, rng: random.Random) -> str | dict[str, Any]:
    """Kill `kills` nodes. Returns the first difference, or the figures."""
    os.environ["MVLM_CACHE"] = str(folder / "cache")
    images, base = folder / "images", folder / "run"
    images.mkdir()
    whole = build_shards(logged_source(images, folder / "log", 0.0), folder / "whole", OPTIONS, workers=0)
    wanted = {f"out/{name}": digest for name, digest in contents(whole).items()}
    os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)  # workers of the cluster import the piece from there
    # Processes that nothing here asks take longer to start than all trials.
    spared = {"include_dashboard": False, "include_log_monitor": False}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, **spared})
    os.environ["RAY_ADDRESS"] = str(cluster.address)
    size = min(3, kills + 1)
    nodes = [cluster.add_node(num_cpus=1, **spared) for _ in range(size)]
    stories = []
    # The first trial builds on the disk.
    with serve_s3("nodes") if kills > 1 else contextlib.nullcontext():
        try:
            cluster.wait_for_nodes()
            for number in range(kills):
                base.mkdir()
                parent, asker = f"s3://nodes/{number}" if number % 2 else str(base), number % 5 in (2, 3)
                stories.append(trial(cluster, nodes, images, f"{parent}/out", folder / f"log{number}", asker, rng))
                print(f"trial {number + 1}: {stories[-1]}", flush=True)
                place = open_folder(parent)
                found = {
                    name: hashlib.sha256(place.read(name, 1 << 30)).hexdigest()
                    for name in place.names("")
                    if "." in name
                }
                if found != wanted:
                    return f"files differ: {sorted(found)}"
                shutil.rmtree(base)
                nodes.append(cluster.add_node(num_cpus=1, **spared))
            link_with_a_killed_node(cluster, nodes, next(images.rglob("*.png")), folder / "links")
        finally:
            ray.shutdown()
            cluster.shutdown()
    print(f"{kills} nodes of {size} killed during builds: the bytes of one machine's build")
    print("1 node killed while tars are linked: the bytes of one machine's index")
    return {"kills": kills, "nodes": size, "ray": ray.__version__, "trials": stories, "equal": True}


if __name__ == "__main__":
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    if sys.argv[1:2] == ["--build"]:  # the process that `kill_asker` kills
        build(Path(sys.argv[2]), sys.argv[3], Path(sys.argv[4]))
    else:
        sys.exit(run_kills(run_trials, __doc__, "nodes to kill", 20))
