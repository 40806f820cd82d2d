"""``sltscale translate``: sentences for video files."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sltscale.commands.arguments import Commands, positive
from sltscale.errors import InputError

if TYPE_CHECKING:
    from sltscale.evaluation.clip_files import Translated

STDIN = "-"


def add(commands: Commands) -> None:
    command = commands.add_parser("translate", help="translate video files")
    command.add_argument("--run", type=Path, required=True, help="run folder")
    command.add_argument("--language", help="BCP-47 code, if the run knows more than one")
    command.add_argument("--n-best", type=positive, default=1, metavar="N", help="the N best sentences, with scores")
    command.add_argument("--beams", type=positive, help="instead of the recipe's")
    command.add_argument("--json", action="store_true", help="a JSON object a clip, one a line")
    command.add_argument(
        "clips", nargs="+", metavar="CLIP", help="video file, folder of such or of images, or - for paths from stdin"
    )
    command.set_defaults(work=translate)


def translate(options: argparse.Namespace, _: Sequence[str]) -> int:
    from tqdm import tqdm

    from sltscale.engine.finished import default_device, load_run
    from sltscale.evaluation.clip_files import translate_files
    from sltscale.models.translator import Translator

    device = default_device()
    model = load_run(options.run, device)
    if not isinstance(model.method, Translator):
        raise InputError(f"{options.run} is a {model.recipe.method.name} run; sltscale translate needs translation")
    known = model.tokenizer.languages
    if options.language is None and len(known) > 1:
        raise InputError(f"the run knows {', '.join(known)}; choose one with --language")
    language = options.language or "".join(known)
    recipe = model.recipe
    if options.beams is not None:
        evaluation = recipe.evaluation.model_copy(update={"beams": options.beams})
        recipe = recipe.model_copy(update={"evaluation": evaluation})

    paths: Iterable[Path] = _paths(options.clips)
    total = None
    if STDIN not in options.clips:
        paths = list(paths)
        total = len(paths)
    sys.stdout.reconfigure(errors="surrogateescape")  # type: ignore[union-attr]  # paths that are no UTF-8, as they were
    results = translate_files(model.method, model.tokenizer, recipe, paths, language, device, options.n_best)
    clips = faults = 0
    with tqdm(results, total=total, desc="translating", unit="clip", disable=None) as bar:
        for result in bar:
            clips += 1
            if result.fault is not None:
                faults += 1
                tqdm.write(f"error: {result.fault}", file=sys.stderr)
            with bar.external_write_mode(file=sys.stdout):
                for line in _lines(result, options.json, options.n_best):
                    print(line, flush=True)
    if faults and clips > 1:
        print(f"error: {faults} of {clips} clips could not be translated, see above", file=sys.stderr)
    return 2 if faults else 0


def _paths(clips: Sequence[str]) -> Iterator[Path]:
    from sltscale.evaluation.clip_files import clips_in

    for clip in clips:
        given = (os.fsdecode(line.rstrip(b"\r\n")) for line in sys.stdin.buffer) if clip == STDIN else iter([clip])
        yield from (inside for path in given if path for inside in clips_in(Path(path)))


def _lines(result: Translated, as_json: bool, n: int) -> Iterator[str]:
    """A JSON object with "path" and "sentences" (or "error"); otherwise path and sentence, with the score between them
    where several are asked for."""
    if as_json:
        found = [{"text": sentence.text, "score": sentence.score} for sentence in result.sentences]
        about = {"sentences": found} if result.fault is None else {"error": result.fault}
        yield json.dumps({"path": str(result.path), **about}, ensure_ascii=False)
        return
    for sentence in result.sentences:
        yield "\t".join([str(result.path), *([f"{sentence.score:.4f}"] if n > 1 else []), sentence.text])
