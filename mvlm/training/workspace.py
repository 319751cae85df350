"""Workspace of an evaluation during training: in memory, or in files of the run folder where memory would be much."""

import shutil
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager

from mvlm.config.run import RunConfig
from mvlm.distributed.coordination import run_on_all_ranks
from mvlm.distributed.world import World
from mvlm.evaluation.workspace import EvaluationStopped, Workspace
from mvlm.runs.folder import RunFolder

IN_MEMORY = 1 << 30
"""Most bytes of features that each rank keeps in memory."""


@contextmanager
def evaluation_workspace(
    config: RunConfig, images: int, world: World, go_on: Callable[[], bool]
) -> Iterator[Workspace]:
    """Context with a workspace for the features of so many images. It ends early, without an error, if it is stopped.

    Features of more than `IN_MEMORY` bytes lie in files that all ranks share, if the run folder's disk has room for
    them. The files are removed at the end, and before the next evaluation if a kill left them.
    """
    # Most of what is kept, in fp32.
    needed = 4 * images * (1 + config.model.num_patches) * config.model.width
    in_files = needed > IN_MEMORY and shutil.disk_usage(config.out).free > 2 * needed
    folder = RunFolder(config.out).evaluation_files if world.gather_objects(in_files)[0] else None

    def empty() -> None:
        if folder is not None and world.first:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()

    run_on_all_ranks(world, empty)
    try:
        # Rows of other ranks are read from the disk, on NFS at least, so they have to be there.
        with closing(Workspace(folder, world, resumable=folder is not None and world.size > 1, go_on=go_on)) as found:
            yield found
        world.gather_objects(None)  # no rank reads the files any more
    except EvaluationStopped:
        pass  # all ranks raise it together
    finally:
        if folder is not None and world.first:
            shutil.rmtree(folder, ignore_errors=True)
