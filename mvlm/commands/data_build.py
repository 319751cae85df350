"""The commands `mvlm data ...` that write shards from published data sets."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mvlm.commands import data_tools
from mvlm_dataloading.options import BuildOptions

if TYPE_CHECKING:
    from mvlm_dataloading.sources.record import Source

# A command imports what it needs when it runs, so that --help and mistakes answer at once.


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """How shards are written, whatever they are made of."""

    against: tuple[Path, ...] = ()
    """Other data sets whose validation and test pictures are kept out of training."""
    workers: int | None = None
    """Processes, one a core by default."""


def emoji(out: Path, /, size: int = 144) -> None:
    """Build the emoji data set: about 3,900 pictures with their English names, from Python packages alone.

    Args:
        out: Folder to write the shards to.
        size: Side of the square pictures in pixels.
    """
    from mvlm_dataloading import build_emoji, open_dataset

    build_emoji(out, size)
    counts = ", ".join(f"{len(open_dataset(out, split))} {split}" for split in ("train", "validation", "test"))
    print(f"{out}: {counts}")


def coco(
    root: Path,
    out: Path,
    /,
    settings: BuildOptions = BuildOptions(),  # noqa: B008 (frozen)
    karpathy: Path | None = None,
    year: int | None = None,
    work: Work = Work(),
) -> None:
    """Write shards of COCO captions, with Karpathy's splits or the published ones.

    Args:
        root: The unpacked download: annotations, train2014, val2014 or those of 2017.
        out: Folder to write the shards to. A killed run goes on when the same command is given again.
        karpathy: dataset_coco.json, for Karpathy's splits.
        year: 2014 or 2017, where the annotations of both are there.
    """
    from mvlm_dataloading.sources.coco import coco

    _build(coco(root, karpathy, year), out, settings, work)


def flickr30k(
    root: Path,
    out: Path,
    /,
    settings: BuildOptions = BuildOptions(),  # noqa: B008
    captions: Path | None = None,
    work: Work = Work(),
) -> None:
    """Write shards of Flickr30k.

    Args:
        root: The unpacked download, with flickr30k-images.
        out: Folder to write the shards to. A killed run goes on when the same command is given again.
        captions: dataset_flickr30k.json (with splits), flickr_annotations_30k.csv (with splits),
            results_20130124.token or results.csv; the first of them in ROOT when not given.
    """
    from mvlm_dataloading.sources.flickr30k import flickr30k

    _build(flickr30k(root, captions), out, settings, work)


def visual_genome(
    root: Path,
    out: Path,
    /,
    settings: BuildOptions = BuildOptions(),  # noqa: B008
    validation: float = 0.0,
    test: float = 0.0,
    work: Work = Work(),
) -> None:
    """Write shards of Visual Genome: the descriptions of all regions of an image are its captions.

    Many of its images are in COCO too: see --against.

    Args:
        root: The unpacked download: region_descriptions.json, VG_100K and VG_100K_2.
        out: Folder to write the shards to. A killed run goes on when the same command is given again.
        validation: Share of the images for this split, chosen by a hash.
        test: Share of the images for this split, chosen by a hash.
    """
    from mvlm_dataloading.sources.visual_genome import visual_genome

    _build(visual_genome(root, validation, test), out, settings, work)


def cc3m(
    out: Path,
    /,
    train: tuple[Path, ...],
    validation: tuple[Path, ...] = (),
    settings: BuildOptions = BuildOptions(),  # noqa: B008
    work: Work = Work(),
) -> None:
    """Write shards of Conceptual Captions 3M as img2dataset downloaded it.

    Args:
        out: Folder to write the shards to. A killed run goes on when the same command is given again.
        train: Folders of img2dataset's tars and tables.
        validation: The same of the validation split.
    """
    from mvlm_dataloading.sources.tars import cc3m

    _build(cc3m(train, validation), out, settings, work)


def sbu(
    out: Path,
    /,
    train: tuple[Path, ...],
    validation: tuple[Path, ...] = (),
    settings: BuildOptions = BuildOptions(),  # noqa: B008
    work: Work = Work(),
) -> None:
    """Write shards of SBU captions as img2dataset downloaded them.

    Args:
        out: Folder to write the shards to. A killed run goes on when the same command is given again.
        train: Folders of img2dataset's tars and tables.
        validation: The same of a validation split.
    """
    from mvlm_dataloading.sources.tars import sbu

    _build(sbu(train, validation), out, settings, work)


def folder(
    images: Path,
    out: Path,
    /,
    captions: Path | None = None,
    image_column: str = "image",
    caption_column: str = "caption",
    split_column: str = "split",
    validation: float = 0.0,
    test: float = 0.0,
    licence: str = "",
    name: str = "folder",
    settings: BuildOptions = BuildOptions(),  # noqa: B008
    work: Work = Work(),
) -> None:
    """Write shards of a folder of pictures, with captions in a table or in a text file beside each.

    Args:
        images: The folder.
        out: Folder to write the shards to. A killed run goes on when the same command is given again.
        captions: A .csv, .tsv or .jsonl; when not given, the captions of a/b.jpg are the lines of a/b.txt.
        image_column: Its column of file names, relative to the folder.
        caption_column: Its column of captions; several rows of a picture are several captions.
        split_column: Its column of splits, if it has one.
        validation: Share of the pictures for this split, chosen by a hash of the name.
        test: Share of the pictures for this split, chosen by a hash of the name.
        licence: Goes into dataset.json.
        name: Goes into dataset.json.
    """
    from mvlm_dataloading.sources.folder import folder

    source = folder(
        images, captions, image_column=image_column, caption_column=caption_column, split_column=split_column,
        validation=validation, test=test, licence=licence, name=name,
    )  # fmt: skip
    _build(source, out, settings, work)


def webdataset(
    out: Path,
    /,
    train: tuple[Path, ...] = (),
    validation: tuple[Path, ...] = (),
    test: tuple[Path, ...] = (),
    caption_field: str = "caption",
    licence: str = "",
    name: str = "webdataset",
    settings: BuildOptions = BuildOptions(),  # noqa: B008
    work: Work = Work(),
) -> None:
    """Write shards of any WebDataset tars. (`mvlm data index` uses them in place, pictures unchecked.)

    Args:
        out: Folder to write the shards to. A killed run goes on when the same command is given again.
        train: Tars, or folders of tars, compressed or not.
        validation: The same of this split.
        test: The same of this split.
        caption_field: Field of a sample's .json that holds its captions, where it has no .txt.
        licence: Goes into dataset.json.
        name: Goes into dataset.json.
    """
    from mvlm_dataloading.sources.tars import webdataset

    source = webdataset(train, validation, test, caption_field=caption_field, licence=licence, name=name)
    _build(source, out, settings, work)


def huggingface(
    data: Path,
    out: Path,
    /,
    image_column: str = "image",
    caption_column: str = "caption",
    key_column: str | None = None,
    split: str | None = None,
    validation: float = 0.0,
    test: float = 0.0,
    licence: str = "",
    name: str = "huggingface",
    settings: BuildOptions = BuildOptions(),  # noqa: B008
    work: Work = Work(),
) -> None:
    """Write shards of Hugging Face `datasets` rows on disk: parquet files, or what save_to_disk wrote.

    Args:
        data: A parquet file, a folder of them, or a folder of save_to_disk.
        out: Folder to write the shards to. A killed run goes on when the same command is given again.
        image_column: The column of pictures.
        caption_column: The column of captions, a text or a list of texts.
        key_column: A column that names the samples.
        split: The split of everything; when not given, what the folders or file names say.
        validation: Share of train that becomes this split, by a hash of the key.
        test: Share of train that becomes this split, by a hash of the key.
        licence: Goes into dataset.json.
        name: Goes into dataset.json.
    """
    from mvlm_dataloading.sources.tables import huggingface

    source = huggingface(
        [data], image_column=image_column, caption_column=caption_column, key_column=key_column, split=split,
        validation=validation, test=test, licence=licence, name=name,
    )  # fmt: skip
    _build(source, out, settings, work)


def _build(source: "Source", out: Path, settings: BuildOptions, work: Work) -> None:
    from mvlm.progress import WorkProgress
    from mvlm_dataloading.build.build import build_shards
    from mvlm_dataloading.dataset.description import read_description

    with WorkProgress("samples") as counting:
        build_shards(
            source,
            out,
            settings,
            against=work.against,
            workers=data_tools.processes(work.workers, len(source.pieces)),
            progress=lambda done: counting.show(done.pieces, done.of_pieces, done.records),
        )
    print(f"{out}: {data_tools.counts(read_description(out))}")
