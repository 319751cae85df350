"""Visual Genome. The region descriptions of an image are the captions of one sample."""

from collections.abc import Callable
from functools import cache
from pathlib import Path

from mvlm_dataloading.errors import DataError

from .files import captions_in_cell, read_json_list
from .record import Record, Source, check_shares, cut_into_pieces, file_sha256, require_folder, source, split_by_hash

_FOLDERS = ("VG_100K", "VG_100K_2", "images/VG_100K", "images/VG_100K_2", "images")


@source
def visual_genome(root: Path, /, validation: float = 0.0, test: float = 0.0) -> Source:
    """Visual Genome, with the region descriptions of an image as its captions.

    Half of the images are in COCO too: see --against.

        ROOT/region_descriptions.json, and optionally ROOT/image_data.json with ids in COCO and Flickr
        ROOT/VG_100K/*.jpg, ROOT/VG_100K_2/*.jpg

    Args:
        root: Unpacked download with region_descriptions.json, VG_100K and VG_100K_2.
        validation: Share of the images for validation, chosen by a hash of the id. None are published as such.
        test: Share of the images for test, chosen by a hash of the id.

    Raises:
        DataError: a file or folder is missing, or has another format.
    """
    check_shares(validation, test)
    file = root / "region_descriptions.json"
    find = image_finder(root)
    others = ids_elsewhere(root / "image_data.json")
    records: dict[str, list[Record]] = {}
    try:
        for image in read_json_list(file):
            regions = image["regions"]
            # Some releases lack `id`, but every region names its image. int() rejects an id that is a path.
            number = int(image["id"] if "id" in image else regions[0]["image_id"])
            path = find(number)
            captions = captions_in_cell([region["phrase"] for region in regions])
            metadata = {"image_id": f"visual-genome {number}", **others.get(number, {})}
            split = split_by_hash(str(number), validation, test)
            records.setdefault(split, []).append(Record(str(number), path, captions, str(path), metadata))
    except (KeyError, TypeError, IndexError, ValueError, OverflowError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(
            f"{file}: wanted Visual Genome's region descriptions, found {error!r}; download it again"
        ) from None
    return Source(
        name="visual-genome",
        origin="Visual Genome region descriptions, https://homes.cs.washington.edu/~ranjay/visualgenome",
        licence="annotations CC BY 4.0; each image under its own Flickr licence",
        attribution="Krishna et al., 2017",
        recipe={"annotations": [file_sha256(file)], "validation": validation, "test": test},
        pieces=cut_into_pieces(records),
    )


def image_finder(root: Path) -> Callable[[int], Path]:
    """A function that finds the file of an image by its id. DataError if there is no folder of images."""
    folders = [root / name for name in _FOLDERS if (root / name).is_dir()] or [
        require_folder(*(root / name for name in _FOLDERS))
    ]

    @cache
    def find(number: int) -> Path:
        paths = [folder / f"{number}.jpg" for folder in folders]
        return next((path for path in paths if path.is_file()), paths[0])

    return find


def ids_elsewhere(file: Path) -> dict[int, dict[str, int]]:
    """Read the images' ids in COCO and Flickr. Empty if the file is missing."""
    if not file.is_file():
        return {}
    found = {}
    for image in read_json_list(file):
        number = image.get("image_id", image.get("id")) if isinstance(image, dict) else None
        if number is not None:
            found[number] = {name: image[name] for name in ("coco_id", "flickr_id") if image.get(name) is not None}
    return found
