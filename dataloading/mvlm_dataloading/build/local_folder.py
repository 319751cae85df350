"""Files of a folder on a disk of this machine or on a shared one, under the interface of `RemoteFolder`."""

import os
import shutil
from pathlib import Path

from mvlm_dataloading.dataset.remote_files import RemoteFolder, is_remote
from mvlm_dataloading.errors import DataError
from mvlm_dataloading.files import replaced, write_file


class LocalFolder:
    """Files of one folder. Names are relative to it.

    Args:
        gives_away: `get` moves files instead of copying them.

    Raises:
        DataError: a file is missing.
    """

    def __init__(self, folder: Path, *, gives_away: bool = False):
        self.folder, self.url = folder, str(folder)
        self._gives_away = gives_away

    def read(self, name: str, *, exact: bool = True) -> bytes:
        """Content of a file. Always exact."""
        try:
            return (self.folder / name).read_bytes()
        except FileNotFoundError:
            raise DataError(
                f"{self.folder / name}: wanted a file that the data set needs, found none; check the folder"
            ) from None

    def has(self, name: str) -> bool:
        """True if the folder has a file of this name."""
        return (self.folder / name).is_file()

    def names(self, folder: str) -> list[str]:
        """Names of all files in a folder and its subfolders. Empty if there is no such folder."""
        return [path.relative_to(self.folder).as_posix() for path in (self.folder / folder).rglob("*")]

    def get(self, name: str, to: Path) -> None:
        """Give a file a second name, copy it where that is impossible, or move it. `to` appears complete."""
        path = self.folder / name
        if self._gives_away:
            path.rename(to)
            return
        try:
            os.link(path, to)
        except OSError:  # another disk, or a file system without links
            with replaced(to) as aside:
                shutil.copyfile(path, aside)

    def write(self, name: str, content: bytes) -> None:
        """Store a file. It appears complete, or not at all, and is on the disk afterwards."""
        write_file(self.folder / name, content)


def open_folder(place: Path | str) -> LocalFolder | RemoteFolder:
    """The files of a folder that is given by its path or by its URL."""
    return RemoteFolder(place) if is_remote(place) else LocalFolder(Path(place))


def discard(folder: Path) -> None:
    """Remove a folder that another process may be writing. That process cannot finish it any more."""
    gone = folder.with_name(f"{folder.name}.old")
    try:
        folder.rename(gone)  # at once, so that nobody renames a half-removed folder to its final name
    except OSError:  # it has been finished or removed meanwhile
        return
    shutil.rmtree(gone, ignore_errors=True)
