"""Micro models, made-up batches, and small data sets on disk for the tests of `mvlm`.

The reference formulas here and in the tests are plain Python or numpy in float64, and share no code with the library.
"""

import hashlib
import io
import os
import resource
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from mvlm.config.model import MaskVLMConfig
from mvlm.config.pretrain import PretrainConfig
from mvlm.model.maskvlm import MaskVLM
from mvlm_dataloading import Batch, Dataset, Masks, ShardWriter, Tokenizer, open_dataset, tokenizer_for


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("gpu") and not (torch.cuda.is_available() and os.environ["TRITON_INTERPRET"] == "0"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device and TRITON_INTERPRET=0: run `make test-gpu`"))


MICRO: dict[str, Any] = {
    "image_size": 32,
    "patch_size": 8,
    "mask_block": 16,
    "width": 16,
    "heads": 2,
    "image_layers": 2,
    "text_layers": 2,
    "cross_layers": 2,
    "decoder_layers": 2,
    "vocab_size": 300,
    "mask_token_id": 4,
    "text_length": 12,
    "itc_width": 8,
    "image_mean": (0.5, 0.4, 0.3),
    "image_std": (0.5, 0.25, 0.2),
}
COLOURS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (30, 60, 220), "yellow": (230, 220, 40)}
PLACES = ("top left", "top right", "bottom left", "bottom right")
GROUNDS = {"white": (255, 255, 255), "black": (0, 0, 0)}
COUNTS = {"train": 32, "validation": 8, "test": 8}


def micro_config(**changes: Any) -> MaskVLMConfig:
    return MaskVLMConfig(**(MICRO | changes))


def micro_model(seed: int = 0, dtype: torch.dtype = torch.float64, **changes: Any) -> MaskVLM:
    """A micro model in which every parameter, biases and norms too, is drawn wide enough to matter."""
    model = MaskVLM(micro_config(**changes))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            if name == "log_scale":
                continue
            parameter.copy_((1 + 0.2 * noise if ".norm" in name and name.endswith("weight") else 0.3 * noise).float())
    return model.to(dtype)


