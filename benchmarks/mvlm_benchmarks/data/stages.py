"""Cumulative stages of our loader, to find the bottleneck.

    read       read the components of tars with DALI's reader
    decode     + decode random crops
    resize     + resize them to squares
    augment    + RandAugment, in the complete DALI graph with its check of file ends
    hand-over  + captions, tokens and masks: the complete batches that the model gets

Each stage is a contender of `worker`. The time that a stage adds is its time per image minus that of the previous
stage.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from mvlm_dataloading import Loader, LoaderWork, open_dataset, train_tokenizer
from mvlm_dataloading.dataset.dali_index import IMAGE_EXTENSIONS
from mvlm_dataloading.loader.augment import Augment, draw_parameters
from mvlm_dataloading.loader.pipeline import build_pipeline, executor_arguments, index_views
from mvlm_dataloading.loader.pixels import CropGeometry, CropWindows, FileEnds, Resize
from mvlm_dataloading.loader.sampler import SampleOrder
from mvlm_dataloading.randomness import Purpose, uniforms

STAGES = ("read", "decode", "resize", "augment", "hand-over")


def our_loader(data: Path, recipe: str, batch: int, size: int, threads: int, keep_mb: int = 0) -> Loader:
    """Our loader as it is measured: captions of at most 40 tokens."""
    dataset = open_dataset(data, "train")
    tokenizer = train_tokenizer([one[0] for one in dataset.captions_of(range(min(len(dataset), 1000)))], 1000)
    return Loader(
        dataset, tokenizer, batch_size=batch, image_size=size, text_length=40, seed=0,
        augment=Augment(operations=2 if recipe == "crop+randaug" else 0),
        work=LoaderWork(num_threads=threads, keep_mb=keep_mb),
    )  # fmt: skip


def stage_batches(stage: str, data: Path, recipe: str, batch: int, size: int, threads: int) -> Iterator[Any]:
    """Yield endless results of the loader up to and including `stage`."""
    if stage == "hand-over":
        yield from our_loader(data, recipe, batch, size, threads)
        return
    dataset = open_dataset(data, "train")
    augment = Augment(operations=2 if recipe == "crop+randaug" else 0)
    count = len(dataset) // batch * batch
    ids, epochs = SampleOrder(dataset.shard_sizes, 0, shuffle=True)(0, count)
    crop_uniforms = uniforms(Purpose.CROP, 0, epochs, ids, 4)

    def rows(k: Any) -> np.ndarray:
        """Positions of batch k's samples in the drawn arrays, int64 (B,)."""
        return (int(k) * batch + np.arange(batch)) % count

    if stage == "augment":
        drawn = draw_parameters(augment, 0, epochs, ids, size)
        pipeline = build_pipeline(
            dataset,
            ids,
            lambda k: crop_uniforms[rows(k)],
            CropGeometry(image_size=size),
            batch_size=batch,
            num_threads=threads,
            file_ends=FileEnds(),
            augment=None if augment.is_identity else lambda k: drawn.rows(rows(k)),
        )
    else:
        with index_views(dataset, ids) as (tars, indices):
            pipeline = _partial_pipeline(stage, tars, indices, lambda k: crop_uniforms[rows(k)], batch, size, threads)
    while True:
        yield pipeline.run()


def _partial_pipeline(
    stage: str, tars: list[str], indices: list[str], draws: Any, batch: int, size: int, threads: int
) -> Any:
    import nvidia.dali as dali

    fn: Any = dali.fn
    types: Any = dali.types
    make: Any = dali.pipeline.Pipeline
    pipeline = make(batch_size=batch, num_threads=threads, device_id=None, **executor_arguments(None, 1))
    with pipeline:
        result = encoded = fn.readers.webdataset(
            paths=tars,
            index_paths=indices,
            ext=[";".join(IMAGE_EXTENSIONS)],
            case_sensitive_extensions=False,
        )
        if stage != "read":
            corner, shape = fn.python_function(
                fn.peek_image_shape(encoded),
                function=CropWindows(CropGeometry(image_size=size), draws),
                batch_processing=True,
                num_outputs=2,
            )
            result = fn.decoders.image_slice(
                encoded, start=corner, shape=shape, axes=[0, 1], output_type=types.DALIImageType.RGB
            )
        if stage == "resize":
            function = Resize(size, threads, planes=True)
            result = fn.python_function(result, function=function, batch_processing=True, output_layouts="CHW")
        pipeline.set_outputs(result)
    pipeline.build()
    return pipeline
