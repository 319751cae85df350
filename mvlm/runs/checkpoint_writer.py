"""Saving while training goes on: the step waits for a copy in memory; a thread brings it to the disk."""

import itertools
import logging
import re
import shutil
import threading
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from mvlm.distributed.world import World
from mvlm.files import sha256, sync, write_json
from mvlm.model.maskvlm import MaskVLM
from mvlm.runs.checkpoint import FORMAT_VERSION, checkpoints, generator_states, step_of, write_tensors
from mvlm_dataloading import Tokenizer

log = logging.getLogger(__name__)


class SaveError(Exception):
    """A checkpoint that could not be written, on whatever rank."""


class CheckpointWriter:
    """Writes a run's checkpoints, one at a time.

    `save` copies everything to memory and returns; a thread of each rank then writes its part aside, forces it to the
    disk, and rank 0 renames the folder when all have. At most one is being written: the next `save` waits for it. One
    that fails, on whatever rank, is warned about; the run and its older checkpoints go on as they were.

    Args:
        keep: newest checkpoints to keep.
        keep_every_steps: checkpoints at multiples of it are kept for good; 0 for none.
    """

    def __init__(self, root: Path, world: World, keep: int, keep_every_steps: int = 0) -> None:
        self._root, self._world, self._keep, self._keep_every = root, world, keep, keep_every_steps
        # A group of its own: the thread's collectives must never fall between those of the step.
        self._group: Any = None
        if world.size > 1:
            self._group = dist.new_group(backend="gloo", timeout=timedelta(minutes=30))
        self._thread: threading.Thread | None = None
        self._buffers: dict[str, Tensor] = {}
        self._refused: list[Path] = []
        self.newest: Path | None = None
        """The newest checkpoint that was finished."""
        self.failed = 0
        """Saves that came to nothing."""

    def resume_from(self, checkpoint: Path) -> None:
        """The run goes on from this one: newer ones were refused as damaged, and the next save sets them aside."""
        self.newest = checkpoint
        self._refused = [path for path in checkpoints(self._root) if step_of(path) > step_of(checkpoint)]

    def save(
        self,
        step: int,
        model: MaskVLM,
        parts: dict[str, dict[str, Tensor]],
        state: dict[str, Any],
        tokenizer: Tokenizer,
    ) -> None:
        """Begin to write root/step_XXXXXXXX.

        `parts` are folders of tensors by name, on any device, the same names on every rank; `state` is ready for JSON.
        """
        self.wait()
        copies = {f"{part}/{name}": tensor for part, tensors in parts.items() for name, tensor in tensors.items()}
        copies = self._copy(copies)
        split = {part: {name: copies[f"{part}/{name}"] for name in tensors} for part, tensors in parts.items()}
        generators = generator_states(self._world.device)
        arguments = (step, split, generators, model.config.to_dict(), state, tokenizer)
        self._thread = threading.Thread(target=self._write, args=arguments, name=f"save-{step}", daemon=True)
        self._thread.start()

    def path(self, step: int) -> Path:
        """Where the checkpoint of a step is or would be."""
        return self._root / f"step_{step:08d}"

    def wait(self) -> None:
        """Wait until the checkpoint that is being written is finished or has failed."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def __enter__(self) -> "CheckpointWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # After an error another rank may be gone, and the thread would wait for it.
        if kind is None or self._group is None:
            self.wait()

    def _copy(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Copies in memory, in buffers that the next save uses again, pinned where the tensors come from a GPU."""
        copies = {}
        for name, tensor in tensors.items():
            if isinstance(tensor, DTensor):  # its copy has to stay one, so that each rank writes its own shard
                copies[name] = tensor.detach().to("cpu", copy=True)
                continue
            if name not in self._buffers:
                self._buffers[name] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            copies[name] = self._buffers[name].copy_(tensor.detach(), non_blocking=True)
        if self._world.device.type == "cuda":
            torch.cuda.current_stream().synchronize()
        return copies

    def _write(self, step: int, parts, generators, model_config, state, tokenizer: Tokenizer) -> None:
        """What the thread does: four stages, each begun when every rank has ended the one before without an error."""
        if self._world.device.type == "cuda":
            # A thread begins on GPU 0, where DCP would then make a context of every rank.
            torch.cuda.set_device(self._world.device)
        final = self.path(step)
        aside = final.with_suffix(".tmp")
        texts = {"model.json": model_config, "state.json": {"step": step, **state}}
        try:
            self._together(lambda: self._prepare(aside))
            self._together(lambda: self._write_parts(aside, parts))
            digests = self._together(lambda: self._write_own(aside, generators, texts, tokenizer))
            self._together(lambda: self._finish(aside, final, digests))
        except SaveError as error:
            self.failed += 1
            if self._world.first:
                shutil.rmtree(aside, ignore_errors=True)
                log.warning("could not save %s: %s; training goes on, older checkpoints stay", final, error)
        else:
            self.newest = final

    def _together(self, work: Callable[[], Any]) -> list[Any]:
        """Do `work`; returns what it returned on every rank. SaveError on all of them if it failed on one."""
        value, error = None, None
        try:
            value = work()
        except Exception as caught:
            error = f"{type(caught).__name__}: {caught}"
        try:
            everyone = self._world.gather_objects({"value": value, "error": error}, self._group)
        except Exception as caught:  # a rank is gone; the step will find out as well
            raise SaveError(error or f"lost a rank: {caught}") from None
        errors = [found["error"] for found in everyone if found["error"] is not None]
        if errors:
            raise SaveError(errors[0])
        return [found["value"] for found in everyone]

    def _prepare(self, aside: Path) -> None:
        if self._world.first:
            shutil.rmtree(aside, ignore_errors=True)
            (aside / "generators").mkdir(parents=True)

    def _write_parts(self, aside: Path, parts: dict[str, dict[str, Tensor]]) -> None:
        for part, tensors in parts.items():
            write_tensors(aside / part, tensors, self._group)

    def _write_own(self, aside: Path, generators, texts: dict[str, Any], tokenizer: Tokenizer) -> dict[str, str]:
        """The rest of a rank's files, rank 0's texts among them. Returns the sha256 of all that are this rank's."""
        rank = self._world.rank
        save_file(generators, aside / "generators" / f"rank_{rank:05d}.safetensors")
        if self._world.first:
            for name, value in texts.items():
                write_json(aside / name, value)
            tokenizer.save(aside / "tokenizer.json")
        own = [*aside.glob(f"*/shard-{rank + 1:05d}-*"), *aside.glob(f"generators/rank_{rank:05d}.*")]
        own += aside.glob("*.json") if self._world.first else []
        for path in own:
            sync(path)
        return {str(path.relative_to(aside)): sha256(path) for path in own}

    def _finish(self, aside: Path, final: Path, digests: list[dict[str, str]]) -> None:
        """Rank 0 makes the folder a checkpoint, in one rename."""
        if not self._world.first:
            return
        named = dict(sorted(item for part in digests for item in part.items()))
        manifest = {"format_version": FORMAT_VERSION, "world_size": self._world.size, "sha256": named}
        write_json(aside / "manifest.json", manifest)
        for path in [aside / "manifest.json", *(p for p in aside.iterdir() if p.is_dir()), aside]:
            sync(path)
        # Left where they are, they would be kept in the place of whole ones.
        for path in self._refused:
            if path.exists():
                set_aside(path)
        self._refused = []
        shutil.rmtree(final, ignore_errors=True)
        aside.rename(final)
        sync(self._root)
        for rest in self._root.glob("step_*.tmp"):  # of a save that a kill cut short
            if re.fullmatch(r"step_\d{8,}\.tmp", rest.name):
                shutil.rmtree(rest, ignore_errors=True)
        remove_old_checkpoints(self._root, self._keep, self._keep_every)


def set_aside(path: Path) -> None:
    """Rename a damaged checkpoint, so that it counts as one no more and nothing of it is lost."""
    names = (path.with_suffix(f".damaged{number}") for number in itertools.count(1))
    aside = path.rename(next(name for name in names if not name.exists()))
    log.warning("the damaged checkpoint is now %s; remove it when nothing in it is of use", aside)


def remove_old_checkpoints(root: Path, keep: int, keep_every_steps: int = 0) -> None:
    """Keep the newest `keep` checkpoints and those at multiples of `keep_every_steps`.

    One that goes is renamed first, so that no kill leaves half of it to be taken for a checkpoint. A folder that cannot
    be removed is only warned about.
    """
    for path in checkpoints(root)[:-keep]:
        if keep_every_steps and step_of(path) % keep_every_steps == 0:
            continue
        try:
            shutil.rmtree(path.rename(path.with_suffix(".tmp")))
        except OSError as error:
            log.warning("could not remove the old checkpoint %s: %s", path, error)
