"""Size against speed of the presets for stored clips: python tools/bench_presets.py [--video FILE ...] [--rounds N].

For every preset, on the same drawn signing and on each --video: bytes a frame, and frames per CPU-second of packing
(decode the source, resize, encode), of decoding, of decoding and handing over the planes as the training stream does,
and of decoding to RGB. PSNR is of the decoded RGB against the resized source, the colour resolution halved as in every
preset. CPU time counts all threads of the process; the best of the rounds is printed.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np

from sltscale.data.clips import Clip, Cutting
from sltscale.data.synthetic.drawing import Painter, draw_signer
from sltscale.data.synthetic.signs import FORMS, perform
from sltscale.data.video.cutting import pack_clip, source_frames
from sltscale.data.video.encoding import SourceFrame, encode
from sltscale.data.video.presets import PRESETS
from sltscale.data.video.stored import decode_clip, decode_yuv
from sltscale.errors import InputError

DRAWN_SIZE, DRAWN_SIGNERS = 512, 4
COLUMNS = ("bytes/frame", "packing", "decode", "planes", "RGB", "PSNR dB")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--video", type=Path, nargs="+", default=[], help="footage to measure beside the drawn signing")
    parser.add_argument("--frame-size", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    try:
        with tempfile.TemporaryDirectory() as folder:
            drawn = [_draw(Path(folder) / f"{number}.mp4", number) for number in range(DRAWN_SIGNERS)]
            _measure("drawn signing", drawn, arguments.frame_size, arguments.rounds)
            if arguments.video:
                names = ", ".join(path.name for path in arguments.video)
                _measure(names, arguments.video, arguments.frame_size, arguments.rounds)
    except InputError as error:
        print(f"bench_presets: {error}", file=sys.stderr)
        return 2
    return 0


def _draw(path: Path, number: int) -> Path:
    """A dozen signs by one signer, as an h264 file."""
    painter = Painter(draw_signer(0, number), DRAWN_SIZE)
    signs = sorted(FORMS)[number * 12 : number * 12 + 12]
    times = np.linspace(0, 1, 15)
    poses = [pose for sign in signs for pose in perform(FORMS[sign], times)]
    pictures = (np.asarray(painter.draw(pose)) for pose in poses)
    frames = (SourceFrame(picture, pts, 1, Fraction(1, 25)) for pts, picture in enumerate(pictures))
    path.write_bytes(encode(frames).data)
    return path


def _measure(name: str, paths: list[Path], size: int, rounds: int) -> None:
    clips = [Clip(path.name, path, None, None, text="", language="", split="train") for path in paths]
    sources = [np.stack([frame.rgb for frame in source_frames(path, size=size)]) for path in paths]
    count = sum(len(source) for source in sources)
    print(f"{name}: {len(clips)} clips, {count} frames at {size} px; frames per CPU-second")
    print(f"{'':8}" + "".join(f"{column:>13}" for column in COLUMNS))
    corners = [np.empty((len(source), 3, 2), np.uint8) for source in sources]
    planes = [np.empty((len(source), size * 3 // 2, size), np.uint8) for source in sources]
    for preset in PRESETS:
        cutting = Cutting(size, preset=preset)
        stored = [pack_clip(clip, cutting).data for clip in clips]
        rates = (
            count / _seconds(rounds, pack_clip, clips, [cutting] * len(clips)),
            count / _seconds(rounds, _decode, stored, corners),
            count / _seconds(rounds, _decode, stored, planes),
            count / _seconds(rounds, decode_clip, stored),
        )
        columns = (sum(map(len, stored)) / count, *rates)
        print(f"{preset:8}" + "".join(f"{value:13.0f}" for value in columns) + f"{_psnr(stored, sources):13.2f}")


def _decode(data: bytes, out: np.ndarray) -> None:
    """All frames; of each a window of the size of ``out``: two by two pixels cost next to nothing."""
    decode_yuv(data, range(len(out)), out, 0, 0)


def _seconds(rounds: int, work: Callable[..., object], *arguments: Sequence[object]) -> float:
    """CPU seconds of the quickest round of work over all clips."""
    times = []
    for _ in range(rounds):
        begin = time.process_time()
        for some in zip(*arguments, strict=True):
            work(*some)
        times.append(time.process_time() - begin)
    return min(times)


def _psnr(stored: list[bytes], sources: list[np.ndarray]) -> float:
    """Mean over the frames."""
    values: list[float] = []
    for data, source in zip(stored, sources, strict=True):
        difference = decode_clip(data).transpose(0, 2, 3, 1).astype(np.float32) - source
        errors = np.maximum((difference**2).mean(axis=(1, 2, 3)), 1e-6)
        values += (10 * np.log10(255**2 / errors)).tolist()
    return float(np.mean(values))


if __name__ == "__main__":
    sys.exit(main())
