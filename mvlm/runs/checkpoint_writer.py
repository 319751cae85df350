"""Asynchronous checkpoints: a step waits for a copy in memory, and a thread writes the copy to the disk."""

import logging
import re
import shutil
import threading
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from mvlm.distributed.world import World
from mvlm.files import sort_metadata, write_safetensors
from mvlm.runs.checkpoint import (
    FORMAT_VERSION,
    GENERATORS,
    MANIFEST,
    MODEL_CONFIG,
    STATE,
    TOKENIZER,
    checkpoint_name,
    checkpoints,
    generator_states,
    rank_file,
    set_aside,
    step_of,
    write_tensors,
)
from mvlm.runs.history import History
from mvlm.runs.mirror import Mirror
from mvlm_dataloading import Tokenizer
from mvlm_dataloading.files import place_folder, sha256, sync, write_json

log = logging.getLogger(__name__)


class SaveError(Exception):
    """A checkpoint could not be written, on one rank or several."""


class CheckpointWriter:
    """Writes a run's checkpoints, one at a time.

    `save` copies everything to memory and returns. A thread of each rank then writes its part to a temporary folder
    and forces it to the disk. When all ranks have finished, rank 0 renames the folder. The next `save` waits for the
    previous one. If a save fails on any rank, rank 0 logs a warning, and older checkpoints stay. The trainer raises
    RunError if the run's last save failed.

    Args:
        keep: number of newest checkpoints to keep; 0 for all.
        history: history of the run, in which rank 0 notes each checkpoint before it is there.
    """

    def __init__(self, root: Path, world: World, keep: int, history: History | None = None) -> None:
        self._root, self._world, self._keep = root, world, keep
        self._history = history if world.first else None
        # NOTE: the thread needs a group of its own. On the step's group its collectives could come between the step's,
        # in another order on each rank, and both would wait for ever.
        self._group: Any = None
        if world.size > 1:
            self._group = dist.new_group(backend="gloo", timeout=timedelta(minutes=30))
        self._thread: threading.Thread | None = None
        self._buffers: dict[tuple[str, str], Tensor] = {}
        self._refused: list[Path] = []
        self.newest: Path | None = None
        """The newest checkpoint that was finished."""
        self.failed = 0
        """Number of saves that failed."""
        self.mirror: Mirror | None = None
        """Copies of the checkpoints in an object store, if rank 0 makes some."""
        self.finished: Callable[[Path], object] = lambda checkpoint: None
        """Called with each finished checkpoint, in the thread that wrote it."""

    def resume_from(self, checkpoint: Path) -> None:
        """Note the checkpoint that the run continues from.

        Newer checkpoints in the folder could not be resumed: they are damaged, or rows of metrics are missing. The next
        save renames them.
        """
        self.newest = checkpoint
        self._refused = [path for path in checkpoints(self._root) if step_of(path) > step_of(checkpoint)]

    def save(
        self,
        step: int,
        model: Any,
        parts: dict[str, dict[str, Tensor]],
        state: dict[str, Any],
        tokenizer: Tokenizer,
    ) -> None:
        """Start to write root/step_XXXXXXXX.

        `parts` are folders of tensors by name, on any device, with the same names on every rank. `state` is plain JSON.
        `model.config` is written too.
        """
        self.wait()
        generators = {GENERATORS: generator_states(self._world.device)}
        length = self._history.metrics_bytes() if self._history is not None else 0  # of now: training goes on
        texts = {MODEL_CONFIG: model.config.to_dict(), STATE: {"step": step, **state}}
        self._start(_Contents(self.path(step), self._copies(parts), generators, texts, tokenizer, length))

    def save_folder(
        self,
        folder: Path,
        parts: dict[str, dict[str, Tensor]],
        own: dict[str, dict[str, Tensor]],
        texts: dict[str, Any],
    ) -> None:
        """Start to write a new folder that has the form of a checkpoint but is none, such as that of a failed step.

        Args:
            parts: as for `save`.
            own: folders of the tensors of this rank alone, on the CPU. Nobody may change them.
            texts: plain JSON by file name.
        """
        self.wait()
        self._start(_Contents(folder, self._copies(parts), own, texts))

    def path(self, step: int) -> Path:
        """Path of the checkpoint of a step, whether it exists or not."""
        return self._root / checkpoint_name(step)

    def wait(self) -> None:
        """Wait until the checkpoint that is being written is finished or has failed."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def __enter__(self) -> "CheckpointWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # NOTE: no wait after an error. Another rank may be gone, and the thread waits for it. A second Ctrl-C waits for
        # nothing.
        if kind is None or (self._group is None and not issubclass(kind, KeyboardInterrupt)):
            self.wait()

    def _start(self, contents: "_Contents") -> None:
        name = f"save-{contents.folder.name}"
        self._thread = threading.Thread(target=self._write, args=(contents,), name=name, daemon=True)
        self._thread.start()

    def _copies(self, parts: dict[str, dict[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
        """Copy parts to the host, and wait for the device to finish."""
        copies = {part: self._copy(part, tensors) for part, tensors in parts.items()}
        if self._world.device.type == "cuda":
            torch.cuda.current_stream().synchronize()
        return copies

    def _copy(self, part: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Copy tensors to the host, into buffers that every save reuses. Copies from a GPU may still be on the way."""
        copies = {}
        for name, tensor in tensors.items():
            if isinstance(tensor, DTensor):  # the copy must stay a DTensor, so that each rank writes its own shard
                copies[name] = tensor.detach().to("cpu", copy=True)
                continue
            if (part, name) not in self._buffers:
                self._buffers[part, name] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            copies[name] = self._buffers[part, name].copy_(tensor.detach(), non_blocking=True)
        return copies

    def _write(self, contents: "_Contents") -> None:
        """Write a folder in four stages, each of which starts when every rank has finished the one before."""
        final, aside = contents.folder, contents.folder.with_suffix(".tmp")
        try:
            self._on_all_ranks(lambda: self._prepare(aside, contents))
            self._on_all_ranks(lambda: self._write_parts(aside, contents.parts))
            digests = self._on_all_ranks(lambda: self._write_own(aside, contents))
            self._on_all_ranks(lambda: self._finish(aside, contents, digests))
        except SaveError as error:
            self.failed += 1
            if self._world.first:
                shutil.rmtree(aside, ignore_errors=True)
                log.warning("could not save %s: %s; training continues, older checkpoints are unchanged", final, error)
        else:
            if contents.is_checkpoint:
                self.newest = final
                if self.mirror is not None:
                    self.mirror.add(final)
                self.finished(final)

    def _on_all_ranks(self, work: Callable[[], Any]) -> list[Any]:
        """Do `work` on every rank. Returns all results by rank; SaveError on all ranks if it failed on one."""
        value, error = None, None
        try:
            value = work()
        except Exception as caught:
            error = f"{type(caught).__name__}: {caught}"
        # NOTE: a rank that failed takes part too. Without it the others would wait until the time-out.
        try:
            outcomes = self._world.gather_objects({"value": value, "error": error}, self._group)
        except Exception as caught:  # a rank is gone; the step will fail as well
            raise SaveError(error or f"lost a rank: {caught}") from None
        errors = [outcome["error"] for outcome in outcomes if outcome["error"] is not None]
        if errors:
            raise SaveError(errors[0])
        return [outcome["value"] for outcome in outcomes]

    def _prepare(self, aside: Path, contents: "_Contents") -> None:
        if self._world.device.type == "cuda" and self._world.device.index is not None:
            # A new thread is on GPU 0, where DCP would then make a context for every rank.
            torch.cuda.set_device(self._world.device)
        if self._world.first:
            shutil.rmtree(aside, ignore_errors=True)
            for folder in contents.own:
                (aside / folder).mkdir(parents=True)

    def _write_parts(self, aside: Path, parts: dict[str, dict[str, Tensor]]) -> None:
        for part, tensors in parts.items():
            write_tensors(aside / part, tensors, self._group)

    def _write_own(self, aside: Path, contents: "_Contents") -> dict[str, str]:
        """Write this rank's other files; rank 0 writes the JSON files. Returns the SHA-256 of all its files."""
        rank = self._world.rank
        for folder, tensors in contents.own.items():
            write_safetensors(aside / folder / rank_file(rank), tensors)
        if self._world.first:
            for name, value in contents.texts.items():
                write_json(aside / name, value)
            if contents.tokenizer is not None:
                contents.tokenizer.save(aside / TOKENIZER)
        # DCP numbers its files by rank, from 1. A rank hashes only what it wrote, so the work is shared out.
        shards = [*aside.glob(f"*/shard-{rank + 1:05d}-*")]
        for shard in shards:
            sort_metadata(shard)
        own = [*shards, *(aside / folder / rank_file(rank) for folder in contents.own)]
        own += aside.glob("*.json") if self._world.first else []
        for path in own:
            sync(path)
        return {str(path.relative_to(aside)): sha256(path) for path in own}

    def _finish(self, aside: Path, contents: "_Contents", digests: list[dict[str, str]]) -> None:
        """Turn the temporary folder into the final one by one rename. Rank 0 alone."""
        if not self._world.first:
            return
        named = dict(sorted(item for part in digests for item in part.items()))
        manifest = {"format_version": FORMAT_VERSION, "world_size": self._world.size, "sha256": named}
        write_json(aside / MANIFEST, manifest)
        # NOTE: everything has to be on the disk before the rename. A folder without .tmp counts as a whole checkpoint,
        # also after a power cut.
        for path in (p for p in aside.iterdir() if p.is_dir()):
            sync(path)
        if contents.is_checkpoint:
            self._place_checkpoint(aside, contents)
        else:
            place_folder(aside, contents.folder)

    def _place_checkpoint(self, aside: Path, contents: "_Contents") -> None:
        """Note a checkpoint in the history, rename it into its place, and remove what it replaces."""
        final = contents.folder
        if self._history is not None:
            self._history.save(step_of(final), aside / MANIFEST, contents.metrics_bytes)
        # A refused checkpoint has a higher step, so it would count as newest and push a good one out of `keep`.
        for path in self._refused:
            if path.exists():
                set_aside(path)
        self._refused = []
        shutil.rmtree(final, ignore_errors=True)
        place_folder(aside, final)
        for rest in self._root.glob("step_*.tmp"):  # left by a save that was killed
            if re.fullmatch(r"step_\d{8,}\.tmp", rest.name):
                shutil.rmtree(rest, ignore_errors=True)
        remove_old_checkpoints(self._root, self._keep, None if self.mirror is None else self.mirror.copying)


