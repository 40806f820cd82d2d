"""A corpus of drawn signers in a sign language of its own, as h264 videos and a TSV in OpenASL's format.

It is what a first run and the tests train on when no real corpus is at hand. It shows that the software works and that
a model reads the video; it is not sign language, and no score on it says anything about sign language translation.

    out/annotations.tsv     vid, yid, start, end, raw-text, tokenized-text, gloss, split - as OpenASL; written last
    out/videos.tsv          yid, signer (its number)
    out/videos/<yid>.mp4    up to SENTENCES_PER_VIDEO sentences by one signer, with short pauses

The language is in ``synthetic_language``, the movements in ``synthetic_signs``, the pictures in ``synthetic_drawing``.
"""

from __future__ import annotations

import base64
import csv
import hashlib
import itertools
import multiprocessing
import os
import random
from collections.abc import Iterable, Iterator, Sequence, Set
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image, ImageDraw
from tqdm import tqdm

from sltscale.data.shards.packing import follow_parent
from sltscale.data.synthetic.drawing import Painter, draw_signer
from sltscale.data.synthetic.language import LANGUAGES, Language, Sentence, draw_sentence
from sltscale.data.synthetic.signs import FORMS, perform, perform_sentences
from sltscale.errors import InputError

FRAME_SIZE = 96
FRAME_RATES = (Fraction(25), Fraction(30000, 1001), Fraction(24))
TRAIN_SIGNERS, TEST_SIGNERS = 16, 4
SENTENCES_PER_VIDEO = 4
COLUMNS = ("vid", "yid", "start", "end", "raw-text", "tokenized-text", "gloss", "split")
ANNOTATIONS, SIGNERS, VIDEOS = "annotations.tsv", "videos.tsv", "videos"
# The language has enough sentences that as many can be held out; above this a larger corpus only grows in train.
_MAX_DEV, _MAX_TEST = 500, 1000


@dataclass(frozen=True)
class _Video:
    """One source video to be drawn. split as OpenASL spells it: train, valid, test."""

    seed: int
    number: int
    split: str
    signer: int
    sentences: tuple[Sentence, ...]

    @property
    def yid(self) -> str:
        """Eleven characters of YouTube's alphabet, some with a leading "-", as real ids have."""
        digest = hashlib.sha256(f"{self.seed} {self.number}".encode()).digest()
        return base64.urlsafe_b64encode(digest[:8]).decode().rstrip("=")


def make_corpus(
    out: Path, *, clips: int, seed: int, language: Language = "de", workers: int | None = None, progress: bool = True
) -> Path:
    """Draw a corpus of ``clips`` sentences into the folder ``out``; returns the path of its annotations.tsv.

    About 5 % of the sentences are dev (at most 500), 10 % test (at most 1000), at least one each. No sentence of dev
    or test stands anywhere else, and test has its own signers. The same seed gives the same bytes with any number of
    ``workers`` (default: one per CPU); the language changes the text only. An interrupted call is completed by the
    same call. The calling script must be importable without side effects, since workers are spawned.

    Raises InputError if clips < 3, the language is unknown, or ``out`` cannot be written or holds anything else.
    """
    if clips < 3:
        raise InputError(f"clips is {clips}; expected at least 3, one each for train, dev and test")
    if language not in LANGUAGES:
        raise InputError(f"unknown language {language!r}; expected one of {', '.join(LANGUAGES)}")
    if workers is not None and workers < 1:
        raise InputError(f"workers is {workers}; expected at least 1")
    videos = _plan(clips, seed)
    _prepare(out, videos)
    jobs = [(video, out / VIDEOS / f"{video.yid}.mp4") for video in videos]
    rows: list[Sequence[str]] = []
    with tqdm(total=clips, unit="clip", desc="drawing", disable=None if progress else True) as bar:
        for video, spans in zip(videos, _drawn(jobs, workers or len(os.sched_getaffinity(0))), strict=True):
            rows += [
                _row(video, sentence, *span, language) for sentence, span in zip(video.sentences, spans, strict=True)
            ]
            bar.update(len(spans))
    _write_tsv(out / SIGNERS, ("yid", "signer"), [(video.yid, str(video.signer)) for video in videos])
    _write_tsv(out / ANNOTATIONS, COLUMNS, rows)
    return out / ANNOTATIONS


def contact_sheet(seed: int = 0) -> Image.Image:
    """Six signers (the last two of the test split) at the middle of eight signs each, RGB."""
    signs = ("TOMORROW", "PICTURE", "FIVE", "TEACHER", "BUY", "LOSE", "NOT", "QUESTION")
    signers = (0, 1, 2, 3, TRAIN_SIGNERS, TRAIN_SIGNERS + 1)
    heading = 14
    sheet = Image.new("RGB", (len(signs) * FRAME_SIZE, len(signers) * FRAME_SIZE + heading), "white")
    for row, number in enumerate(signers):
        painter = Painter(draw_signer(seed, number), FRAME_SIZE)
        for column, sign in enumerate(signs):
            pose = perform(FORMS[sign], np.array([0.6]))[0]
            sheet.paste(painter.draw(pose), (column * FRAME_SIZE, heading + row * FRAME_SIZE))
    draw = ImageDraw.Draw(sheet)
    for column, sign in enumerate(signs):
        draw.text((column * FRAME_SIZE + 4, 1), sign, fill="black")
    return sheet


