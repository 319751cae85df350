"""The commands `mvlm data ...` that write shards from published data sets, and check, index and select them."""

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mvlm_dataloading.settings import Choice, Settings

if TYPE_CHECKING:
    from mvlm_dataloading.check import Findings
    from mvlm_dataloading.records import Source

# A command imports what it needs when it runs, so that --help and mistakes answer at once.


def coco(
    root: Path,
    out: Path,
    /,
    settings: Settings = Settings(),  # noqa: B008 (frozen)
    karpathy: Path | None = None,
    year: int | None = None,
    against: tuple[Path, ...] = (),
    workers: int | None = None,
) -> None:
    """Write shards of COCO captions, with Karpathy's splits or the published ones.

    Args:
        root: The unpacked download: annotations, train2014, val2014 or those of 2017.
        out: Folder to write the shards to. A killed run goes on when the same command is given again.
        karpathy: dataset_coco.json, for Karpathy's splits.
        year: 2014 or 2017, where the annotations of both are there.
        against: Other data sets whose validation and test pictures are kept out of training.
        workers: Processes, one a core by default.
    """
    from mvlm_dataloading.sources.coco import coco

    _build(coco(root, karpathy, year), out, settings, against, workers)


def flickr30k(
    root: Path,
    out: Path,
    /,
    settings: Settings = Settings(),  # noqa: B008
    captions: Path | None = None,
    against: tuple[Path, ...] = (),
    workers: int | None = None,
) -> None:
    """Write shards of Flickr30k.

    Args:
        root: The unpacked download, with flickr30k-images.
        out: Folder to write the shards to. A killed run goes on when the same command is given again.
        captions: dataset_flickr30k.json (with splits), flickr_annotations_30k.csv (with splits),
            results_20130124.token or results.csv; the first of them in ROOT when not given.
        against: Other data sets whose validation and test pictures are kept out of training.
        workers: Processes, one a core by default.
    """
    from mvlm_dataloading.sources.flickr30k import flickr30k

    _build(flickr30k(root, captions), out, settings, against, workers)


def visual_genome(
    root: Path,
    out: Path,
    /,
    settings: Settings = Settings(),  # noqa: B008
    validation: float = 0.0,
    test: float = 0.0,
    against: tuple[Path, ...] = (),
    workers: int | None = None,
) -> None:
    """Write shards of Visual Genome: the descriptions of all regions of an image are its captions.

    Args:
        root: The unpacked download: region_descriptions.json, VG_100K and VG_100K_2.
        out: Folder to write the shards to. A killed run goes on when the same command is given again.
        validation: Share of the images for this split, chosen by a hash.
        test: Share of the images for this split, chosen by a hash.
        against: Other data sets whose validation and test pictures are kept out of training: many are in COCO too.
        workers: Processes, one a core by default.
    """
    from mvlm_dataloading.sources.visual_genome import visual_genome

    _build(visual_genome(root, validation, test), out, settings, against, workers)


def cc3m(
    out: Path,
    /,
    train: tuple[Path, ...],
    validation: tuple[Path, ...] = (),
    settings: Settings = Settings(),  # noqa: B008
    against: tuple[Path, ...] = (),
    workers: int | None = None,
) -> None:
    """Write shards of Conceptual Captions 3M as img2dataset downloaded it.

    Args:
        out: Folder to write the shards to. A killed run goes on when the same command is given again.
        train: Folders of img2dataset's tars and tables.
        validation: The same of the validation split.
        against: Other data sets whose validation and test pictures are kept out of training.
        workers: Processes, one a core by default.
    """
    from mvlm_dataloading.sources.tars import cc3m

    _build(cc3m(train, validation), out, settings, against, workers)


