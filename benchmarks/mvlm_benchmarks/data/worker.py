"""The process of one loader, run by `process.LoaderProcess`.

    python -m mvlm_benchmarks.data.worker CONTENDER RECIPE DATA BATCH SIZE [THREADS]

Prints one line of JSON after the first batch. Then it reads numbers N from standard input; for each, it makes N batches
and prints another line.

All contenders yield normalised float32 images (B, 3, S, S), random crops (scale 0.2 to 1, ratio 3/4 to 4/3) resized
with antialiasing, and captions. Ours also yields tokens and masks.

    ours                    our `Loader`
    ours+kept               the same with decoded images kept in memory, for a split that is small enough
    pil                     PIL and torchvision's transforms in a DataLoader that reads the tars by offset
    decode_jpeg             the same with torchvision's decoder, `decode_image`, and its v2 transforms on tensors
    webdataset+pil          webdataset with PIL and torchvision's transforms
    webdataset+simplejpeg   webdataset with simplejpeg and torchvision's v2 transforms
    litdata                 litdata's streaming data set, of its own chunks in a store, with the same
    mosaicml-streaming      mosaicml-streaming's data set, of its own shards in a store, with the same
"""

import io
import json
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mvlm_benchmarks.unavailable import Missing, NotApplicable, one_line
from mvlm_dataloading import Dataset, open_dataset
from mvlm_dataloading.urls import is_remote, normal_url

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SCALE, RATIO = (0.2, 1.0), (3 / 4, 4 / 3)  # of the crops
KEEP_MB = 512
"""Memory for decoded images: the default of `mvlm pretrain`."""
RECIPES = ("crop", "crop+randaug")
CONTENDERS = (
    "ours",
    "ours+kept",
    "pil",
    "decode_jpeg",
    "webdataset+pil",
    "webdataset+simplejpeg",
    "litdata",
    "mosaicml-streaming",
)

Batches = Iterator[tuple[Tensor, Any]]
"""Images, float32 (B, 3, S, S), and captions; for ours the complete `Batch`."""


def ours(data: Path, recipe: str, batch: int, size: int, threads: int, keep_mb: int = 0) -> Batches:
    from mvlm_benchmarks.data.stages import our_loader

    loader = our_loader(data, recipe, batch, size, threads, keep_mb)
    mean, std = (torch.tensor(v).view(3, 1, 1) * 255 for v in (MEAN, STD))
    # In training the model normalises uint8 images on the GPU. Here the loader does, as the other contenders do, and on
    # one thread, as their workers do: a second thread of torch spins after each call and takes a core from the loader.
    # One buffer is reused, because fresh memory would cost more than the arithmetic.
    torch.set_num_threads(1)
    normalised = torch.empty(batch, 3, size, size)
    for images_and_text, _ in loader:
        normalised.copy_(images_and_text.images)
        yield torch.addcmul(-mean / std, normalised, 1 / std, out=normalised), images_and_text


def ours_kept(data: Path, recipe: str, batch: int, size: int, threads: int) -> Batches:
    from PIL import Image

    if is_remote(data):
        raise NotApplicable("nothing is kept of remote data")

    dataset = open_dataset(data, "train")
    megabytes = 0.0
    for i in range(len(dataset)):
        with Image.open(io.BytesIO(dataset.image_bytes(i))) as image:
            megabytes += 3e-6 * image.width * image.height
    if megabytes > KEEP_MB:
        raise NotApplicable(f"decoded images take {megabytes:.0f} MB, more than {KEEP_MB}")
    yield from ours(data, recipe, batch, size, threads, KEEP_MB)


def _pil_transform(recipe: str, size: int) -> Callable[[Any], Tensor]:
    from torchvision import transforms as t

    more = [t.RandAugment(2, 9)] if recipe == "crop+randaug" else []
    return t.Compose([t.RandomResizedCrop(size, SCALE, RATIO), *more, t.ToTensor(), t.Normalize(MEAN, STD)])