def _plan(clips: int, seed: int) -> list[_Video]:
    rng = random.Random(f"sentences {seed}")  # noqa: S311
    dev, test = min(max(1, clips // 20), _MAX_DEV), min(max(1, clips // 10), _MAX_TEST)
    used: set[Sentence] = set()
    held_out = [_new_sentence(rng, used) for _ in range(dev + test)]
    train = list(_mostly_new(rng, used, clips - dev - test))
    parts = (
        ("train", train, 0, TRAIN_SIGNERS),
        ("valid", held_out[:dev], 0, TRAIN_SIGNERS),
        ("test", held_out[dev:], TRAIN_SIGNERS, TEST_SIGNERS),
    )
    videos: list[_Video] = []
    for split, sentences, first_signer, signers in parts:
        for n, start in enumerate(range(0, len(sentences), SENTENCES_PER_VIDEO)):
            some = tuple(sentences[start : start + SENTENCES_PER_VIDEO])
            videos.append(_Video(seed, len(videos), split, first_signer + n % signers, some))
    return videos


def _new_sentence(rng: random.Random, used: set[Sentence]) -> Sentence:
    while (sentence := draw_sentence(rng)) in used:
        pass
    used.add(sentence)
    return sentence


def _mostly_new(rng: random.Random, held_out: Set[Sentence], count: int) -> Iterator[Sentence]:
    """Sentences outside held_out; new ones while a few draws find one, so that a corpus may be of any size."""
    seen: set[Sentence] = set()
    for _ in range(count):
        for attempt in itertools.count():
            sentence = draw_sentence(rng)
            if sentence not in held_out and (sentence not in seen or attempt >= 8):
                break
        seen.add(sentence)
        yield sentence


def _prepare(out: Path, videos: Sequence[_Video]) -> None:
    ours = {ANNOTATIONS + ".part", SIGNERS, SIGNERS + ".part", VIDEOS}
    ours |= {f"{VIDEOS}/{video.yid}.mp4" for video in videos}
    try:
        (out / VIDEOS).mkdir(parents=True, exist_ok=True)
        found = sorted(str(path.relative_to(out)) for path in (*out.iterdir(), *(out / VIDEOS).iterdir()))
    except OSError as error:
        raise InputError(f"{out}: cannot be used as the corpus's folder ({error.strerror}); give another one") from None
    if ANNOTATIONS in found:
        raise InputError(f"{out} holds a finished corpus ({ANNOTATIONS}); remove it or give another folder")
    strange = [name for name in found if name not in ours]
    if strange:
        raise InputError(f"{out} holds {strange[0]}, which is no part of this corpus; give an empty or new folder")
    if not os.access(out / VIDEOS, os.W_OK):
        raise InputError(f"{out / VIDEOS}: no permission to write; give another folder")


def _drawn(jobs: Sequence[tuple[_Video, Path]], workers: int) -> Iterator[list[tuple[int, int]]]:
    """The spans of each video, in order, while the files are written."""
    if workers == 1 or len(jobs) == 1:
        yield from map(_draw_video, jobs)
        return
    # spawn: forking a process that has imported torch or ffmpeg can deadlock
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(workers, len(jobs)), mp_context=context, initializer=follow_parent) as pool:
        yield from pool.map(_draw_video, jobs, chunksize=2)


def _draw_video(job: tuple[_Video, Path]) -> list[tuple[int, int]]:
    """Draw and encode one video; returns the frames (first, one past the last) of its sentences."""
    video, path = job
    signer = draw_signer(video.seed, video.signer)
    rng = random.Random(f"video {video.seed} {video.number}")  # noqa: S311
    rate = FRAME_RATES[video.signer % len(FRAME_RATES)]
    glosses = [sentence.glosses for sentence in video.sentences]
    poses, spans = perform_sentences(glosses, fps=float(rate), speed=signer.speed, rng=rng)
    painter = Painter(signer, FRAME_SIZE)
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=rate, options={"preset": "ultrafast", "crf": "23"})
        stream.width = stream.height = FRAME_SIZE
        stream.pix_fmt = "yuv420p"
        stream.thread_count = 1  # with more, the bytes depend on the machine
        for pose in poses:
            picture = av.VideoFrame.from_ndarray(np.asarray(painter.draw(pose)), format="rgb24")
            container.mux(stream.encode(picture))
        container.mux(stream.encode())
    return spans


def _row(video: _Video, sentence: Sentence, first: int, end: int, language: Language) -> list[str]:
    rate = FRAME_RATES[video.signer % len(FRAME_RATES)]
    start_time, end_time = _timestamp(first, rate), _timestamp(end, rate)
    text = sentence.text(language)
    vid = f"{video.yid}-{start_time}-{end_time}"
    return [vid, video.yid, start_time, end_time, text, text, " ".join(sentence.glosses), video.split]


def _timestamp(frame: int, rate: Fraction) -> str:
    """HH:MM:SS.mmm, rounded down: start <= time < end then holds for exactly the frames first..end-1."""
    milliseconds = int(frame / rate * 1000)
    seconds, milliseconds = divmod(milliseconds, 1000)
    return f"{seconds // 3600:02}:{seconds // 60 % 60:02}:{seconds % 60:02}.{milliseconds:03}"


def _write_tsv(path: Path, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Under another name first, so that the file is whole where it exists."""
    part = path.with_name(path.name + ".part")
    with part.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, delimiter="\t", lineterminator="\n")
        writer.writerow(columns)
        writer.writerows(rows)
    part.replace(path)