def sbu(
    out: Path,
    /,
    train: tuple[Path, ...],
    validation: tuple[Path, ...] = (),
    settings: Settings = Settings(),  # noqa: B008
    against: tuple[Path, ...] = (),
    workers: int | None = None,
) -> None:
    """Write shards of SBU captions as img2dataset downloaded them.

    Args:
        out: Folder to write the shards to. A killed run goes on when the same command is given again.
        train: Folders of img2dataset's tars and tables.
        validation: The same of a validation split.
        against: Other data sets whose validation and test pictures are kept out of training.
        workers: Processes, one a core by default.
    """
    from mvlm_dataloading.sources.tars import sbu

    _build(sbu(train, validation), out, settings, against, workers)


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
    settings: Settings = Settings(),  # noqa: B008
    against: tuple[Path, ...] = (),
    workers: int | None = None,
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
        against: Other data sets whose validation and test pictures are kept out of training.
        workers: Processes, one a core by default.
    """
    from mvlm_dataloading.sources.folder import folder

    source = folder(
        images, captions, image_column=image_column, caption_column=caption_column, split_column=split_column,
        validation=validation, test=test, licence=licence, name=name,
    )  # fmt: skip
    _build(source, out, settings, against, workers)


def webdataset(
    out: Path,
    /,
    train: tuple[Path, ...] = (),
    validation: tuple[Path, ...] = (),
    test: tuple[Path, ...] = (),
    caption_field: str = "caption",
    licence: str = "",
    name: str = "webdataset",
    settings: Settings = Settings(),  # noqa: B008
    against: tuple[Path, ...] = (),
    workers: int | None = None,
) -> None:
    """Write shards of any WebDataset tars. (`mvlm data index` uses them in place, unchecked.)

    Args:
        out: Folder to write the shards to. A killed run goes on when the same command is given again.
        train: Tars, or folders of tars, compressed or not.
        validation: The same of this split.
        test: The same of this split.
        caption_field: Field of a sample's .json that holds its captions, where it has no .txt.
        licence: Goes into dataset.json.
        name: Goes into dataset.json.
        against: Other data sets whose validation and test pictures are kept out of training.
        workers: Processes, one a core by default.
    """
    from mvlm_dataloading.sources.tars import webdataset

    source = webdataset(train, validation, test, caption_field=caption_field, licence=licence, name=name)
    _build(source, out, settings, against, workers)


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
    settings: Settings = Settings(),  # noqa: B008
    against: tuple[Path, ...] = (),
    workers: int | None = None,
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
        against: Other data sets whose validation and test pictures are kept out of training.
        workers: Processes, one a core by default.
    """
    from mvlm_dataloading.sources.tables import huggingface

    source = huggingface(
        [data], image_column=image_column, caption_column=caption_column, key_column=key_column, split=split,
        validation=validation, test=test, licence=licence, name=name,
    )  # fmt: skip
    _build(source, out, settings, against, workers)


def check(shards: Path, /, sheet: Path | None = None, workers: int | None = None) -> None:
    """Read a data set through: hashes, indices, every picture and caption; a table, and a sheet of pictures.

    Args:
        shards: The data folder.
        sheet: PNG to write; contact-sheet.png in the data folder when not given.
        workers: Processes, one a core by default.
    """
    from mvlm.console import Counting
    from mvlm_dataloading.check import check_shards, contact_sheet, table
    from mvlm_dataloading.errors import DataError

    with Counting("pictures") as counting:
        found = check_shards(
            shards, workers=_workers(workers), progress=lambda done, all: counting.show(done, all, done)
        )
    print(table(shards, found))
    with contextlib.suppress(DataError):  # what cannot be opened is among the problems
        print(contact_sheet(shards, sheet or shards / "contact-sheet.png"))
    _raise_problems(shards, found, DataError)


def index(folder: Path, /, split: str | None = None) -> None:
    """Make the indices of a data folder again, or of a folder of other tools' tars, which is then a data folder.

    Args:
        folder: The folder.
        split: The split of tars whose names (train-000.tar) do not say it; else train.
    """
    from mvlm_dataloading.index import rebuild_indices

    description = rebuild_indices(folder, split)
    left_out = "".join(f"; left out: {n} {reason}" for reason, n in description.get("rejected", {}).items())
    print(f"{folder}: {_counts(description)}{left_out}")


def view(
    out: Path,
    /,
    sources: tuple[Path, ...],
    weights: tuple[float, ...] = (),
    choice: Choice = Choice(),  # noqa: B008 (frozen)
) -> None:
    """Select, dedupe, thin out and mix data sets without writing a tar: the view is a data folder of indices.

    Args:
        out: Folder to write the view to.
        sources: Data folders, which have to stay where they are, seen from the view.
        weights: How often an epoch has the training samples of each source, 1 when not given; 0.5 takes half of them.
    """
    from mvlm_dataloading.view import make_view

    description = make_view(out, sources, choice, weights=weights)
    print(f"{out}: {_counts(description)}")
    for reason, count in description["rejected"].items():
        print(f"left out: {count} {reason}")


def _build(source: "Source", out: Path, settings: Settings, against: tuple[Path, ...], workers: int | None) -> None:
    from mvlm.console import Counting
    from mvlm_dataloading.build import build_shards
    from mvlm_dataloading.shards import read_description

    with Counting("samples") as counting:
        build_shards(
            source,
            out,
            settings,
            against=against,
            workers=_workers(workers, len(source.pieces)),
            progress=lambda done: counting.show(done.pieces, done.of_pieces, done.records),
        )
    print(f"{out}: {_counts(read_description(out))}")


def _counts(description: dict[str, Any]) -> str:
    return ", ".join(f"{part['samples']} {split}" for split, part in description["splits"].items())


def _workers(given: int | None, pieces: int | None = None) -> int:
    import os

    from mvlm.errors import ConfigError

    if given is not None and given < 1:
        raise ConfigError(f"workers: wanted at least 1, got {given}")
    return min(given or len(os.sched_getaffinity(0)), max(1, pieces or 1 << 10))


def _raise_problems(shards: Path, found: "dict[str, Findings]", error: type[Exception]) -> None:
    problems = [problem for findings in found.values() for problem in findings.problems]
    for problem in problems[:20]:
        print(f"problem: {problem}")
    if problems:
        raise error(f"{shards}: wanted a data set without faults, found {len(problems)}; the first: {problems[0]}")
