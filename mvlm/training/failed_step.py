"""The first step of a run whose loss or gradient is not finite, kept in the run's folder so that it can be repeated.

    failed_step/
        microbatches/               rank_XXXXX.safetensors, the batches and masks of a rank, as its step saw them
        generators/                 rank_XXXXX.safetensors, states of a rank's random generators before the step
        model/  start/  optimizer/  safetensors before the step, as in a checkpoint; start with --keep-start
        config.json                 settings of the run
        state.json                  step and figures of it, what computed it, what was left out (`mvlm.schemas`)
        manifest.json               SHA-256 of all other files

An update that is not finite is not made, so weights and moments stay those before the step until the next update. The
host reads whether a step was finite when the next one's gradients are queued, before its update. So it waits for no
step that the device has not left behind, and nothing is copied while all steps are finite.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mvlm.config.json_files import config_json
from mvlm.config.pretrain import PretrainConfig
from mvlm.device import chosen_precision
from mvlm.distributed.collectives import HostNumbers
from mvlm.distributed.world import World
from mvlm.machine import describe_machine, package_versions
from mvlm.objectives.pretraining import KeepStart
from mvlm.runs.checkpoint import CONFIG, GENERATORS, MICROBATCHES, MODEL, OPTIMIZER, START, STATE, optimizer_tensors
from mvlm.runs.checkpoint_writer import CheckpointWriter
from mvlm.training.metrics import SkippedUpdates
from mvlm_dataloading import Batch, Masks

log = logging.getLogger(__name__)


class MadeStep(NamedTuple):
    """A step whose update was queued, and the state before it that repeats it."""

    step: int
    """Number of updates before this step."""
    microbatches: Sequence[tuple[Batch, Masks]]
    generators: dict[str, Tensor]
    """States of the random generators before this step (`mvlm.runs.checkpoint.generator_states`)."""
    values: dict[str, Tensor]
    """Losses and gradient norms, scalars on the device."""
    good: HostNumbers
    """On its way to the host: 1 if loss and gradient are finite on all ranks, else 0."""


class FailedStep:
    """Keeps the latest step in memory until it is known to be finite, and writes the first that is not to a folder.

    Args:
        folder: to be written for the failed step. It is not there yet.
        limit: most bytes of all its tensors.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        self._folder, self._limit = folder, limit
        self._made: MadeStep | None = None

    def keep(self, made: MadeStep) -> None:
        """Keep a step until `failed` is called."""
        self._made = made

    def failed(self) -> MadeStep | None:
        """The step that was kept, if it was not finite; all ranks get the same answer. Call it before another update.

        NOTE: after another update the weights are no longer those before the step.
        """
        made, self._made = self._made, None
        return made if made is not None and not made.good.read() else None

    def write(
        self,
        made: MadeStep,
        config: PretrainConfig,
        world: World,
        model: Any,
        optimizer: torch.optim.Optimizer,
        keep_start: KeepStart | None,
        samples: Sequence[str],
        writer: CheckpointWriter,
    ) -> None:
        """Write a failed step, on all ranks: they wait for a copy in memory, as for a checkpoint.

        samples: keys of this rank's samples.
        """
        parts = {MODEL: model.state_dict()} | ({} if keep_start is None else {START: keep_start.start.state_dict()})
        parts[OPTIMIZER] = optimizer_tensors(model, optimizer)
        batches = batch_tensors(made.microbatches)
        sizes = {MICROBATCHES: sum(world.gather_objects(_bytes(batches)))}
        sizes |= {part: _bytes(tensors) for part, tensors in parts.items()}
        left_out, room = {}, self._limit
        for part, size in sizes.items():
            if size > room:
                left_out[part] = size
            else:
                room -= size
        values = {name: repr(value.item()) for name, value in made.values.items()}
        state = {
            "step": made.step,
            "values": values,
            "samples": [key for keys in world.gather_objects(list(samples)) for key in keys],
            "frozen": [name for name, parameter in model.named_parameters() if not parameter.requires_grad],
            "left_out": left_out,
            "microbatches": len(made.microbatches),
            "precision": chosen_precision(world.device, config.precision),
            "machine": describe_machine(world.device, world.size),
            "versions": package_versions(),
        }
        writer.save_folder(
            self._folder,
            {part: tensors for part, tensors in parts.items() if part not in left_out},
            {GENERATORS: made.generators} | ({} if MICROBATCHES in left_out else {MICROBATCHES: batches}),
            {CONFIG: config_json(config), STATE: state},
        )
        if world.first:
            reason = SkippedUpdates.reason({name: float(value) for name, value in values.items()})
            without = f", without {' and '.join(f'{p} ({s / 1e6:.0f} MB)' for p, s in left_out.items())}"
            log.warning(
                "step %d: %s; its update was not made. The first such step of a run is kept in %s%s: mvlm replay %s",
                made.step + 1, reason, self._folder, without if left_out else "", self._folder,
            )  # fmt: skip


def _bytes(tensors: Mapping[str, Tensor]) -> int:
    """Total bytes of some tensors; of tensors that are sharded over ranks, the bytes of all shards."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def batch_tensors(microbatches: Sequence[tuple[Batch, Masks]]) -> dict[str, Tensor]:
    """Tensors of microbatches on the CPU, by name, such as "0/images"; a number is a tensor int64 ()."""
    found = {}
    for number, parts in enumerate(microbatches):
        for part in parts:
            for field in fields(part):
                value = getattr(part, field.name)
                if value is not None:
                    found[f"{number}/{field.name}"] = torch.as_tensor(value).cpu()
    return found
