"""Pack a corpus: python tools/make_shards.py --corpus openasl --annotations FILE.tsv --videos DIR --out shards/NAME."""

from __future__ import annotations

import argparse
import os
import re
import sys
from fractions import Fraction
from pathlib import Path

from sltscale.data.clips import SPLITS, Cutting
from sltscale.data.corpora import CORPORA
from sltscale.errors import InputError


def parser() -> argparse.ArgumentParser:
    main = argparse.ArgumentParser(description="Pack a corpus into WebDataset shards with an index (docs/data.md).")
    add = main.add_argument
    add("--corpus", required=True, help=f"one of {', '.join(CORPORA)} (docs/corpora.md)")
    add("--annotations", required=True, type=Path, nargs="+", metavar="FILE", help="the corpus's annotation files")
    add("--videos", type=Path, metavar="DIR", help="folder of the source videos, or of folders of frames")
    add("--captions", type=Path, metavar="DIR", help="folder of caption files (youtube_asl)")
    add("--split", choices=SPLITS, help="pack only this split; also that of annotations that name none")
    add("--language", help="of the text, BCP-47 (default: the corpus's)")
    add("--out", type=Path, metavar="DIR", help="folder for tars, indexes and reports")
    add("--frame-size", type=int, default=256, help="height and width in pixels (default 256)")
    add("--fps", type=_fraction, help="frames per second to keep at most, as 25 or 30000/1001 (default: all)")
    add("--aspect", default="squash", help="squash to the square, or keep and fill with black (default squash)")
    add("--crop", type=_box, metavar="L,T,R,B", help="shares of width and height, for clips without a crop box")
    add("--margin", type=float, default=0.0, help="by which a clip's crop box is grown, as a share (default 0)")
    add("--preset", default="h264", help="of the encoder: h264, hevc, av1 or jpeg (docs/cutting.md)")
    add("--workers", type=int, help="processes (default: one per CPU)")
    add("--clips-per-shard", type=int, default=500, help="(default 500)")
    add("--part", type=_part, metavar="I/N", help="only every N-th shard from I on; then: sltscale shards merge DIR")
    add("--dry-run", action="store_true", help="what all of it would give, from the annotations alone; then end")
    return main


def main() -> int:
    options = parser().parse_args()
    try:
        return run(options)
    except InputError as error:
        print(f"make_shards: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt:
        print("interrupted; the same command goes on", file=sys.stderr)
        return 130


def run(options: argparse.Namespace) -> int:
    # Here, because worker processes import this file too and need none of it.
    from sltscale.data.shards.forecast import dry_run
    from sltscale.data.shards.writing import make_shards

    size, fps, aspect = options.frame_size, options.fps, options.aspect
    cutting = Cutting(size, fps, aspect, margin=options.margin, preset=options.preset, crop=options.crop)
    reading = {"captions": options.captions, "split": options.split, "language": options.language}
    if options.dry_run:
        for line in dry_run(options.corpus, options.annotations, options.videos, cutting=cutting, **reading):
            print(line)
        sys.stdout.flush()
        return 0
    if options.videos is None or options.out is None:
        raise InputError("--videos and --out are needed, except with --dry-run")
    reports = make_shards(
        options.corpus,
        options.annotations,
        options.videos,
        options.out,
        cutting=cutting,
        workers=options.workers,
        clips_per_shard=options.clips_per_shard,
        part=options.part,
        **reading,
    )
    for report in reports:
        print(report.summary())
    if options.part:
        number, count = options.part
        print(f"part {number}/{count} is packed; when all {count} are: sltscale shards merge {options.out}")
    else:
        print(f"rejected clips by id, texts, durations and pictures to look at: {options.out / 'report.html'}")
    return 0


def _fraction(text: str) -> Fraction:
    if not re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,9}|/[1-9][0-9]{0,8})?", text):
        raise argparse.ArgumentTypeError(f"{text!r}; expected a rate such as 25, 12.5 or 30000/1001")
    return Fraction(text)


def _box(text: str) -> tuple[float, float, float, float]:
    try:
        left, top, right, bottom = map(float, text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}; expected four shares such as 0.1,0,0.9,1") from None
    return left, top, right, bottom


def _part(text: str) -> tuple[int, int]:
    try:
        number, count = map(int, text.split("/"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}; expected I/N such as 0/16") from None
    return number, count


if __name__ == "__main__":
    sys.exit(main())
