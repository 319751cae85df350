"""Places of published files, and errors about their content."""

from collections.abc import Iterable
from pathlib import Path

from mvlm_dataloading.errors import DataError

_COCO_FOLDERS = ("", "images", "coco", "coco/images", "mscoco", "images/mscoco/images")


def find_file(root: Path, *names: str) -> Path | None:
    """The first of the files, whose names are relative to `root`, that exists; None if none does."""
    return next((path for name in names if (path := root / name).is_file()), None)


def coco_folder(roots: Iterable[Path], name: str) -> Path:
    """Folder `name`, such as train2014, of COCO's images. DataError if it is in none of the usual places."""
    places = [root / folder / name for root in roots for folder in _COCO_FOLDERS]
    found = next((place for place in places if place.is_dir()), None)
    if found is None:
        raise DataError(f"{places[0]}: wanted the folder of COCO's images, found none; name its parent with --images")
    return found


def wrong_format(file: Path, wanted: str, error: object) -> DataError:
    """Error for a file whose content is not as published."""
    return DataError(f"{file}: wanted {wanted}, found {error!r}; download it again")
