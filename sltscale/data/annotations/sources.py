"""Where a corpus keeps a clip's pictures: names from annotations looked up inside one folder, and nowhere else."""

from __future__ import annotations

import os
from pathlib import Path, PurePosixPath

from sltscale.data.annotations.tables import BadRow
from sltscale.errors import InputError

VIDEO_SUFFIXES = (".mp4", ".mkv", ".webm", ".mov", ".gif", ".avi")


class Sources:
    """The videos and frame folders in ``folder``. None: nothing is looked up, paths are what they would be.

    Every method raises BadRow if there is no such video. InputError if the folder cannot be listed.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self._names = set() if folder is None else folder_names(folder)

    def video(self, name: str) -> Path:
        """The video file of that name with the first of VIDEO_SUFFIXES that exists, directly in the folder."""
        if not name or "/" in name:
            raise BadRow(f"video {name[:80]!r}: expected a name without slashes")
        if self.folder is None:
            return Path(name + VIDEO_SUFFIXES[0])
        found = next((name + suffix for suffix in VIDEO_SUFFIXES if name + suffix in self._names), None)
        if found is None:
            raise BadRow("video missing")
        return self.folder / found

    def file(self, name: str) -> Path:
        """The file of that name, which may lie in a subfolder."""
        inside = _inside(name)
        if self.folder is None:
            return Path(inside)
        if not os.path.isfile(self.folder / inside):
            raise BadRow("video missing")
        return self.folder / inside

    def frames(self, told: str, split: str) -> Path:
        """The folder of images that an annotation calls ``told``: NAME, SPLIT/NAME or NAME/1.

        The first that exists of SPLIT/NAME/1, SPLIT/NAME, NAME/1 and NAME.
        """
        inside = _inside(told)
        if self.folder is None:
            return Path(inside)
        name = inside
        if len(name.parts) > 1 and name.parts[0] == split:
            name = PurePosixPath(*name.parts[1:])
        if len(name.parts) > 1 and name.parts[-1] == "1":
            name = name.parent
        for candidate in (split / name / "1", split / name, name / "1", name):
            if os.path.isdir(self.folder / candidate):
                return self.folder / candidate
        raise BadRow("video missing")


def folder_names(folder: Path) -> set[str]:
    """The names in a folder; InputError if it cannot be listed."""
    try:
        return set(os.listdir(folder))
    except OSError as error:
        raise InputError(f"folder {folder}: {error.strerror}") from None


def _inside(name: str) -> PurePosixPath:
    path = PurePosixPath(name)
    if path.is_absolute() or not path.parts or ".." in path.parts:
        raise BadRow(f"file {name[:80]!r} leads outside the folder of videos")
    return path
