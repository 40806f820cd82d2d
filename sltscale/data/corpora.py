"""Corpora as their authors publish them: one reader each, from annotations and videos to Clip records.

A reader takes annotation files and the folder of videos (None: nothing is looked up on disk). It rejects single rows
with file, line and reason and goes on; it raises InputError when a file as a whole is unusable. To add a corpus, write
its reader and put its name into CORPORA. docs/corpora.md says what each expects and what it does about quirks.
"""

from __future__ import annotations

import contextlib
import difflib
import re
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path, PurePosixPath
from typing import Any

from sltscale.data.annotations.captions import SUFFIXES, Cue, read_cues
from sltscale.data.annotations.labels import is_labels, label_images, read_labels
from sltscale.data.annotations.reading import SPLIT_NAMES, Corpus, Reading, file_split
from sltscale.data.annotations.sources import Sources, folder_names
from sltscale.data.annotations.tables import BadRow, Row, read_json_rows, read_lines, read_rows, seconds, span
from sltscale.data.clips import SPLITS, Clip
from sltscale.errors import InputError

PHOENIX_FPS, CSL_FPS = Fraction(25), Fraction(30)
# YouTube-ASL's own filter (arXiv 2306.15162).
MAX_CHARACTERS, MIN_MILLISECONDS, MAX_MILLISECONDS = 300, 200, 60_000

Reader = Callable[..., Corpus]


def phoenix2014t(
    annotations: Sequence[Path], videos: Path | None, *, language: str = "de", split: str | None = None
) -> Corpus:
    """RWTH-PHOENIX-Weather 2014 T: the official ``|``-separated files or pickled labels, told apart by content.

    Official columns: name, video (``NAME/1/*.png``), start and end (-1), speaker, orth, translation. Frames are images
    in folders, at 25 per second.
    """
    reading, sources = Reading(), Sources(videos)
    columns = ("name", "video", "start", "end", "speaker", "orth", "translation")
    for path in annotations:
        if is_labels(path):
            _phoenix_labels(path, reading, sources, language, split)
            continue
        of_file = file_split(path, split)
        for row in read_rows(path, columns, separator="|"):
            with reading.row(path, row.line, row.get("name"), of_file):
                if (row["start"], row["end"]) != ("-1", "-1"):
                    raise BadRow(f"start {row['start']!r}, end {row['end']!r}: expected -1 and -1, all of the images")
                source = sources.frames(re.sub(r"/[^/]*\*[^/]*$", "", row["video"]), of_file)
                text, signer = row["translation"].strip(), row["speaker"]
                clip = Clip(row["name"], source, None, None, text, language, of_file, row.line, signer, fps=PHOENIX_FPS)
                reading.add(clip, path)
    return reading.corpus()


LANGUAGE_CODE = r"[A-Za-z]{2,3}(-[A-Za-z0-9]{1,8})*"  # as in BCP 47
_OTHER_LENGTH = "labels whose length is not their number of images"


def _phoenix_labels(path: Path, reading: Reading, sources: Sources, language: str, split: str | None) -> None:
    for number, id, label, of_clip in _labels(path, split):
        with reading.row(path, number, id, of_clip):
            told, images = label_images(label)
            source = sources.frames(told, of_clip)
            text, signer = label["text"].strip(), label.get("signer", "")
            clip = Clip(id, source, None, None, text, language, of_clip, number, signer, None, images, PHOENIX_FPS)
            reading.add(clip, path)
            reading.notes[_OTHER_LENGTH] += label.get("length", len(images)) != len(images)


def csl_daily(
    annotations: Sequence[Path], videos: Path | None, *, language: str = "zh", split: str | None = None
) -> Corpus:
    """CSL-Daily from pickled labels: keys ``Sxxxxxx_Pxxxx_Txx``, of which Pxxxx is the signer.

    Frames are images in folders, at 30 per second; where a clip's folder is missing, a video named like the clip.
    """
    reading, sources = Reading(), Sources(videos)
    for path in annotations:
        for number, id, label, of_clip in _labels(path, split):
            with reading.row(path, number, id, of_clip):
                told, images = label_images(label)
                other_length = label.get("length", len(images)) != len(images)
                fps: Fraction | None = CSL_FPS
                try:
                    source = sources.frames(told, of_clip)
                except BadRow:
                    source, images, fps = sources.video(id), (), None
                signer = re.fullmatch(r"S[0-9]+_(P[0-9]+)_T[0-9]+", id)
                text, name = label["text"].strip(), signer[1] if signer else ""
                clip = Clip(id, source, None, None, text, language, of_clip, number, name, None, images, fps)
                reading.add(clip, path)
                reading.notes[_OTHER_LENGTH] += other_length
                reading.notes["ids that do not name their signer"] += signer is None
    return reading.corpus()