def _tensor_transform(recipe: str, size: int) -> Callable[[Any], Tensor]:
    from torchvision.transforms import v2 as t

    more = [t.RandAugment(2, 9)] if recipe == "crop+randaug" else []
    return t.Compose(
        [
            t.RandomResizedCrop(size, SCALE, RATIO, antialias=True),
            *more,
            t.ToDtype(torch.float32, scale=True),
            t.Normalize(MEAN, STD),
        ]
    )


class ShardDataset(torch.utils.data.Dataset):
    """Random access to samples of the shards, at the offsets in their indices. No unpacked copy is needed."""

    def __init__(self, dataset: Dataset, decode: Callable[[bytes], Any], transform: Callable[[Any], Tensor]):
        self.dataset, self.decode, self.transform = dataset, decode, transform

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, i: int) -> tuple[Tensor, str]:
        return self.transform(self.decode(self.dataset.image_bytes(i))), self.dataset.captions(i)[0]


def _in_data_loader(dataset: Any, batch: int, shuffle: bool, workers: int) -> Batches:
    loader = torch.utils.data.DataLoader(
        dataset, batch, shuffle=shuffle, num_workers=workers, drop_last=True, persistent_workers=True
    )
    while True:
        yield from loader


def pil(data: Path, recipe: str, batch: int, size: int, threads: int) -> Batches:
    dataset = open_dataset(data, "train")
    samples = ShardDataset(dataset, _decode_pil, _pil_transform(recipe, size))
    return _in_data_loader(samples, batch, True, threads)


def decode_jpeg(data: Path, recipe: str, batch: int, size: int, threads: int) -> Batches:
    dataset = open_dataset(data, "train")
    samples = ShardDataset(dataset, _decode_torchvision, _tensor_transform(recipe, size))
    return _in_data_loader(samples, batch, True, threads)


def webdataset_pil(data: Path, recipe: str, batch: int, size: int, threads: int) -> Batches:
    return _webdataset(data, _decode_pil, _pil_transform(recipe, size), batch, threads)


def webdataset_simplejpeg(data: Path, recipe: str, batch: int, size: int, threads: int) -> Batches:
    if not open_dataset(data, "train").image_bytes(0).startswith(b"\xff\xd8"):
        raise NotApplicable("simplejpeg decodes only JPEG")
    return _webdataset(data, _decode_simplejpeg, _tensor_transform(recipe, size), batch, threads)


def _webdataset(data: Path, decode: Callable, transform: Callable, batch: int, workers: int) -> Batches:
    try:
        webdataset: Any = import_module("webdataset")
    except ImportError:
        raise Missing("webdataset is not installed") from None
    dataset = open_dataset(data, "train")
    # webdataset assigns whole shards to workers. Fewer shards than workers are listed repeatedly, so that no worker
    # idles.
    tars = [str(tar) for tar in dataset.tars] if dataset.links is None else [one["tar"] for one in dataset.shards]
    tars *= workers if len(tars) < workers else 1
    if is_remote(data):
        import_module("webdataset.gopen").gopen_schemes["s3"] = (
            _open_s3  # by default it starts `aws s3 cp`, a process for each tar
        )
    samples = (
        webdataset.WebDataset(tars, shardshuffle=len(tars), seed=0, empty_check=False)
        .shuffle(1000)
        .to_tuple("jpg;jpeg;png;webp", "txt")
        .map_tuple(lambda image: transform(decode(image)), lambda text: text.decode())
    )
    return _in_data_loader(samples, batch, False, workers)


def _open_s3(url: str, mode: str, bufsize: int, **kwargs: Any) -> Any:
    """The content of a file as a stream, as webdataset's openers return it."""
    bucket, _, key = url.removeprefix("s3://").partition("/")
    return import_module("boto3").client("s3").get_object(Bucket=bucket, Key=key)["Body"]


def litdata(data: Path, recipe: str, batch: int, size: int, threads: int) -> Batches:
    """Batches of the chunks beside a remote index, in the folder `litdata`."""
    peer = _peer("litdata", data)
    # Its fast client refuses endpoints without TLS, and has no setting for that.
    import_module("litdata.streaming.downloader")._OBSTORE_CLIENT_OPTIONS["allow_http"] = "true"
    transform = _tensor_transform(recipe, size)
    samples = peer.StreamingDataset(
        beside(data, "litdata"), cache_dir=tempfile.mkdtemp(prefix="litdata-"), shuffle=True, seed=0,
        transform=lambda one: (transform(_decode_simplejpeg(one["image"])), one["text"]),
    )  # fmt: skip
    while True:
        yield from peer.StreamingDataLoader(samples, batch_size=batch, num_workers=threads, drop_last=True)


