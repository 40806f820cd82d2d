"""How stored clips may be encoded: names for trade-offs of size against speed, measured in docs/cutting.md.

Whatever the preset, a stored clip is an mp4 of 8-bit YUV 4:2:0 pictures in BT.601 and limited range, in short groups,
made on one thread, and its bytes depend on the frames alone.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Preset:
    """codec: FFmpeg's name of the encoder. options: its settings. min_size: the least height and width it is used for.

    flagged: the colours are written into the stream. Readers take BT.601 in limited range where nothing is written.
    """

    codec: str
    options: dict[str, str]
    min_size: int = 16
    flagged: bool = True


PRESETS = {
    # Short groups and fastdecode (no deblocking, no CABAC) double the speed of decoding for a third more bytes. With
    # mbtree, x264's AVX-512 code gives other bytes in one run of ten; without, as many bytes and 0.5 dB less.
    "h264": Preset(
        "libx264", {"crf": "23", "g": "25", "tune": "fastdecode", "mbtree": "0", "threads": "1"}, flagged=False
    ),
    # x265 gives other bytes in every run for pictures of one coding unit (64 pixels), and below writes past its memory.
    "hevc": Preset(
        "libx265",
        {
            "crf": "26",
            "g": "25",
            "preset": "fast",
            "tune": "fastdecode",
            "x265-params": "pools=none:frame-threads=1:wpp=0:log-level=none:info=0",
            "threads": "1",
        },
        min_size=96,
    ),
    "av1": Preset(
        "libsvtav1",
        {"crf": "38", "g": "25", "preset": "8", "svtav1-params": "lp=1:fast-decode=1", "threads": "1"},
    ),
    # Every frame by itself. Limited range in MJPEG is FFmpeg's own extension ("unofficial") and marked in the stream.
    "jpeg": Preset("mjpeg", {"qmin": "4", "qmax": "4", "strict": "unofficial", "threads": "1"}),
}