@dataclass(frozen=True)
class _Contents:
    """This rank's contents of a checkpoint's folder, copied to the host, for the thread that writes them."""

    folder: Path
    parts: dict[str, dict[str, Tensor]]
    """Folders of tensors that all ranks share, copied."""
    own: dict[str, dict[str, Tensor]]
    """Folders of the tensors of this rank alone."""
    texts: dict[str, Any]
    """JSON by file name."""
    tokenizer: Tokenizer | None = None
    """None if the folder is no checkpoint."""
    metrics_bytes: int = 0
    """Length in bytes of metrics.jsonl when the checkpoint was made."""

    @property
    def is_checkpoint(self) -> bool:
        return self.tokenizer is not None


def remove_old_checkpoints(root: Path, keep: int, spared: Path | None = None) -> None:
    """Keep the newest `keep` checkpoints, 0 for all, and `spared`; remove the others.

    A checkpoint is renamed before it is removed, so a kill never leaves a partial folder under a checkpoint's name. A
    folder that cannot be removed causes a warning.
    """
    for path in checkpoints(root)[:-keep] if keep else ():
        if path == spared:
            continue
        try:
            shutil.rmtree(path.rename(path.with_suffix(".tmp")))
        except OSError as error:
            log.warning("could not remove the old checkpoint %s: %s", path, error)