def micro_batch(lengths: tuple[int, ...] = (7, 4, 12, 3, 9), seed: int = 0, config: MaskVLMConfig | None = None):
    """A made-up batch with captions of these lengths, and masks: half the patches, about a third of the words."""
    config = config or micro_config()
    rng = np.random.default_rng(seed)
    number, side = len(lengths), config.image_size
    starts = np.concatenate([[0], np.cumsum(lengths)])
    tokens = rng.integers(5, config.vocab_size, size=starts[-1])
    tokens[starts[:-1]] = 2
    tokens[starts[1:] - 1] = 3
    token_ids = []
    for start, length in zip(starts[:-1], lengths, strict=True):
        chosen = rng.choice(length - 2, size=max(1, round(0.3 * (length - 2))), replace=False)
        token_ids += sorted((start + 1 + chosen).tolist())
    patch_ids = [np.sort(rng.choice(config.num_patches, config.num_patches // 2, replace=False)) for _ in lengths]
    batch = Batch(
        images=torch.from_numpy(rng.integers(0, 256, size=(number, 3, side, side), dtype=np.uint8)),
        tokens=torch.from_numpy(tokens.astype(np.int64)),
        cu_seqlens=torch.from_numpy(starts.astype(np.int32)),
        max_length=max(lengths),
        image_id=torch.arange(number) + 100,
        text_id=torch.arange(number) + 200,
        sample_id=torch.arange(number),
    )
    return batch, Masks(patch_ids=torch.from_numpy(np.stack(patch_ids)), token_ids=torch.tensor(token_ids))


def png(pixels: np.ndarray) -> bytes:
    """uint8 (H, W, 3) or (H, W, 4) as a PNG file."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def scene(number: int, side: int = 32) -> tuple[np.ndarray, str]:
    """Scene 0 to 31: a square of one of four colours in one of four corners on white or black, and its caption."""
    colour = list(COLOURS)[number % 4]
    place = PLACES[number // 4 % 4]
    ground = list(GROUNDS)[number // 16 % 2]
    pixels = np.empty((side, side, 3), np.uint8)
    pixels[:] = GROUNDS[ground]
    half = side // 2
    top, left = (0 if "top" in place else half), (0 if "left" in place else half)
    pixels[top : top + half, left : left + half] = COLOURS[colour]
    return pixels, f"{colour} {place} on {ground}"


def write_scenes(folder: Path, counts: dict[str, int] | None = None, captions=None) -> Path:
    """Shards of scenes; every second picture has a further caption. `base` is the colour."""
    with ShardWriter(
        folder, name="scenes", source="made up for tests", licence="CC0", attribution="drawn by <nobody>", recipe={}
    ) as writer:
        for split, count in (counts or COUNTS).items():
            for i in range(count):
                pixels, caption = scene(i if split == "train" else 3 * i + 1)
                texts = captions(i) if captions else [caption, f"a square, {caption}"][: 1 + i % 2]
                reason = writer.add(f"{split}{i:03d}", png(pixels), texts, {"base": caption.split()[0]}, split=split)
                assert reason is None
    return folder


def pretrain_config(data: Path, out: Path, **changes: Any) -> PretrainConfig:
    """A run of a few steps of the micro model."""
    settings: dict[str, Any] = {
        "data": data,
        "out": out,
        "max_steps": 2,
        "batch_size": 8,
        "lr_encoder": 1e-3,
        "lr_cross": 2e-3,
        "lr_pixels": 3e-3,
        "warmup_steps": 2,
        "crop_scale": (0.5, 1.0),
        "device": "cpu",  # what is compared digit for digit is computed there
        "model": micro_config(),
    }
    return PretrainConfig(**(settings | changes))


def folder_hash(folder: Path) -> dict[str, tuple[str, int]]:
    """Every file under a folder: its contents' hash and when it was written."""
    return {
        str(path.relative_to(folder)): (hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_mtime_ns)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def checkpoint_contents(folder: Path) -> dict[str, Any]:
    """A checkpoint's texts, and bytes of its tensors; safetensors writes its own notes in any order."""
    found: dict[str, Any] = {path.name: path.read_text() for path in folder.glob("*.json") if path.stem != "manifest"}
    for path in sorted(folder.glob("*/*.safetensors")):
        for name, tensor in load_file(path).items():
            found[f"{path.parent.name}/{name}"] = (tensor.shape, tensor.numpy().tobytes())
    return found


def overwrite(dataset: Dataset, part: str, ids, content: bytes | None = None) -> None:
    """Damage the "image" or "text" of samples in place: fill them with zeros after 20 bytes, or with `content`."""
    for i in ids:
        where = getattr(dataset, part)
        with dataset.tars[dataset.shard[i]].open("r+b") as tar:
            size = int(where.size[i])
            tar.seek(where.offset[i] + (20 if content is None else 0))
            tar.write(bytes(size - 20) if content is None else content * size)
    for tar in dataset.tars:
        os.utime(tar.with_suffix(".idx"))


def uniform_of_pair(seed: int, step: int, stream: int, row: int, column: int) -> float:
    """The uniform number in (0, 1) behind the Gumbel noise of one pair, by SplitMix64 on Python's integers."""
    golden, mask = 0x9E3779B97F4A7C15, (1 << 64) - 1

    def mix(x: int) -> int:
        x &= mask
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
        return x ^ (x >> 31)

    key = mix(seed * golden + step * 0xBF58476D1CE4E5B9 + stream * 0x94D049BB133111EB)
    bits = mix(mix(key + row * golden) + column * golden)
    return ((bits >> 41) + 0.5) / 2**23


@pytest.fixture(scope="session")
def toys() -> SimpleNamespace:
    """The functions above, for the tests."""
    return SimpleNamespace(
        config=micro_config,
        model=micro_model,
        batch=micro_batch,
        png=png,
        scene=scene,
        write_scenes=write_scenes,
        pretrain_config=pretrain_config,
        folder_hash=folder_hash,
        contents=checkpoint_contents,
        overwrite=overwrite,
        uniform=uniform_of_pair,
    )


@pytest.fixture(scope="session")
def scenes(tmp_path_factory) -> Path:
    """A data set of 32 training, 8 validation and 8 test pictures. Read only."""
    return write_scenes(tmp_path_factory.mktemp("scenes") / "data")


@pytest.fixture(scope="session")
def train_split(scenes) -> Dataset:
    return open_dataset(scenes, "train")


@pytest.fixture(scope="session")
def heldout_split(scenes) -> Dataset:
    return open_dataset(scenes, "test")


@pytest.fixture(scope="session")
def tokenizer(train_split) -> Tokenizer:
    return tokenizer_for(train_split, MICRO["vocab_size"])


@pytest.fixture(scope="session")
def trained(tmp_path_factory, scenes) -> Path:
    """A run of two steps, with a checkpoint after each. Read only; `run_copy` is yours."""
    from mvlm.training.trainer import pretrain

    out = tmp_path_factory.mktemp("trained") / "run"
    pretrain(pretrain_config(scenes, out, checkpoint_every_steps=1))
    return out


@pytest.fixture
def run_copy(trained, tmp_path) -> Path:
    """A copy of the trained run, to be changed."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


@pytest.fixture
def file_limit():
    """A context in which no file may be longer than so many bytes: a full disk, by the system's own error."""

    @contextmanager
    def limited(length: int) -> Iterator[None]:
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (length, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    return limited


@pytest.fixture
def without_tensorboard(monkeypatch) -> None:
    """Runs that write no TensorBoard events, which take longer than the micro model's steps."""
    import mvlm.training.loggers

    class Board:
        def __init__(self, *_, **__): ...

        def add_scalar(self, *_): ...

        def add_image(self, *_, **__): ...

        def close(self): ...

    monkeypatch.setattr(mvlm.training.loggers, "SummaryWriter", Board)
