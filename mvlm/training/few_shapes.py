"""Batches of few shapes: totals of tokens rounded up, where every new shape costs time."""

from mvlm.config.pretrain import PretrainConfig
from mvlm.config.run import RunConfig
from mvlm.distributed.world import World
from mvlm.model.packing import eager_buckets, pad_to_bucket
from mvlm_dataloading import Batch, Masks

# A graph or a compiled step is made for each shape, so there should be few.
_COARSE = 16


def with_few_shapes(loaded: list[tuple[Batch, Masks]], config: RunConfig, world: World) -> list[tuple[Batch, Masks]]:
    """The batches of a step on one rank, padded if few shapes make the step faster; else as they are.

    Compiled steps and CUDA graphs need few shapes, and so does the fast implementation in bf16 on a CPU. There oneDNN
    generates code for each shape of a matrix product and keeps it for 1,024 of them: for the demo 40 products of a step
    were new, and 18 ms of it. In fp32 it is another library that multiplies.
    """
    buckets = _buckets(config, world)
    if not buckets:
        return loaded
    return [pad_to_bucket(batch, masks, config.model.text_length, buckets) for batch, masks in loaded]


def _buckets(config: RunConfig, world: World) -> int:
    if config.fixed_shapes:
        return _COARSE
    alone = world.size == config.accumulate == 1 and isinstance(config, PretrainConfig)
    return eager_buckets(world.device, config.precision) if alone and config.plan == "fast" else 0
