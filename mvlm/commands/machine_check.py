"""Findings of `mvlm doctor`: packages, devices, attention backends, disk, shards, memory and training speed."""

import hashlib
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import nullcontext
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from mvlm import waiting
from mvlm.config.finetune import FinetuneConfig
from mvlm.config.groups import RunConfig
from mvlm.config.model import MaskVLMConfig
from mvlm.config.pretrain import RECIPES, PretrainConfig, suggested_preset
from mvlm.device import has_fast_bf16, mean_seconds
from mvlm.distributed.world import World
from mvlm.errors import ConfigError, RunError, is_out_of_memory
from mvlm.model import attention_backends as backends
from mvlm.tasks import finetune
from mvlm.training import run as pretraining
from mvlm.training.metrics import memory_mb
from mvlm.training.warm_up import compile_in_processes
from mvlm_dataloading import DataError, open_dataset

SLOW_DISK_MB_PER_S = 50.0
FULL_PAIRS = 300_000
"""Training pairs from which docs/guides/own_model.md advises to train all weights of a pretrained encoder."""
TIMED_STEPS = 3


class Finding(NamedTuple):
    """One line of the report: green works, amber works at a cost, red does not work."""

    state: Literal["green", "amber", "red"]
    name: str
    text: str


def examine(preset: str, run: RunConfig | None, out: Path, device: torch.device) -> Iterator[Finding]:
    """Yield all findings as they are made. No file is left in `out`.

    Args:
        preset: preset of pretraining whose model's attention backends are reported.
        run: run to try, of pretraining or of fine-tuning. None: no trial.
    """
    yield versions()
    yield from graphics(device)
    yield from kernels(device)
    yield from attention(MaskVLMConfig.preset(preset), device)
    yield disk(out)
    if run is None:
        yield Finding("amber", "shards", "not checked: --data FOLDER checks them, and tries memory and speed")
        return
    found = shards(run.data)
    yield found
    if found.state == "red":
        return
    if isinstance(run, PretrainConfig):
        pairs = len(open_dataset(run.data, "train"))
        yield learning(run, pairs) or recipe(pairs)
    try:
        yield from trial(run, device)
    except (MemoryError, OSError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        yield Finding("red", "memory", f"a batch of {run.batch_size} does not fit; lower --batch-size")


def warm_up(preset: str, device: torch.device) -> Finding:
    """Compile the kernels of a step in processes of their own; red if one fails."""
    if device.type != "cuda":
        return Finding("amber", "kernels", "not compiled: there is no GPU, and a CPU runs torch")
    good, said = compile_in_processes(["--preset", preset], device)
    return Finding("green" if good else "red", "kernels", said)


def versions() -> Finding:
    """Versions of the packages that training needs; red if one is not installed."""
    have, lack = [], []
    for name, packages in (
        ("torch", ("torch",)),
        ("triton", ("triton",)),
        ("DALI", ("nvidia-dali-cuda130", "nvidia-dali-cuda120")),
        ("tokenizers", ("tokenizers",)),
        ("safetensors", ("safetensors",)),
    ):
        found = [version for package in packages if (version := package_version(package))]
        (have if found else lack).append(f"{name} {found[0]}" if found else name)
    if lack:
        return Finding("red", "packages", f"{', '.join(lack)} not installed: pip install 'mvlm[data,train]'")
    return Finding("green", "packages", ", ".join(have))


def package_version(package: str) -> str | None:
    """The version of an installed distribution; None if it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def graphics(device: torch.device) -> Iterator[Finding]:
    """The GPU with its driver, image decoder and attention kernels; fast bf16."""
    if device.type == "cuda":
        from mvlm_dataloading.loader.decoder_check import choose_decoding

        properties = torch.cuda.get_device_properties(device)
        driver = Path("/proc/driver/nvidia/version")
        release = driver.read_text().splitlines()[0] if driver.is_file() else "driver unknown"
        yield Finding(
            "green",
            "GPU",
            f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}, {release}",
        )
        decoding = choose_decoding(torch.cuda.current_device())
        state = "green" if decoding.value.startswith("gpu") else "amber"
        yield Finding(state, "image decoding", f"{decoding.value}, tried in a separate process")
        attention = torch.backends.cuda
        names = {"flash": attention.flash_sdp_enabled(), "cudnn": attention.cudnn_sdp_enabled()}
        names |= {"memory-efficient": attention.mem_efficient_sdp_enabled(), "math": attention.math_sdp_enabled()}
        yield Finding("green", "attention", f"torch may choose {', '.join(name for name, on in names.items() if on)}")
    else:
        why = "torch finds none" if not torch.cuda.is_available() else "not chosen"
        yield Finding(
            "amber",
            "GPU",
            f"none ({why}): {len(os.sched_getaffinity(0))} CPU cores, {torch.get_num_threads()} threads"
            + "".join(f"; {notice}" for notice in waiting.NOTICE),
        )
    fast = has_fast_bf16(device)
    yield Finding(
        "green" if fast else "amber",
        "bf16",
        "in hardware" if fast else "not in hardware here: --precision auto is fp32",
    )


def kernels(device: torch.device) -> Iterator[Finding]:
    """Backends of the fused ops for the shapes of `base`, with the reasons."""
    import mvlm_kernels as ops

    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    images = torch.zeros(2, 3, 224, 224, dtype=torch.uint8, device=device)
    ids = torch.arange(100, device=device).repeat(2, 1)
    pixels = torch.zeros(2, 100, 768, dtype=dtype, device=device)
    patches = torch.zeros(2, 196, 768, dtype=dtype, device=device)
    row = torch.zeros(768, dtype=dtype, device=device)
    weight = torch.zeros(768, 768, device=device)  # parameters are in fp32
    q, k = (torch.zeros(2, length, 12, 64, dtype=dtype, device=device) for length in (197, 40))
    embedded = torch.zeros(2, 256, dtype=dtype, device=device)
    packed = torch.zeros(2, 197, 3, 12, 64, dtype=dtype, device=device)
    angles = torch.zeros(197, 64, dtype=dtype, device=device)
    calls = {
        ops.add_layer_norm: (patches, patches, row, row),
        ops.contrastive_loss: (embedded, embedded, weight[0, 0]),
        ops.cross_attention: (q, k, k),
        ops.gather_patches: (images, ids, 16),
        ops.gelu_linear: (patches, weight, weight[0]),
        ops.masked_pixel_loss: (pixels, images, ids, 16),
        ops.place_tokens: (patches, row, torch.zeros(197, 768, dtype=dtype, device=device), row),
        ops.qk_norm_rope: (packed, angles, angles),
    }
    for op, arguments in calls.items():
        try:
            choice = ops.explain(op, *arguments)
        except ValueError as error:
            yield Finding("red", op.__name__, str(error))
            continue
        state = "green" if choice.backend == "triton" or device.type == "cpu" else "amber"
        yield Finding(state, op.__name__, f"{choice.backend}: {'; '.join(choice.reasons)}")


def attention(config: MaskVLMConfig, device: torch.device) -> Iterator[Finding]:
    """The attention backends that `auto` chooses in this model, with the reasons against the others."""
    dtype = torch.bfloat16 if has_fast_bf16(device) else torch.float32
    for name, choice in backends.choose_for_model(config, device, dtype).items():
        against = "; ".join(f"not {other}: {reason}" for other, reason in choice.reasons.items())
        yield Finding("green", f"{name} attention", f"{choice.backend}" + (f" ({against})" if against else ""))


def disk(out: Path) -> Finding:
    """Speed of synced writes on the disk of `out`, where checkpoints go."""
    try:
        folder = next(path for path in (out, *out.absolute().parents) if path.exists())
    except OSError as error:  # it lies in a folder that may not be searched
        return Finding("red", "disk", f"{out}: cannot be written to: {error}")
    if not folder.is_dir():
        return Finding("red", "disk", f"{folder}: wanted a folder for runs, found a file")
    content = os.urandom(2**20)
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            started = time.perf_counter()
            for _ in range(64):
                file.write(content)
            file.flush()
            os.fsync(file.fileno())
            speed = 64 * 2**20 / 1e6 / (time.perf_counter() - started)
    except OSError as error:
        return Finding("red", "disk", f"{folder}: cannot be written to: {error}")
    return Finding("green" if speed >= SLOW_DISK_MB_PER_S else "amber", "disk", f"{folder}: {speed:.0f} MB/s, synced")


def shards(data: Path | str) -> Finding:
    """Check that the data set opens and that its first shard has the hash of dataset.json."""
    try:
        first = open_dataset(data, "train")
        splits = {"train": first}
        if "validation" in first.description["splits"]:  # training does not need it
            splits["validation"] = open_dataset(data, "validation")
        wanted = first.description["splits"]["train"]["shards"][0]["sha256"]
        reading = nullcontext() if first.remote is None else first.remote.reading(0)
        with reading, first.tars[0].open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != wanted:
                return Finding("red", "shards", f"{first.tars[0]}: damaged: its sha256 is not that of dataset.json")
    except DataError as error:
        return Finding("red", "shards", str(error))
    counts = ", ".join(f"{len(dataset)} {split}" for split, dataset in splits.items())
    return Finding("green", "shards", f"{counts} pairs; the first shard's sha256 is that of dataset.json")


def recipe(pairs: int) -> Finding:
    """The preset that docs/guides/training.md advises for so many pairs from random weights, and its length."""
    preset = suggested_preset(pairs)
    settings = RECIPES[preset].settings
    steps, batch = settings["max_steps"], settings["batch_size"]
    epochs = steps * batch / pairs
    return Finding(
        "green",
        "recipe",
        f"for {pairs:,} pairs: mvlm pretrain {preset}, {steps:,} steps of {batch:,} pairs, {epochs:.2g} epochs of "
        "these data; docs/guides/training.md has its curve",
    )


def learning(run: PretrainConfig, pairs: int) -> Finding | None:
    """Finding on the learning rates of pretrained encoders: amber where docs/guides/own_model.md advises others.

    None for a run that starts from no pretrained weights.
    """
    starts = {"image": run.image_weights, "text": run.text_weights or run.text_tower}
    taught = [
        (part, getattr(run, f"lr_{part}"))
        for part, start in starts.items()
        if (start or run.initial_model) and getattr(run, f"train_{part}") == "full"
    ]
    if not taught and run.initial_model is None and not any(starts.values()):
        return None
    against = [f"--train-{part} full with {pairs:,} pairs: lora or frozen" for part, _ in taught if pairs < FULL_PAIRS]
    for part, own in taught:
        rate = run.lr_encoder if own is None else own
        if rate >= run.lr_cross:
            against.append(f"--lr-{part} {rate:g}, not below --lr-cross {run.lr_cross:g}: a tenth of it")
    if taught and run.optimizer == "muon":
        against.append("--optimizer muon, whose rate is for random weights: adamw")
    if against:
        return Finding("amber", "learning", f"{'; '.join(against)} would forget less (docs/guides/own_model.md)")
    return Finding("green", "learning", "as docs/guides/own_model.md advises for pretrained encoders")


def trial(run: RunConfig, device: torch.device) -> Iterator[Finding]:
    """Run a few steps of the loader alone and of the model alone, for memory, speed and the slower of the two."""
    kind: Any = finetune if isinstance(run, FinetuneConfig) else pretraining
    try:
        alone = World(rank=0, size=1, local_rank=0, device=device)
        trainer = kind.build_trainer(kind.open_inputs(run, alone), alone, "")
        batches = iter(trainer.loader)
        batch, masks = next(batches)
    except (ConfigError, DataError, RunError, ValueError, ImportError) as error:
        yield Finding("red", "trial", str(error))
        return
    micro = [(batch.to(device), masks.to(device))]

    def step() -> None:
        trainer.backward(micro, torch.zeros((), dtype=torch.int64, device=device))
        trainer.optimizer.step()
        trainer.optimizer.zero_grad(set_to_none=True)

    try:
        loader = run.batch_size / mean_seconds(lambda: next(batches), device, TIMED_STEPS)
        step()
        model = run.batch_size / mean_seconds(step, device, TIMED_STEPS)
    finally:
        trainer.loader.close()
    parameters = sum(p.numel() for p in trainer.model.parameters())
    kept, of = 4 * parameters, "weights and moments"
    kept += sum(value.nbytes for state in trainer.optimizer.state.values() for value in state.values())
    where = "of the process"
    if device.type == "cuda":  # on a CPU it is the memory at this moment, and the step has freed its gradients
        where, kept, of = "at the peak on the GPU", kept + 4 * parameters, "weights, gradients and moments"
    yield Finding(
        "green",
        "memory",
        f"{memory_mb(device):.0f} MB {where}, {kept / 1e6:.0f} MB of it {of} "
        f"({parameters / 1e6:.1f} M parameters), at {run.batch_size} pairs",
    )
    hours = run.max_steps * run.batch_size / min(loader, model) / 3600
    limit = "loader" if loader < model else "model"
    yield Finding(
        "amber" if limit == "loader" else "green",
        "speed",
        f"loader alone {loader:.0f} pairs/s, model alone {model:.0f} pairs/s: the {limit} is the limit; "
        f"{run.max_steps} steps would take about {hours:.1f} h",
    )