def how2sign(
    annotations: Sequence[Path], videos: Path | None, *, language: str = "en", split: str | None = None
) -> Corpus:
    """How2Sign's realigned sentences: tab-separated, though the files are called .csv; times in seconds.

    SENTENCE_NAME is the id (SENTENCE_ID repeats), VIDEO_NAME the video; it ends in ``-SIGNER-rgb_front``. Text that was
    encoded as UTF-8 twice is repaired.
    """
    reading, sources = Reading(), Sources(videos)
    columns = ("VIDEO_NAME", "SENTENCE_ID", "SENTENCE_NAME", "START_REALIGNED", "END_REALIGNED", "SENTENCE")
    sentence_ids: set[str] = set()
    for path in annotations:
        of_file = file_split(path, split)
        for row in read_rows(path, columns):
            with reading.row(path, row.line, row.get("SENTENCE_NAME"), of_file):
                text = _encoded_once(row["SENTENCE"])
                start, end = span(row["START_REALIGNED"], row["END_REALIGNED"])
                source = sources.video(row["VIDEO_NAME"])
                signer = re.search(r"-([0-9]+)-rgb_front$", row["VIDEO_NAME"])
                name = signer[1] if signer else ""
                id = row["SENTENCE_NAME"]
                reading.add(Clip(id, source, start, end, text.strip(), language, of_file, row.line, name), path)
                reading.notes["texts repaired that were encoded as UTF-8 twice"] += text != row["SENTENCE"]
                reading.notes["clips that repeat an earlier SENTENCE_ID"] += row["SENTENCE_ID"] in sentence_ids
                sentence_ids.add(row["SENTENCE_ID"])
    return reading.corpus()


def openasl(
    annotations: Sequence[Path], videos: Path | None, *, language: str = "en", split: str | None = None
) -> Corpus:
    """OpenASL's tab-separated file (arXiv 2205.12870): vid, yid, start, end, raw-text, tokenized-text, gloss, split.

    The video is named by yid; the span is HH:MM:SS.mmm, or both times empty for the whole file; the text is raw-text;
    split ``valid`` is dev. Every row tells its split.
    """
    reading, sources = Reading(), Sources(videos)
    columns = ("vid", "yid", "start", "end", "raw-text", "tokenized-text", "gloss", "split")
    for path in annotations:
        for row in read_rows(path, columns):
            of_row = SPLIT_NAMES.get(row.get("split"), "")
            with reading.row(path, row.line, row.get("vid"), of_row):
                if row["split"] not in SPLIT_NAMES:
                    raise BadRow(f"unknown split {row['split']!r}")
                whole = not row["start"] and not row["end"]
                start, end = (None, None) if whole else span(row["start"], row["end"])
                source, text = sources.video(row["yid"]), row["raw-text"].strip()
                reading.add(Clip(row["vid"], source, start, end, text, language, of_row, row.line), path)
    return reading.corpus()


