"""The commands `mvlm data ...` that build shards from published data sets."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from mvlm.commands import data_tools
from mvlm_dataloading.options import BuildOptions

if TYPE_CHECKING:
    from mvlm_dataloading.sources.record import Source

# Commands import what they need when they run, so that --help and errors are immediate.


@dataclass(frozen=True, slots=True, kw_only=True)
class CommonOptions:
    """Options of all build commands."""

    against: tuple[Path, ...] = ()
    """Other data sets whose validation and test images are excluded from training."""
    workers: int | None = None
    """Number of processes. Default: one per core."""
    part: str | None = None
    """Write part i of n of the data set, as i/n. `mvlm data merge` joins the parts that any machines have written."""
    executor: Literal["processes", "ray"] = "processes"
    """What does the work: processes of this machine, or the nodes of a Ray cluster."""


def coco(
    root: Path,
    out: Path,
    /,
    build: BuildOptions = BuildOptions(),  # noqa: B008 (frozen)
    karpathy: Path | None = None,
    year: int | None = None,
    common: CommonOptions = CommonOptions(),
) -> None:
    """Build shards from COCO captions, with Karpathy's splits or the published ones.

    Args:
        root: Unpacked download with annotations, train2014 and val2014, or those of 2017.
        out: Folder for the shards. To resume a killed build, give the same command again.
        karpathy: Karpathy's dataset_coco.json, to use its splits.
        year: 2014 or 2017, needed if the annotations of both are there.
    """
    from mvlm_dataloading.sources.coco import coco

    build_source(coco(root, karpathy, year), out, build, common)


def flickr30k(
    root: Path,
    out: Path,
    /,
    build: BuildOptions = BuildOptions(),  # noqa: B008
    captions: Path | None = None,
    common: CommonOptions = CommonOptions(),
) -> None:
    """Build shards from Flickr30k.

    Args:
        root: Unpacked download with flickr30k-images.
        out: Folder for the shards. To resume a killed build, give the same command again.
        captions: dataset_flickr30k.json or flickr_annotations_30k.csv (with splits), results_20130124.token or
            results.csv (without). Default: the first of them in ROOT.
    """
    from mvlm_dataloading.sources.flickr30k import flickr30k

    build_source(flickr30k(root, captions), out, build, common)


def visual_genome(
    root: Path,
    out: Path,
    /,
    build: BuildOptions = BuildOptions(),  # noqa: B008
    validation: float = 0.0,
    test: float = 0.0,
    common: CommonOptions = CommonOptions(),
) -> None:
    """Build shards from Visual Genome, with the region descriptions of an image as its captions.

    Half of the images are in COCO too: see --against.

    Args:
        root: Unpacked download with region_descriptions.json, VG_100K and VG_100K_2.
        out: Folder for the shards. To resume a killed build, give the same command again.
        validation: Share of the images for validation, chosen by a hash of the id.
        test: Share of the images for test, chosen by a hash of the id.
    """
    from mvlm_dataloading.sources.visual_genome import visual_genome

    build_source(visual_genome(root, validation, test), out, build, common)


def cc3m(
    out: Path,
    /,
    train: tuple[Path, ...],
    validation: tuple[Path, ...] = (),
    name: Literal["cc3m", "sbu"] = "cc3m",
    build: BuildOptions = BuildOptions(),  # noqa: B008
    common: CommonOptions = CommonOptions(),
) -> None:
    """Build shards from Conceptual Captions 3M, or SBU's captions, as img2dataset downloads them.

    Args:
        out: Folder for the shards. To resume a killed build, give the same command again.
        train: Folders of img2dataset's tars and tables.
        validation: Folders of the validation split.
        name: Which of the two lists it is: dataset.json states its origin and licence.
    """
    from mvlm_dataloading.sources.webdataset import cc3m

    build_source(cc3m(train, validation, name=name), out, build, common)


def folder(
    images: Path,
    out: Path,
    /,
    captions: Path | None = None,
    image_column: str = "image",
    caption_column: str = "caption",
    split_column: str | None = None,
    validation: float = 0.0,
    test: float = 0.0,
    licence: str = "",
    name: str = "folder",
    build: BuildOptions = BuildOptions(),  # noqa: B008
    common: CommonOptions = CommonOptions(),
) -> None:
    """Build shards from a folder of images, with captions in a table or in one text file per image.

    Folders in it that are named as an evaluation split, such as val or test, give their images that split.

    Args:
        images: Folder of images, subfolders included.
        out: Folder for the shards. To resume a killed build, give the same command again.
        captions: Table of captions: .csv, .tsv or .jsonl. Default: the captions of a/b.jpg are the lines of a/b.txt.
        image_column: Column of file names, relative to the folder.
        caption_column: Column of captions. Several rows of an image are several captions.
        split_column: Column of splits, which comes before the folders' names. Default: split, or Split, if it is there.
        validation: Share of the images for validation, chosen by a hash of the name. 1.0 takes all.
        test: Share of the images for test, chosen by a hash of the name. 1.0 takes all.
        licence: Licence to state in dataset.json.
        name: Name to state in dataset.json.
    """
    from mvlm_dataloading.sources.folder import folder

    source = folder(
        images, captions, image_column=image_column, caption_column=caption_column, split_column=split_column,
        validation=validation, test=test, licence=licence, name=name,
    )  # fmt: skip
    build_source(source, out, build, common)


def webdataset(
    out: Path,
    /,
    train: tuple[Path, ...] = (),
    validation: tuple[Path, ...] = (),
    test: tuple[Path, ...] = (),
    caption_field: str = "caption",
    prefix_keys: bool = False,
    licence: str = "",
    name: str = "webdataset",
    build: BuildOptions = BuildOptions(),  # noqa: B008
    common: CommonOptions = CommonOptions(),
) -> None:
    """Build shards from any WebDataset tars. (`mvlm data index` uses tars in place, with images unchecked.)

    Args:
        out: Folder for the shards. To resume a killed build, give the same command again.
        train: Tars, or folders of tars, of the train split. They may be compressed.
        validation: Tars, or folders of tars, of the validation split.
        test: Tars, or folders of tars, of the test split.
        caption_field: Field of a sample's .json with its captions, if it has no .txt.
        prefix_keys: Put the tar's name before all keys. For tars whose first 16 keys differ and later ones do not.
        licence: Licence to state in dataset.json.
        name: Name to state in dataset.json.
    """
    from mvlm_dataloading.sources.webdataset import webdataset

    source = webdataset(
        train, validation, test, caption_field=caption_field, prefix_keys=prefix_keys, licence=licence, name=name
    )
    build_source(source, out, build, common)


def huggingface(
    data: Path,
    out: Path,
    /,
    image_column: str = "image",
    caption_column: str = "caption",
    key_column: str | None = None,
    split_column: str | None = None,
    split: str | None = None,
    validation: float = 0.0,
    test: float = 0.0,
    licence: str = "",
    name: str = "huggingface",
    build: BuildOptions = BuildOptions(),  # noqa: B008
    common: CommonOptions = CommonOptions(),
) -> None:
    """Build shards from rows of Hugging Face `datasets` on disk: parquet files, or folders of save_to_disk.

    Args:
        data: Parquet file, folder of parquet files, or folder of save_to_disk.
        out: Folder for the shards. To resume a killed build, give the same command again.
        image_column: Column of images.
        caption_column: Column of captions: strings, or lists of strings.
        key_column: Column of keys. Rows that follow one another and have equal keys and images are one sample. Default:
            numbers of file and row.
        split_column: Column of splits. Default: split, if there is one.
        split: Split of all rows. Default: that of the column, else the one that the file's or a folder's name states.
        validation: Share of train to use for validation, chosen by a hash of the key, or of the image without keys.
        test: Share of train to use for test, chosen by a hash of the key, or of the image without keys.
        licence: Licence to state in dataset.json.
        name: Name to state in dataset.json.
    """
    from mvlm_dataloading.sources.huggingface import huggingface

    source = huggingface(
        [data], image_column=image_column, caption_column=caption_column, key_column=key_column,
        split_column=split_column, split=split, validation=validation, test=test, licence=licence, name=name,
    )  # fmt: skip
    build_source(source, out, build, common)


def build_source(source: "Source", out: Path, build: BuildOptions, common: CommonOptions) -> None:
    from mvlm.progress import WorkProgress
    from mvlm_dataloading.build.build import build_part, build_shards
    from mvlm_dataloading.build.part import parse_part

    part = None if common.part is None else parse_part(common.part)
    with WorkProgress("samples") as counting:
        settings: dict[str, Any] = {
            "evaluation_sets": common.against,
            "workers": data_tools.processes(common.workers, len(source.pieces)),
            "executor": common.executor,
            "progress": lambda done: counting.show(done.pieces, done.of_pieces, done.records),
        }
        if part is None:
            build_shards(source, out, build, **settings)
        else:
            build_part(source, out, part, build, **settings)
    print(f"{out}: part {common.part} is complete" if part else data_tools.summary(out))
