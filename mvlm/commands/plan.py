"""`mvlm plan`: a cluster plan, with memory, time and traffic of a run on many GPUs."""

import math
from pathlib import Path
from typing import Literal

from mvlm.config.groups import FULL, Learning, PartSettings
from mvlm.config.ranges import check_values
from mvlm.terminal import say

# Commands import what they need when they run, so that --help and errors are immediate.


def plan(
    *,
    gpus: tuple[str, ...],
    data: str,
    preset: str = "base",
    image_tower: str = "",
    text_tower: Path | None = None,
    gpu: str = "H100",
    batch_size: int = 0,
    epochs: float = 1.0,
    accumulate: int = 1,
    checkpoint_activations: bool = False,
    parallel: str = "ddp",
    capture: Literal["none", "cuda-graphs"] = "none",
    mfu: float = 0.4,
    inter_node: float = 0.0,
    loader_rate: float = 0.0,
    evaluation: tuple[int, ...] = (),
    task: str = "",
    image_size: int = 0,
    stages: tuple[str, ...] = (),
    text_length: int = 0,
    train_image: Learning = "full",
    train_text: Learning = "full",
    train_cross: Learning = "full",
    lora_rank: int = 8,
) -> None:
    """Plan a run on many GPUs: memory, time and traffic, without a GPU.

    The figures are computed from operation counts and data sheets.

    Args:
        gpus: GPUs per node x nodes, for example 8 x 16.
        data: Pairs in the data set, for example 400M.
        preset: Preset of the model: tiny, small or base.
        image_tower: Image tower in place of the preset's image encoder, timm:NAME.
        text_tower: Folder of a text tower in place of the preset's text encoder.
        gpu: A100, H100, H200 or B200.
        batch_size: Pairs in the global batch. 0: 128 per GPU.
        epochs: Passes over the data.
        accumulate: Microbatches per step on each GPU.
        checkpoint_activations: Recompute each block in backward instead of keeping its activations.
        parallel: ddp or fsdp.
        capture: Capture of the step; cuda-graphs takes memory for the graphs.
        mfu: Model FLOPs utilisation: share of the peak rate that a step reaches. `mvlm bench step` measures it.
        inter_node: Measured rate from a GPU to other nodes, in GB/s each way. 0: that of the data sheet.
        loader_rate: Measured speed of one node's loader, in pairs per second. 0: not measured.
        evaluation: Images, captions and candidates of an evaluation to plan too, for example 5000 25000 256.
        task: Plan fine-tuning on this task instead of pretraining.
        image_size: Side of images in pixels. 0: the preset's.
        stages: Sides of images by stage, as of `mvlm pretrain`, for example 0:96 8000:224.
        text_length: Longest text in tokens. 0: the preset's.
        train_image: Learning of the image encoder: full, lora or frozen.
        train_text: Learning of the text encoder.
        train_cross: Learning of the cross-modality encoders and the image decoder.
        lora_rank: Rank of adapters.
    """
    from dataclasses import replace

    from mvlm.config.model import MaskVLMConfig
    from mvlm.costs.cluster_plan import NODES, ClusterSetting, format_plan, parse_count, parse_gpus
    from mvlm.errors import ConfigError

    if gpu not in NODES or parallel not in ("ddp", "fsdp") or not 0 < mfu <= 1 or accumulate < 1 or batch_size < 0:
        raise ConfigError(
            f"plan: wanted --gpu one of {', '.join(NODES)}, --parallel ddp or fsdp, --mfu in (0, 1], --accumulate "
            f"at least 1, --batch-size at least 0; got {gpu}, {parallel}, {mfu}, {accumulate}, {batch_size}"
        )
    if not 0 < epochs < math.inf or not 0 <= loader_rate < math.inf or not 0 <= inter_node < math.inf:
        raise ConfigError(
            f"plan: wanted --epochs above 0, --loader-rate and --inter-node at least 0, got {epochs}, {loader_rate} "
            f"and {inter_node}"
        )
    per_node, nodes = parse_gpus(gpus)
    model = MaskVLMConfig.preset(preset)
    if image_tower:
        from mvlm.model.towers.timm_tower import tower_settings

        model = replace(model, **tower_settings(image_tower, image_size or None))
    if text_tower is not None:
        from mvlm.weights.text_tower import read_text_tower

        model = replace(model, mask_token_id=0, **read_text_tower(text_tower))
    model = replace(model, image_size=image_size or model.image_size, text_length=text_length or model.text_length)
    setting = ClusterSetting(
        model=model,
        gpu=gpu,
        per_node=per_node,
        nodes=nodes,
        batch_size=batch_size or 128 * per_node * nodes,
        accumulate=accumulate,
        checkpointed=checkpoint_activations,
        sharded=parallel == "fsdp",
        graphs=capture == "cuda-graphs",
        mfu=mfu,
        inter_node=inter_node * 1e9,
        parts=PartSettings(
            train_image=train_image, train_text=train_text, train_cross=train_cross, lora_rank=lora_rank
        ),
    )
    check_values(setting.parts)
    if setting.graphs and (setting.ranks > 1 or accumulate > 1 or checkpoint_activations or task):
        raise ConfigError(
            "plan: wanted pretraining on one GPU with --capture cuda-graphs, without --accumulate and "
            "--checkpoint-activations; leave --capture out"
        )
    if setting.sharded and setting.parts != FULL:
        raise ConfigError("plan: wanted --parallel ddp with frozen parts or adapters, whose FSDP2 is not counted")
    if evaluation and (len(evaluation) != 3 or min(evaluation) < 1):
        raise ConfigError(f"evaluation: wanted images, captions and candidates, as in 5000 25000 256, got {evaluation}")
    if task:
        from mvlm.tasks.cost import format_task_plan

        if loader_rate:
            raise ConfigError("plan: wanted no --loader-rate with --task, whose plan has no loader; leave it out")
        if setting.sharded:
            raise ConfigError("plan: wanted --parallel ddp with --task, which plans DDP; leave --parallel out")
        if stages:
            raise ConfigError("plan: wanted no --stages with --task, whose runs have one side; leave them out")
        say(format_task_plan(task, setting, parse_count(data), epochs))
    else:
        say(format_plan(setting, parse_count(data), epochs, loader_rate, stages))
    if evaluation:
        from mvlm.costs.evaluation_cost import format_evaluation

        say(format_evaluation(setting, *evaluation))