def mosaicml_streaming(data: Path, recipe: str, batch: int, size: int, threads: int) -> Batches:
    """Batches of the shards beside a remote index, in the folder `mds`."""
    peer = _peer("streaming", data)
    transform, base = _tensor_transform(recipe, size), peer.StreamingDataset

    class Samples(base):  # type: ignore[misc, valid-type]
        def __getitem__(self, i: int) -> Any:
            one = super().__getitem__(i)
            return transform(_decode_simplejpeg(one["image"])), one["text"]

    local = tempfile.mkdtemp(prefix="mds-")
    samples = Samples(remote=beside(data, "mds"), local=local, shuffle=True, batch_size=batch)
    loader = peer.StreamingDataLoader(samples, batch_size=batch, num_workers=threads, drop_last=True)
    while True:
        yield from loader


def _peer(package: str, data: Path) -> Any:
    if not is_remote(data):
        raise NotApplicable("reads its own files in a store")
    try:
        return import_module(package)
    except ImportError:
        raise Missing(f"{package} is not installed") from None


def beside(data: Path, name: str) -> str:
    """URL of a folder beside a remote one."""
    return f"{normal_url(data).rpartition('/')[0]}/{name}"


def _decode_pil(image: bytes) -> Any:
    from PIL import Image

    return Image.open(io.BytesIO(image)).convert("RGB")


def _decode_torchvision(image: bytes) -> Tensor:
    from torchvision.io import ImageReadMode, decode_image

    return decode_image(torch.frombuffer(bytearray(image), dtype=torch.uint8), ImageReadMode.RGB)


def _decode_simplejpeg(image: bytes) -> Tensor:
    import simplejpeg

    return torch.from_numpy(simplejpeg.decode_jpeg(image)).permute(2, 0, 1)


LOADERS: dict[str, Callable[..., Batches]] = dict(
    zip(
        CONTENDERS,
        (ours, ours_kept, pil, decode_jpeg, webdataset_pil, webdataset_simplejpeg, litdata, mosaicml_streaming),
        strict=True,
    )
)


def main(contender: str, recipe: str, data: str, batch: str, size: str, threads: str = "2") -> None:
    torch.set_num_threads(1)
    numbers = int(batch), int(size), int(threads)
    try:
        if contender.startswith("stage:"):
            from mvlm_benchmarks.data.stages import stage_batches

            batches = stage_batches(contender.removeprefix("stage:"), Path(data), recipe, *numbers)
        else:
            batches = LOADERS[contender](Path(data), recipe, *numbers)
        # The first batch starts threads and workers and fills caches.
        first = next(batches)
        if not contender.startswith("stage:"):
            _check_images(first[0], int(batch), int(size))
    except (ImportError, Missing, NotApplicable) as error:
        print(json.dumps({"status": "missing", "note": one_line(error)}), flush=True)
        return
    print(json.dumps({"status": "ok", "note": ""}), flush=True)
    for line in sys.stdin:
        started = time.perf_counter()
        for _ in range(int(line)):
            next(batches)
        seconds = time.perf_counter() - started
        print(json.dumps({"seconds": seconds, "rss_mb": _rss_mb()}), flush=True)


def _check_images(images: Tensor, batch: int, size: int) -> None:
    assert (images.dtype, tuple(images.shape)) == (torch.float32, (batch, 3, size, size))
    assert 0.3 < float(images.std()) < 3, "wanted normalised images"


def _rss_mb() -> float:
    """Megabytes of anonymous memory. Mapped pages of tars do not count, because the system may drop them."""
    match = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert match is not None
    return int(match[1]) * 1024 / 1e6


if __name__ == "__main__":
    np.random.seed(0)  # noqa: NPY002 (webdataset and torchvision draw from the global generators)
    torch.manual_seed(0)
    main(*sys.argv[1:])