def youtube_asl(
    annotations: Sequence[Path],
    videos: Path | None,
    *,
    language: str = "en",
    split: str | None = None,
    captions: Path | None = None,
) -> Corpus:
    """YouTube-ASL (arXiv 2306.15162): files of one video id a line, and a caption file per video.

    captions: their folder (the folder of videos, if not given); ID.vtt, ID.LANGUAGE.vtt or the same as .srt. A caption
    is a clip, its text untouched, unless its authors' filter drops it: over 300 characters, under 0.2 s or over 60 s.
    All is of one split, train if not given.
    """
    caption_folder = captions or videos
    if caption_folder is None:
        raise InputError("youtube_asl needs the folder of caption files; give --captions")
    reading, sources, caption_files = Reading(), Sources(videos), _caption_files(caption_folder)
    of_clip = split or "train"
    listed: dict[str, int] = {}
    for path in annotations:
        for line, text in enumerate(read_lines(path), start=1):
            id = text.strip()
            if not id:
                continue
            with reading.row(path, line, id, of_clip):
                if re.search(r"[\s,;|]", id):
                    raise BadRow("expected one video id and nothing else in the line")
                if id in listed:
                    raise BadRow(f"id already used in line {listed[id]}")
                listed[id] = line
                source = sources.video(id)
                file = caption_folder / _caption_file(id, caption_files.get(id, []), language)
                with reading.row(file, 0, id, of_clip):
                    for cue in read_cues(file):
                        with reading.row(file, cue.line, f"{id}-{cue.number}", of_clip):
                            reading.add(_caption_clip(id, source, cue, language, of_clip), file)
    reading.notes["caption files read"] = len({clip.path for clip in reading.clips})
    return reading.corpus()


def _caption_clip(video_id: str, source: Path, cue: Cue, language: str, split: str) -> Clip:
    length = cue.end - cue.start
    if cue.fault:
        raise BadRow(cue.fault)
    if length < 0:
        raise BadRow(f"ends at {cue.end / 1000:.3f} s, before its start at {cue.start / 1000:.3f} s")
    if length < MIN_MILLISECONDS:
        raise BadRow(f"lasts {length / 1000:.3f} s, under {MIN_MILLISECONDS / 1000} s")
    if length > MAX_MILLISECONDS:
        raise BadRow(f"lasts {length / 1000:.3f} s, over {MAX_MILLISECONDS / 1000} s")
    if len(cue.text) > MAX_CHARACTERS:
        raise BadRow(f"{len(cue.text)} characters, over {MAX_CHARACTERS}")
    start, end = Fraction(cue.start, 1000), Fraction(cue.end, 1000)
    return Clip(f"{video_id}-{cue.number}", source, start, end, cue.text, language, split, cue.line)


def _caption_files(folder: Path) -> dict[str, list[str]]:
    """Names of caption files by each video id that they may belong to; ids may hold dots."""
    files: dict[str, list[str]] = {}
    for name in sorted(folder_names(folder)):
        stem, dot, suffix = name.rpartition(".")
        if f"{dot}{suffix}" in SUFFIXES:
            files.setdefault(stem, []).append(name)
            if "." in stem:
                files.setdefault(stem.rpartition(".")[0], []).append(name)
    return files


def _caption_file(video_id: str, names: Sequence[str], language: str) -> str:
    """ID.LANGUAGE.vtt, ID.vtt or ID.LANGUAGE-REGION.vtt, in this order, and each before the same as .srt."""
    tags = {name: name[len(video_id) :].rpartition(".")[0].removeprefix(".") for name in names}
    usable = [name for name, tag in tags.items() if tag in ("", language) or tag.startswith(f"{language}-")]
    if not usable:
        found = f"; found {', '.join(sorted(set(tags.values())))}" if tags else ""
        raise BadRow(f"no captions in language {language}{found}")
    return min(usable, key=lambda name: (tags[name] != language, tags[name] != "", name.endswith(".srt"), name))


def folder(
    annotations: Sequence[Path], videos: Path | None, *, language: str = "en", split: str | None = None
) -> Corpus:
    """Any folder of videos, listed in a tab-separated file with a header or in JSON lines.

    text and file (inside the folder) are required; id, start, end (seconds or HH:MM:SS.mmm), language, split, signer
    and crop ("left,top,width,height" in pixels) are not. Without an id, the file's name without suffix is it, with
    start and end behind if there are any.
    """
    reading, sources = Reading(), Sources(videos)
    for path in annotations:
        for row in _folder_rows(path):
            told = row.get("split")
            of_row = SPLIT_NAMES.get(told, "") if told else file_split(path, split)
            with reading.row(path, row.line, row.get("id") or row.get("file"), of_row):
                reading.add(_folder_clip(row, sources, row.get("language") or language, of_row), path)
                for column in sorted(row.values.keys() - _FOLDER_COLUMNS):
                    reading.notes[f"column {column!r} is not used"] += 1
    return reading.corpus()


