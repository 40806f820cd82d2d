"""Folders of images as sources: which files, in which order, and one as RGB. Only PNG and JPEG, only plain files."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from sltscale.data.video.limits import VideoError, check_size

SUFFIXES = (".png", ".jpg", ".jpeg")
# An uncompressed PNG of the largest picture with 16 bits a channel is 72 MB.
MAX_IMAGE_BYTES = 100_000_000


def image_names(folder: Path, names: Sequence[str]) -> list[str]:
    """``names`` if there are any, otherwise all images of the folder, numbers in their names compared as numbers.

    Hidden files and those with other endings are no images. VideoError if the folder cannot be read or has none, or if
    a name could lead out of it.
    """
    for name in names:
        if name in (".", "..") or re.search(r"[/\\\0]", name):
            raise VideoError(f"image {name!r} is not the plain name of a file in the folder")
    if names:
        return list(names)
    try:
        found = [name for name in os.listdir(folder) if name.lower().endswith(SUFFIXES) and not name.startswith(".")]
    except OSError as error:
        raise VideoError(f"cannot be read: {error.strerror}") from None
    if not found:
        raise VideoError("no PNG or JPEG images in the folder")
    return sorted(found, key=_natural)


def read_image(path: Path) -> np.ndarray:
    """RGB uint8 [H, W, 3]. VideoError if it is a link or too large (seen before it is decoded), or cannot be read."""
    try:
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as file:
            facts = os.fstat(file.fileno())
            if not stat.S_ISREG(facts.st_mode):
                raise VideoError(f"image {path.name} is not a regular file")
            if facts.st_size > MAX_IMAGE_BYTES:
                raise VideoError(f"image {path.name} of {facts.st_size} bytes; at most {MAX_IMAGE_BYTES}")
            with Image.open(file, formats=("PNG", "JPEG")) as image:
                check_size(image.width, image.height)
                return np.asarray(image.convert("RGB"))
    except FileNotFoundError:
        raise VideoError(f"image {path.name} is missing") from None
    except (VideoError, MemoryError):
        raise
    except Exception as error:  # broken files make Pillow raise many kinds
        if path.is_symlink():
            raise VideoError(f"image {path.name} is a link; give a copy of the file") from None
        raise VideoError(f"image {path.name} cannot be decoded: {_words(error)}") from None


def _natural(name: str) -> tuple[list[tuple[int, str]], str]:
    """Digits count as numbers, and case does not; the name itself decides between equals."""
    parts = re.findall(r"[0-9]+|[^0-9]+", name.casefold())
    return [(int(part), "") if part[0] in "0123456789" else (-1, part) for part in parts], name


def _words(error: Exception) -> str:
    """The decoder's own words, less the file object's description."""
    return (getattr(error, "strerror", None) or re.sub(r" *<[^>]*>", "", str(error)) or type(error).__name__).strip()
