"""Loaders that read from an object store: ours, webdataset, litdata and mosaicml-streaming, by `mvlm bench data`.

    python -m mvlm_benchmarks.data.peers [--tars 60] [--samples 50] [--rounds 7] [--delay 0.02] [--out build/bench]

Tars of JPEGs are put into SeaweedFS on this machine, behind a proxy that adds a delay to every answer, and linked
there. Beside the tars are the same samples as litdata's chunks and as mosaicml-streaming's shards, each of 8 MB, by the
packages' own writers; a package that is not installed is left out. Each contender has one thread, or one worker. There
are enough samples for one epoch, so that no contender reads from a cache of its own.
"""

import argparse
import os
import tempfile
from importlib import import_module
from pathlib import Path
from typing import Any

from mvlm_dataloading import open_dataset
from mvlm_dataloading.links.captions import parse_captions_option
from mvlm_dataloading.tools.link import LinkOptions, link_files

from .remote import BUCKET, stored, upload, write_tars
from .run import run

CONTENDERS = ("ours", "webdataset+pil", "webdataset+simplejpeg", "litdata", "mosaicml-streaming")
CHUNK = 8 << 20


def samples_of(built: Path) -> list[dict[str, Any]]:
    dataset = open_dataset(built, "train")
    return [{"image": dataset.image_bytes(i), "text": dataset.captions(i)[0]} for i in range(len(dataset))]


def write_litdata(folder: Path, samples: list[dict[str, Any]]) -> None:
    writer = import_module("litdata.streaming.cache").Cache(str(folder), chunk_bytes=CHUNK)
    for number, sample in enumerate(samples):
        writer[number] = sample
    writer.done()
    writer.merge()


def write_mds(folder: Path, samples: list[dict[str, Any]]) -> None:
    columns = {"image": "bytes", "text": "str"}
    with import_module("streaming").MDSWriter(out=str(folder), columns=columns, size_limit=CHUNK) as writer:
        for sample in samples:
            writer.write(sample)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    for name, value in (("tars", 60), ("samples", 50), ("rounds", 7), ("batches", 4)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--delay", type=float, default=0.02)
    parser.add_argument("--out", type=Path, default=Path("build/bench"))
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="mvlm-peers-") as temporary:
        work = Path(temporary)
        (work / "tars").mkdir()
        paths = write_tars(work / "tars", given.tars, given.samples)
        samples = samples_of(work / "tars" / "built")
        with stored(work, paths, given.delay) as (port, _, _):
            os.environ["S3_ENDPOINT_URL"] = os.environ["AWS_ENDPOINT_URL"]  # as mosaicml-streaming calls it
            url = f"s3://{BUCKET}/{{00000..{given.tars - 1:05d}}}.tar"
            link_files([url], work / "linked", LinkOptions(parse_captions_option("txt")), workers=1)
            upload(port, list((work / "linked").iterdir()), "linked/")
            for name, write in (("litdata", write_litdata), ("mds", write_mds)):
                try:
                    write(work / name, samples)
                except ImportError as error:
                    print(f"{name}: {error}")
                    continue
                upload(port, [path for path in (work / name).iterdir() if path.is_file()], f"{name}/")
            data = Path(f"s3://{BUCKET}/linked")
            turns = {"rounds": given.rounds, "batches": given.batches, "threads": 1}
            for path in run(data, 1, given.out, CONTENDERS, ("crop",), json_file=given.json, **turns):
                print(path)


if __name__ == "__main__":
    main()