_FOLDER_COLUMNS = {"id", "file", "text", "start", "end", "language", "split", "signer", "crop"}


def _folder_rows(path: Path) -> Iterator[Row]:
    is_json = read_lines(path)[0].lstrip().startswith("{")
    return read_json_rows(path, ("file", "text")) if is_json else read_rows(path, ("file", "text"))


def _folder_clip(row: Row, sources: Sources, language: str, split: str) -> Clip:
    text, file, start, end = row["text"].strip(), row["file"], row.get("start"), row.get("end")
    if not split:
        raise BadRow(f"unknown split {row['split']!r}")
    if not re.fullmatch(LANGUAGE_CODE, language):
        raise BadRow(f"{language[:40]!r} is no language code such as de or en-US")
    if start and end:
        span(start, end)
    name = str(PurePosixPath(file).with_suffix("")) if file else ""
    return Clip(
        id=row.get("id") or "-".join(part for part in (name, start, end) if part),
        path=sources.file(file),
        start=seconds(start) if start else None,
        end=seconds(end) if end else None,
        text=text,
        language=language,
        split=split,
        line=row.line,
        signer=row.get("signer"),
        crop=_crop(row.get("crop")),
    )


def _crop(text: str) -> tuple[int, int, int, int] | None:
    if not text:
        return None
    match = re.fullmatch(r"\s*([0-9]{1,5})" + r"\s*,\s*([0-9]{1,5})" * 3 + r"\s*", text)
    if match is None or not int(match[3]) or not int(match[4]):
        raise BadRow(f"crop {text[:40]!r}: expected left,top,width,height in pixels")
    return int(match[1]), int(match[2]), int(match[3]), int(match[4])


CORPORA: dict[str, Reader] = {
    "phoenix2014t": phoenix2014t,
    "csl_daily": csl_daily,
    "how2sign": how2sign,
    "openasl": openasl,
    "youtube_asl": youtube_asl,
    "folder": folder,
}


def read_corpus(
    name: str,
    annotations: Sequence[Path],
    videos: Path | None,
    *,
    language: str | None = None,
    split: str | None = None,
    captions: Path | None = None,
) -> Corpus:
    """What the corpus reader of that name gives.

    videos: None looks nothing up on disk, so that annotations can be read without them. language: of the text (BCP-47;
    the corpus's own, if not given). split: of annotation files whose name and rows do not tell it. InputError for an
    unknown name, with the nearest, and where a file as a whole is unusable.
    """
    if name not in CORPORA:
        close = difflib.get_close_matches(name, CORPORA, n=1)
        known = f"did you mean {close[0]}?" if close else f"known: {', '.join(CORPORA)}"
        raise InputError(f"unknown corpus {name!r}; {known}")
    if split is not None and split not in SPLITS:
        raise InputError(f"unknown split {split!r}; expected {', '.join(SPLITS)}")
    if language is not None and not re.fullmatch(LANGUAGE_CODE, language):
        raise InputError(f"{language[:40]!r} is no language code such as de or en-US")
    if captions is not None and name != "youtube_asl":
        raise InputError(f"corpus {name} has no caption files; leave --captions out")
    given: dict[str, Any] = {"language": language, "captions": captions}
    options = {option: value for option, value in given.items() if value is not None}
    return CORPORA[name](annotations, videos, split=split, **options)


def _labels(path: Path, split: str | None) -> Iterator[tuple[int, str, dict[str, Any], str]]:
    """Number (from 1), key, fields and split of each clip; the split is the key's part before a slash or the file's."""
    for number, (key, label) in enumerate(read_labels(path).items(), start=1):
        told = SPLIT_NAMES.get(key.partition("/")[0]) if "/" in key else None
        yield number, key, label, told or file_split(path, split)


def _encoded_once(text: str) -> str:
    """Text without a second UTF-8 encoding: not ASCII, and as Latin-1 or Windows-1252 bytes valid UTF-8 throughout."""
    if not text.isascii():
        for encoding in ("latin-1", "cp1252"):
            with contextlib.suppress(UnicodeError):
                return text.encode(encoding).decode("utf-8")
    return text
