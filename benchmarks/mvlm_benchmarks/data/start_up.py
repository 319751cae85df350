"""Time to the first batch of a data set with a million samples.

    python -m mvlm_benchmarks.data.start_up FOLDER

`build` writes tars of 50 small images each, whose indices list every image many times. The command prints the seconds
for opening the data, making the loader and getting the first batch. Imports do not count.
"""

import hashlib
import json
import sys
import time
from importlib import import_module
from pathlib import Path

import numpy as np

SHARDS = 200
IMAGES_PER_SHARD = 50


def write_images(folder: Path) -> tuple[bytes, list[str]]:
    """Write IMAGES_PER_SHARD small images as a data set. Returns its only tar, and the lines of its DALI index."""
    import io

    from PIL import Image

    from mvlm_dataloading import ShardWriter

    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(file, "JPEG")
    with ShardWriter(folder, name="start", source="", licence="", attribution="", recipe={}) as writer:
        for i in range(IMAGES_PER_SHARD):
            writer.add(f"{i:09d}", file.getvalue(), [f"a caption of sample {i}"], {"image_id": i})
    return (folder / "train-000000.tar").read_bytes(), (folder / "train-000000.idx").read_text().splitlines()[1:]


def build(folder: Path, samples: int) -> None:
    """Write the data set: SHARDS tars, whose indices have `samples` lines in total."""
    from mvlm_dataloading.tools.reindex import rebuild_indices

    tar, lines = write_images(folder.with_name(f"{folder.name}.one"))
    folder.mkdir(parents=True)
    count = samples // SHARDS
    repeated = "\n".join([f"v1.2 {count}", *(lines[k % IMAGES_PER_SHARD] for k in range(count))]) + "\n"
    shards = []
    for number in range(SHARDS):
        name = f"train-{number:06d}"
        (folder / f"{name}.tar").write_bytes(tar)
        (folder / f"{name}.idx").write_text(repeated)
        digest = hashlib.sha256(tar).hexdigest()
        shards.append({"tar": f"{name}.tar", "samples": count, "bytes": len(tar), "sha256": digest})
    splits = {"train": {"samples": count * SHARDS, "captions": count * SHARDS, "shards": shards}}
    (folder / "dataset.json").write_text(json.dumps({"format_version": 1, "splits": splits}))
    rebuild_indices(folder, without_tars=True)


def seconds_to_first_batch(folder: Path, batch: int = 64) -> dict[str, float]:
    """Seconds to open the data, to make the loader and to get the first batch; their sum; and processor time."""
    from mvlm_dataloading import Loader, open_dataset, train_tokenizer
    from mvlm_dataloading.loader.augment import Augment

    tokenizer = train_tokenizer(["a caption of sample 1"], 300)
    import_module("nvidia.dali.fn")
    import_module("torch")
    times, spent = [time.perf_counter()], time.process_time()
    dataset = open_dataset(folder, "train")
    times.append(time.perf_counter())
    loader = Loader(
        dataset, tokenizer, batch_size=batch, image_size=224, text_length=40, seed=0, augment=Augment(operations=2)
    )
    times.append(time.perf_counter())
    next(iter(loader))
    times.append(time.perf_counter())
    spent = time.process_time() - spent
    loader.close()
    seconds = dict(zip(("open_s", "make_s", "first_batch_s"), np.diff(times).tolist(), strict=True))
    return {"samples": len(dataset), **seconds, "start_s": times[-1] - times[0], "cpu_s": spent}


if __name__ == "__main__":
    print(json.dumps(seconds_to_first_batch(Path(sys.argv[1]))))
