"""Draw the synthetic signing corpus: python tools/make_synthetic.py --out DIR --clips N --seed S [--language de|en]."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from sltscale.data.synthetic.corpus import contact_sheet, make_corpus
from sltscale.data.synthetic.language import LANGUAGES
from sltscale.errors import InputError


def main() -> int:
    parser = argparse.ArgumentParser(description="Draw the synthetic signing corpus (docs/synthetic.md).")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--out", type=Path, help="folder for annotations.tsv, videos.tsv and videos/")
    what.add_argument("--contact-sheet", type=Path, metavar="FILE.png", help="only draw some signers and signs")
    parser.add_argument("--clips", type=int, default=2400, help="sentences over all splits (default 2400)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--language", choices=LANGUAGES, default="de", help="of the text (default de)")
    parser.add_argument("--workers", type=int, help="processes (default: one per CPU)")
    arguments = parser.parse_args()
    try:
        if arguments.contact_sheet is not None:
            _save_contact_sheet(arguments.contact_sheet, arguments.seed)
            return 0
        begin = time.monotonic()
        annotations = make_corpus(
            arguments.out,
            clips=arguments.clips,
            seed=arguments.seed,
            language=arguments.language,
            workers=arguments.workers,
        )
    except InputError as error:
        print(f"make_synthetic: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command goes on", file=sys.stderr)
        return 130
    print(f"{annotations}: {arguments.clips} clips in {time.monotonic() - begin:.0f} s")
    return 0


def _save_contact_sheet(path: Path, seed: int) -> None:
    try:
        contact_sheet(seed).save(path, format="PNG", optimize=True)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror}); give another file") from None


if __name__ == "__main__":
    sys.exit(main())
