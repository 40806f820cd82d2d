"""Pack a corpus: python tools/make_shards.py --corpus openasl --annotations FILE.tsv --videos DIR --out shards/NAME."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from sltscale.data.clips import SPLITS
from sltscale.data.corpora import CORPORA
from sltscale.errors import InputError


def main() -> int:
    parser = argparse.ArgumentParser(description="Pack a corpus into WebDataset shards with an index (docs/data.md).")
    parser.add_argument("--corpus", required=True, help=f"one of {', '.join(CORPORA)}")
    parser.add_argument("--annotations", required=True, type=Path, help="the corpus's annotation file")
    parser.add_argument("--videos", required=True, type=Path, help="folder of the source videos")
    parser.add_argument("--out", required=True, type=Path, help="folder for tars, indexes and reports")
    parser.add_argument("--split", choices=SPLITS, help="pack only this split (default: all that the file has)")
    parser.add_argument("--frame-size", type=int, default=256, help="height and width in pixels (default 256)")
    parser.add_argument("--language", default="en", help="of the text, BCP-47 (default en)")
    parser.add_argument("--workers", type=int, help="processes (default: one per CPU)")
    parser.add_argument("--clips-per-shard", type=int, default=500, help="(default 500)")
    arguments = parser.parse_args()
    # Here, because worker processes import this file too and need none of it.
    from sltscale.data.shards import make_shards

    try:
        reports = make_shards(
            arguments.corpus,
            arguments.annotations,
            arguments.videos,
            arguments.out,
            splits=[arguments.split] if arguments.split else [],
            frame_size=arguments.frame_size,
            language=arguments.language,
            workers=arguments.workers,
            clips_per_shard=arguments.clips_per_shard,
        )
    except InputError as error:
        print(f"make_shards: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command goes on", file=sys.stderr)
        return 130
    for report in reports:
        print(report.summary())
        if report.rejected:
            print(f"  rejected clips by id and reason: {arguments.out / f'{report.split}.report.json'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
