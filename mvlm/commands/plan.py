"""`mvlm plan`: memory, time and traffic of a run on many GPUs."""

import math

# A command imports what it needs when it runs, so that --help and mistakes answer at once.


def plan(
    *,
    gpus: tuple[str, ...],
    data: str,
    preset: str = "base",
    gpu: str = "H100",
    batch_size: int = 0,
    epochs: float = 1.0,
    accumulate: int = 1,
    checkpoint_activations: bool = False,
    local_negatives: bool = False,
    parallel: str = "ddp",
    mfu: float = 0.4,
    loader_rate: float = 0.0,
) -> None:
    """Memory, time and traffic of a run on many GPUs, counted from the code and from stated rates: no GPU is needed.

    Args:
        gpus: GPUs a node x nodes, for example 8 x 16.
        data: Pairs of the data set, for example 400M.
        preset: Sizes of the model: tiny, small or base.
        gpu: A100, H100, H200 or B200.
        batch_size: Pairs of the global batch; 0 for 128 a GPU.
        epochs: How often the data are seen.
        accumulate: Microbatches a step on each GPU.
        checkpoint_activations: Compute what is inside a block again in backward.
        local_negatives: Draw ITM's negatives within a microbatch.
        parallel: ddp or fsdp.
        mfu: Share of the peak rate that the step's matrix products reach; measure it with `mvlm bench step`.
        loader_rate: Pairs a second that the loader of a node was measured to give; 0 for not measured.
    """
    from mvlm.config.model import MaskVLMConfig
    from mvlm.costs.cluster_plan import NODES, ClusterSetting, format_plan, parse_count, parse_gpus
    from mvlm.errors import ConfigError

    if gpu not in NODES or parallel not in ("ddp", "fsdp") or not 0 < mfu <= 1 or accumulate < 1 or batch_size < 0:
        raise ConfigError(
            f"plan: wanted --gpu one of {', '.join(NODES)}, --parallel ddp or fsdp, --mfu in (0, 1], --accumulate "
            f"at least 1, --batch-size at least 0; got {gpu}, {parallel}, {mfu}, {accumulate}, {batch_size}"
        )
    per_node, nodes = parse_gpus(gpus)
    setting = ClusterSetting(
        model=MaskVLMConfig.preset(preset),
        gpu=gpu,
        per_node=per_node,
        nodes=nodes,
        batch_size=batch_size or 128 * per_node * nodes,
        accumulate=accumulate,
        checkpointed=checkpoint_activations,
        local_negatives=local_negatives,
        sharded=parallel == "fsdp",
        mfu=mfu,
    )
    if not 0 < epochs < math.inf or not 0 <= loader_rate < math.inf:
        raise ConfigError(f"plan: wanted --epochs above 0 and --loader-rate at least 0, got {epochs} and {loader_rate}")
    print(format_plan(setting, parse_count(data), epochs, loader_rate))
