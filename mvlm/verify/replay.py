"""A failed step of a run, made again from its folder, and the first op of it whose output is not finite.

`mvlm.training.failed_step` writes the folder, which may come from others. It needs neither the run nor its data.
"""

import logging
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import MISSING, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mvlm.config.json_files import read_config, run_config
from mvlm.config.model import MaskVLMConfig
from mvlm.config.pretrain import PretrainConfig
from mvlm.device import deterministic_kernels
from mvlm.distributed.coordination import run_on_all_ranks
from mvlm.distributed.parallel import checkpoint_activations, compile_step, parallelize
from mvlm.distributed.world import World
from mvlm.errors import RunError
from mvlm.files import check_folder, read_safetensors
from mvlm.machine import describe_machine, package_versions
from mvlm.model.adaptation import adapt, unmerged
from mvlm.model.maskvlm import MaskVLM
from mvlm.model.pretrained import check_sizes
from mvlm.objectives.pretraining import KeepStart, objectives_of
from mvlm.runs.checkpoint import (
    CONFIG,
    GENERATORS,
    MICROBATCHES,
    MODEL,
    START,
    STATE,
    rank_file,
    read_folder_shapes,
    read_tensors,
    set_generators,
    verify_checkpoint,
)
from mvlm.schemas import FailedStepState
from mvlm.training.metrics import gradient_norms
from mvlm.training.own_code import own_objective, with_hashes, with_named
from mvlm.training.run import gathered_dtype
from mvlm.training.trainer import losses_and_gradients
from mvlm.untrusted import read_json
from mvlm.verify.not_finite import FirstNotFinite, NotFinite
from mvlm.verify.verify import ALIKE, threads
from mvlm_dataloading import Batch, Masks

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Replayed:
    """Result of making a failed training step again."""

    step: int
    """Number of the step, from 1."""
    samples: list[str]
    """Keys of its samples, on all ranks."""
    differences: dict[str, tuple[str, str]]
    """(the run's value, the replayed value) of each loss and gradient norm that is not bitwise equal, by name."""
    recorded: dict[str, str]
    """Losses and gradient norms of the run."""
    found: dict[int, NotFinite]
    """First op of each rank whose output is not finite. A rank is missing if all is finite there.

    Also missing are ranks that only received such values, if another rank has made them.
    """


def replay(folder: Path, world: World, own_loss: str | None = None) -> Replayed:
    """Make a failed step again, on all ranks.

    Its microbatches are dealt out to the ranks that there are. Bits are those of the run with its number of ranks, on
    a machine like the run's.

    own_loss: the run's own loss, named again: its file is run. A run's own masks are in its microbatches.

    RunError if the folder is damaged, is no failed step, or lacks what the step needs.
    """
    kept = run_on_all_ranks(world, lambda: KeptStep(folder, own_loss))
    step = run_on_all_ranks(world, lambda: kept.build(world))
    with threads(kept.state["machine"]["threads"]):
        values = step()
        # Compiled code has no ops to look at; its sums may round otherwise, so it is not this pass that is compared.
        with torch.compiler.set_stance("force_eager"), FirstNotFinite(kept.model) as finder:
            step()
    recorded = kept.state["values"]
    pairs = {name: (value, repr(values[name].item())) for name, value in recorded.items() if name in values}
    own = finder.found
    by_rank = world.gather_objects(None if own is None else vars(own))
    found = {rank: NotFinite(**of) for rank, of in enumerate(by_rank) if of is not None}
    return Replayed(
        kept.state["step"] + 1,
        kept.state["samples"],
        {name: pair for name, pair in pairs.items() if pair[0] != pair[1]},
        recorded,
        {rank: op for rank, op in found.items() if not op.came_in} or found,
    )


