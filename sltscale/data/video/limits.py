"""How large videos may be, and what a fault in one is called."""

from __future__ import annotations

from sltscale.errors import InputError

MAX_SIDE = 4096
MAX_PIXELS = 9_000_000
MAX_SECONDS = 120
MAX_FRAMES = 7200
# A source may be long, as clips are spans of it; 100 hours are an error in its header.
MAX_SOURCE_SECONDS = 360_000
# As stored.
MAX_CLIP_BYTES = 256 * 2**20
# As RGB a video may be this many times its own bytes, once it is more than MAX_UNQUESTIONED_BYTES. Real signing
# measured 33 to 197 times (docs/cutting.md).
MAX_EXPANSION = 20_000
MAX_UNQUESTIONED_BYTES = 256 * 2**20


class VideoError(InputError):
    """This clip cannot be used; the message is a reason in one line."""


def check_size(width: int, height: int) -> None:
    if not width or not height:
        raise VideoError(f"frames of no known size, or above {MAX_PIXELS} pixels")
    if not 0 < width <= MAX_SIDE or not 0 < height <= MAX_SIDE or width * height > MAX_PIXELS:
        raise VideoError(f"frames of {width}x{height} pixels; at most {MAX_SIDE} a side and {MAX_PIXELS} in all")


def check_expansion(pixels: int, size: int) -> None:
    """Refuse what only a file made to exhaust the reader holds: pixels in all its frames out of size bytes."""
    if 3 * pixels > max(MAX_UNQUESTIONED_BYTES, MAX_EXPANSION * size):
        raise VideoError(f"{size} bytes would decode to {3 * pixels // 2**20} MiB; at most {MAX_EXPANSION}-fold")


def decoder_reason(error: Exception) -> str:
    """FFmpeg's own words without its error number and the file name."""
    return f"cannot be decoded: {getattr(error, 'strerror', None) or error}"
