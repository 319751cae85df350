"""Pieces of a part, written by the nodes of a Ray cluster.

A task is a few pieces, which one process of a node writes as `write_pieces` does on one machine. Tasks of a lost node
are given to other nodes, where finished pieces are skipped. The nodes share the folder of the part, or it is at a URL.
They have this package installed, and the files of the source under the same paths.
"""

import logging
from collections.abc import Iterator, Sequence
from typing import Any

from mvlm_dataloading.errors import need

from .local_folder import open_folder
from .piece_tasks import MAX_CRASHES, PieceJob, PieceTask, write_pieces

log = logging.getLogger(__name__)

_MAX_PIECES = 8
_TASKS_PER_CORE = 4


def write_pieces_on_ray(job: PieceJob, tasks: Sequence[PieceTask]) -> Iterator[tuple[int, int]]:
    """Write pieces on a Ray cluster. Yields, as tasks end, how many pieces and records have been added.

    Joins the cluster that RAY_ADDRESS names or that runs on this machine, else starts one on this machine.

    Raises:
        DataError: worker processes keep dying on a piece.
        ImportError: the extra `ray` is missing.
    """
    ray = need("ray", "ray")
    write = ray.remote(num_cpus=1, max_retries=MAX_CRASHES)(_write_chunk)
    size = max(1, min(_MAX_PIECES, len(tasks) // (_TASKS_PER_CORE * ray_cores())))
    waiting = [write.remote(job, tasks[begin : begin + size]) for begin in range(0, len(tasks), size)]
    try:
        while waiting:
            ended, waiting = ray.wait(waiting)
            try:
                yield ray.get(ended[0])
            except ray.exceptions.RayTaskError as error:  # an exception of the task, wrapped with its stack
                raise error.cause from None
    finally:
        for task in waiting:
            ray.cancel(task, force=True)


def ray_cores() -> int:
    """Number of cores of the cluster."""
    ray = need("ray", "ray")
    if not ray.is_initialized():
        ray.init(log_to_driver=False, logging_level=logging.WARNING)
    return max(1, int(ray.cluster_resources().get("CPU", 1)))


def _write_chunk(job: PieceJob, tasks: Sequence[PieceTask]) -> tuple[int, int]:
    part = open_folder(job.place)
    # A node that was lost may have finished some of these.
    left = [task for task in tasks if not part.has(f"pieces/{task.number:06d}/shards.json")]
    counts: list[Any] = list(write_pieces(job, left, workers=1))
    return len(tasks), sum(records for _, records in counts)