class KeptStep:
    """Folder of a failed step: its files, verified, and its model once it is built."""

    model: MaskVLM

    def __init__(self, folder: Path, own_loss: str | None) -> None:
        check_folder(folder, "the folder of a failed step")
        self._folder = folder
        verify_checkpoint(folder, (CONFIG, STATE, GENERATORS))
        self.state: dict[str, Any] = read_json(folder / STATE, "state", "the state of a failed step", FailedStepState)
        for part, what in ((MICROBATCHES, "microbatches"), (MODEL, "weights"), (START, "weights of its start")):
            if part in self.state["left_out"]:
                raise RunError(
                    f"{folder}: wanted the {what} of the step, found them left out, as they have "
                    f"{self.state['left_out'][part] / 1e6:.0f} MB; raise failed_step_mb in the run's config.json"
                )
        values = read_config(folder / CONFIG)
        if "task" in values:
            raise RunError(f"{folder / CONFIG}: wanted the settings of a pretraining run, found those of fine-tuning")
        config = with_named(run_config(values, str(folder / CONFIG)), folder, {"own_loss": own_loss})
        with_hashes(replace(config, own_masks=None))
        self.config: PretrainConfig = replace(config, precision=self.state["precision"])
        self.stage = self.config.model_at(self.state["step"])
        """Settings of the model in the stage of the step."""

    def build(self, world: World) -> Callable[[], dict[str, Tensor]]:
        """Read the model and this rank's microbatches. Returns the step: losses and gradient norms by name."""
        config, folder, state = self.config, self._folder, self.state
        ranks, each = state["machine"]["ranks"], state["microbatches"]
        total = ranks * each
        if total % world.size or (config.batch_size % total):
            raise RunError(
                f"{folder}: wanted ranks that share its {total} microbatches evenly, got {world.size}; start it by "
                f"torchrun --nproc-per-node {ranks} -m mvlm replay {folder}"
            )
        here = describe_machine(world.device, world.size) | package_versions()
        there = state["machine"] | state["versions"]
        if other := [n for n in (*ALIKE, *state["versions"]) if here.get(n) != there.get(n)]:
            log.warning(
                "%s was written with the %s %s, here it is %s: bits may differ",
                folder, other[0], there[other[0]], here.get(other[0]),
            )  # fmt: skip
        self.model = model = self._read_model(MODEL).to(world.device)
        adapt_frozen(model, state["frozen"], folder / STATE)
        start = None
        if config.keep_start:
            start = KeepStart(config.keep_start, start=self._read_model(START).to(world.device).requires_grad_(False))
        # Microbatch a of rank r is number a W + r of the global batch, for any number W of ranks.
        mine = range(world.rank, total, world.size)
        microbatches = [self._read_microbatch(number % ranks, number // ranks, world) for number in mine]
        if config.capture == "compile":
            compile_step(model, world, len(mine), config.checkpoint_activations)
        if config.checkpoint_activations:
            checkpoint_activations(model)
        parallel = parallelize(model, world, config.parallel, gathered=gathered_dtype(config, world))
        number: Any = state["step"]
        if config.fixed_shapes:
            number = torch.full((), state["step"], device=world.device)
        objectives = objectives_of(config) + (() if start is None else (start,)) + own_objective(config)

        def step() -> dict[str, Tensor]:
            model.zero_grad(set_to_none=True)
            set_generators(folder, world.rank, world.device)
            with (
                deterministic_kernels(world.device) if config.deterministic else nullcontext(),
                model.at(self.stage),
                nullcontext() if start is None else start.start.at(self.stage),
            ):
                losses = losses_and_gradients(parallel, microbatches, world, config, objectives, number)
                norm, parts = gradient_norms(model)
            return {**losses, "grad_norm": norm} | {f"grad_norm_{name}": value for name, value in parts.items()}

        return step

    def _read_model(self, part: str) -> MaskVLM:
        """The model with the weights of a part. RunError if they are not those of its settings."""
        config, weights = self.config, self._folder / part
        check_sizes(config.model, unmerged(read_folder_shapes(weights)), self._folder / CONFIG, weights)
        model = MaskVLM(config.model)
        model.set_attention(config.self_attention, config.cross_attention)
        if part == MODEL:
            adapt(model, config)
        read_tensors(weights, model.state_dict())
        return model

    def _read_microbatch(self, rank: int, number: int, world: World) -> tuple[Batch, Masks]:
        """A microbatch of a rank of the run, on this rank's device. RunError for one that no loader makes."""
        file = self._folder / MICROBATCHES / rank_file(rank)
        if not file.is_file():
            raise RunError(f"{file}: wanted the microbatches of rank {rank}, found no such file; restore it")
        prefix = f"{number}/"
        tensors = {n.removeprefix(prefix): t for n, t in read_safetensors(file).items() if n.startswith(prefix)}
        try:
            batch, masks = (_from_tensors(kind, tensors) for kind in (Batch, Masks))
            pairs = self.config.batch_size // (self.state["machine"]["ranks"] * self.state["microbatches"])
            check_microbatch(batch, masks, self.stage, pairs, self.config.own_masks is not None)
        except (ValueError, KeyError, RuntimeError, IndexError) as error:
            raise RunError(f"{file}: wanted a batch of the run, found another ({error}); restore it") from None
        return batch.to(world.device), masks.to(world.device)


def adapt_frozen(model: MaskVLM, names: list[str], where: Path) -> None:
    """Freeze the parameters of these names and let all others learn, in place. RunError if there is no such parameter.

    where: file that names them, for the error.
    """
    parameters = dict(model.named_parameters())
    if unknown := set(names) - parameters.keys():
        raise RunError(f"{where}: wanted names of parameters as frozen, found {min(unknown)}; restore it")
    for name, parameter in parameters.items():
        parameter.requires_grad_(name not in names)


def _from_tensors(kind: Any, tensors: dict[str, Tensor]) -> Any:
    """Make a `Batch` or `Masks` from its fields as tensors, as `mvlm.training.failed_step.batch_tensors` gives them.

    ValueError if a field without a default is missing.
    """
    values = {}
    for field in fields(kind):
        if field.name in tensors:
            tensor = tensors[field.name]
            values[field.name] = int(tensor) if field.type is int else tensor
        elif field.default is MISSING:
            raise ValueError(f"no {field.name}")
    return kind(**values)


def check_microbatch(batch: Batch, masks: Masks, model: MaskVLMConfig, pairs: int, own_masks: bool) -> None:
    """Raise ValueError if a loader could not have made a batch of `pairs` pairs of such shapes, dtypes and indices.

    own_masks: a user's function drew the masks, of any number of patches.
    """
    side, length, tokens = model.image_size, len(batch.tokens), model.text_length
    masked = masks.patch_ids.shape[-1] if own_masks else model.masked_patches
    wanted: dict[str, tuple[Tensor, torch.dtype, tuple[int, ...]]] = {
        "images": (batch.images, torch.uint8, (pairs, 3, side, side)),
        "tokens": (batch.tokens, torch.int64, (length,)),
        "cu_seqlens": (batch.cu_seqlens, torch.int32, (pairs + 1,)),
        **{n: (getattr(batch, n), torch.int64, (pairs,)) for n in ("image_id", "text_id", "sample_id")},
        "patch_ids": (masks.patch_ids, torch.int64, (pairs, masked)),
        "token_ids": (masks.token_ids, torch.int64, (len(masks.token_ids),)),
    }
    for name, (tensor, dtype, shape) in wanted.items():
        if tensor.dtype != dtype or tuple(tensor.shape) != shape:
            raise ValueError(f"{name}: wanted {dtype} {shape}, got {tensor.dtype} {tuple(tensor.shape)}")
    lengths = batch.cu_seqlens.diff()
    if batch.cu_seqlens[0] != 0 or batch.cu_seqlens[-1] > length or not (1 <= lengths.min() <= lengths.max() <= tokens):
        raise ValueError("cu_seqlens: wanted captions one behind the other")
    if not lengths.max() <= batch.max_length <= tokens:
        raise ValueError(f"max_length: wanted {lengths.max()} to {tokens}, got {batch.max_length}")
    within = {
        "tokens": (batch.tokens, model.vocab_size),
        "patch_ids": (masks.patch_ids, model.num_patches),
        "token_ids": (masks.token_ids, length),
    }
    for name, (tensor, end) in within.items():
        if tensor.numel() and (tensor.min() < 0 or tensor.max() >= end):
            raise ValueError(f"{name}: wanted numbers from 0 to {end - 1}")
    if batch.image_of is not None or batch.caption_of is not None:
        raise ValueError("image_of: wanted a batch of pairs")
