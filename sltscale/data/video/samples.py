"""Where the coded pictures of a stored clip lie in its mp4 bytes: the sample table, read without FFmpeg.

FFmpeg's demuxer opens a decoder of its own and decodes the first pictures before it gives out any: 0.7 ms for a clip
that takes 8 ms to decode. Stored clips are the encoder's own output (one video track, one description), so the table is
all that is needed, and one decoder serves clip after clip. Boxes: ISO/IEC 14496-12.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

# FFmpeg's decoders; the one that it calls av1 needs a graphics card.
DECODERS = {b"avc1": "h264", b"hev1": "hevc", b"hvc1": "hevc", b"av01": "libdav1d", b"mp4v": "mjpeg"}
CONFIGURATIONS = (b"avcC", b"hvcC", b"av1C")
VISUAL_ENTRY = 78  # bytes of fixed fields in a visual sample entry, before its boxes


@dataclass(frozen=True)
class Samples:
    """decoder: FFmpeg's name. extradata: the decoder's configuration. places: offset and size of each coded picture."""

    decoder: str
    extradata: bytes
    places: list[tuple[int, int]]


def find_samples(data: bytes) -> Samples:
    """ValueError if these bytes are no mp4 with a video track of a known codec, or end before their pictures do."""
    try:
        table = _inside(data, 0, len(data), b"moov", b"trak", b"mdia", b"minf", b"stbl")
        boxes = {name: (begin, end) for name, begin, end in _boxes(data, *table)}
        decoder, extradata = _description(data, *boxes[b"stsd"])
        places = _places(data, boxes)
    except (struct.error, KeyError, StopIteration) as error:
        raise ValueError(f"no sample table ({error})") from None
    if not places or max(offset + size for offset, size in places) > len(data):
        raise ValueError("it has no pictures or ends before them")
    return Samples(decoder, extradata, places)


def _boxes(data: bytes, begin: int, end: int) -> Iterator[tuple[bytes, int, int]]:
    """(name, begin, end) of the contents of the boxes in data[begin:end]."""
    while begin + 8 <= end:
        size, name = struct.unpack_from(">I4s", data, begin)
        head = 8
        if size == 1:
            (size,) = struct.unpack_from(">Q", data, begin + 8)
            head = 16
        if size < head or begin + size > end:
            raise ValueError(f"a box of {size} bytes where {end - begin} are left")
        yield name, begin + head, begin + size
        begin += size


def _inside(data: bytes, begin: int, end: int, *path: bytes) -> tuple[int, int]:
    for name in path:
        begin, end = next((first, last) for found, first, last in _boxes(data, begin, end) if found == name)
    return begin, end


def _description(data: bytes, begin: int, end: int) -> tuple[str, bytes]:
    name, first, last = next(_boxes(data, begin + 8, end))  # after version, flags and the number of entries
    extradata = b""
    for inner, a, b in _boxes(data, first + VISUAL_ENTRY, last):
        if inner in CONFIGURATIONS:
            extradata = data[a:b]
    return DECODERS[name], extradata


def _places(data: bytes, boxes: dict[bytes, tuple[int, int]]) -> list[tuple[int, int]]:
    """Pictures lie one behind the other in chunks; a table says how many are in each."""
    begin, end = boxes[b"stsz"]
    fixed, count = struct.unpack_from(">II", data, begin + 4)
    if count > (len(data) // fixed if fixed else (end - begin) // 4):
        raise ValueError(f"{count} pictures in {len(data)} bytes")
    sizes = [fixed] * count if fixed else struct.unpack_from(f">{count}I", data, begin + 12)
    wide = b"co64" in boxes
    begin, _ = boxes[b"co64" if wide else b"stco"]
    (chunks,) = struct.unpack_from(">I", data, begin + 4)
    offsets = struct.unpack_from(f">{chunks}{'Q' if wide else 'I'}", data, begin + 8)
    begin, _ = boxes[b"stsc"]
    (runs,) = struct.unpack_from(">I", data, begin + 4)
    entries = [struct.unpack_from(">III", data, begin + 8 + 12 * run) for run in range(runs)]
    firsts = [0, *(first for first, _, _ in entries), chunks + 1]
    if any(a >= b for a, b in pairwise(firsts)):
        raise ValueError("its runs of chunks are not in order")
    places: list[tuple[int, int]] = []
    for run, (first, in_chunk, _) in enumerate(entries):
        last = entries[run + 1][0] - 1 if run + 1 < runs else chunks
        for chunk in range(first - 1, last):
            offset = offsets[chunk]
            for size in sizes[len(places) : len(places) + in_chunk]:
                places.append((offset, size))
                offset += size
    return places
