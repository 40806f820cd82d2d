from __future__ import annotations

import gzip
import pickle
from collections import Counter
from fractions import Fraction
from pathlib import Path

from annotation_files import PHOENIX, label, real, reasons, write, write_labels

from sltscale.data.clips import Clip
from sltscale.data.corpora import read_corpus


def test_phoenix_official_files(tmp_path: Path) -> None:
    annotations = write(
        tmp_path / "PHOENIX-2014-T.dev.corpus.csv",
        PHOENIX,
        "01April_2010-1|01April_2010-1/1/*.png|-1|-1|Signer04|MORGEN SONNE|morgen scheint überall die sonne ",
        "b|b/1/*.png|-1|-1|Signer05|WIND|wind",
        "c|c/1/*.png|-1|-1|Signer05|WIND|sturm",
        "d|d/1/*.png|-1|-1|Signer05|WIND|böen",
        "part|part/1/*.png|5|9|Signer05|WIND|wind",
        "gone|gone/1/*.png|-1|-1|Signer05|WIND|wind",
        "up|../1/*.png|-1|-1|Signer05|WIND|wind",
        "root|/etc/*.png|-1|-1|Signer05|WIND|wind",
        "short|short/1/*.png|-1",
    )
    videos = tmp_path / "fullFrame-210x260px"
    for folder in ("dev/01April_2010-1/1", "01April_2010-1", "dev/b", "b/1", "c/1", "d", "train/gone/1"):
        (videos / folder).mkdir(parents=True)
    corpus = read_corpus("phoenix2014t", [annotations], videos)
    assert [clip.path.relative_to(videos).as_posix() for clip in corpus.clips] == [
        "dev/01April_2010-1/1",
        "dev/b",
        "c/1",
        "d",
    ]
    assert corpus.clips[0] == Clip(
        "01April_2010-1",
        videos / "dev/01April_2010-1/1",
        None,
        None,
        "morgen scheint überall die sonne",
        "de",
        "dev",
        2,
        signer="Signer04",
        fps=Fraction(25),
        file=annotations.name,
    )
    assert reasons(corpus.rejected) == [
        ("part", 6, "start '5', end '9': expected -1 and -1, all of the images"),
        ("gone", 7, "video missing"),
        ("up", 8, "file '../1' leads outside the folder of videos"),
        ("root", 9, "file '/etc' leads outside the folder of videos"),
        ("short", 10, "3 fields instead of 7"),
    ]
    looked_up_nowhere = read_corpus("phoenix2014t", [annotations], None)
    assert [clip.id for clip in looked_up_nowhere.clips] == ["01April_2010-1", "b", "c", "d", "gone"]


def test_phoenix_labels(tmp_path: Path) -> None:
    labels = {
        "train/a": label("train/a", "schöner Tag", 3),
        "dev/b": label("dev/b", "schöner Tag", 2, signer="Signer01", length=7),
        "c": label("test/c", "Wind"),
        "train/text": label("train/text", "") | {"text": 5},
        "train/none": {"name": "train/none", "imgs_path": ["x/1.png"]},
        "train/empty": label("train/empty", " "),
        "train/images": label("train/images", "x", 0),
        "train/number": label("train/number", "x", imgs_path=[1]),
        "train/two": label("train/two", "x", imgs_path=["train/two/1.png", "train/too/2.png"]),
        "train/up": label("train/up", "x", imgs_path=["../../etc/1.png"]),
        "train/half": label("train/half", "\ud83d"),
        "train/gone": label("train/gone", "x"),
    }
    videos = tmp_path / "frames"
    for folder in ("train/a", "dev/b/1", "c", "train/half", "train/empty"):
        (videos / folder).mkdir(parents=True)
    corpus = read_corpus("phoenix2014t", [write_labels(tmp_path / "labels.test", labels)], videos)
    assert [(clip.id, clip.split, clip.signer, clip.line) for clip in corpus.clips] == [
        ("train/a", "train", "", 1),
        ("dev/b", "dev", "Signer01", 2),
        ("c", "test", "", 3),
    ]
    assert [clip.path.relative_to(videos).as_posix() for clip in corpus.clips] == ["train/a", "dev/b/1", "c"]
    first = corpus.clips[0]
    assert first.images == ("images0001.png", "images0002.png", "images0003.png")
    assert (first.fps, first.start, first.end, first.language) == (Fraction(25), None, None, "de")
    assert reasons(corpus.rejected) == [
        ("train/text", 4, "'text' is of type int"),
        ("train/none", 5, "'text' is missing"),
        ("train/empty", 6, "empty text"),
        ("train/images", 7, "'imgs_path' is not a list of names"),
        ("train/number", 8, "'imgs_path' is not a list of names"),
        ("train/two", 9, "its images lie in 2 folders, expected one"),
        ("train/up", 10, "file '../../etc' leads outside the folder of videos"),
        ("train/half", 11, "half of a surrogate pair in its id, text, signer or file"),
        ("train/gone", 12, "video missing"),
    ]
    assert {row.file for row in corpus.rejected} == {"labels.test"}
    assert corpus.notes == {
        "ids with slashes": 2,
        "texts with characters outside ASCII": 2,
        "dev: clips whose text is also in train": 1,
        "fewest images of a clip": 2,
        "most images of a clip": 3,
        "labels whose length is not their number of images": 1,
    }


def test_real_phoenix_labels() -> None:
    paths = real(*(f"phoenix2014t/labels.{split}" for split in ("train", "dev", "test")))
    corpus = read_corpus("phoenix2014t", paths, None)
    assert corpus.rejected == []
    assert Counter(clip.split for clip in corpus.clips) == {"train": 7096, "dev": 519, "test": 642}
    lengths = [len(clip.images) for clip in corpus.clips]
    assert (min(lengths), max(lengths)) == (16, 475)
    assert (corpus.notes["fewest images of a clip"], corpus.notes["most images of a clip"]) == (16, 475)
    assert sum(lengths[:7096]) == 827_354
    assert corpus.clips[0].path.as_posix() == corpus.clips[0].id

    texts = {split: [] for split in ("train", "dev", "test")}
    for path in paths:  # test input of our own choosing
        for entry in pickle.loads(gzip.decompress(path.read_bytes())).values():  # noqa: S301
            texts[path.suffix[1:]].append(entry["text"])
    assert [clip.text for clip in corpus.clips] == [text for split in texts.values() for text in split]
    foreign = [text for split in texts.values() for text in split if any(ord(letter) > 127 for letter in text)]
    assert corpus.notes["texts with characters outside ASCII"] == len(foreign) == 6222  # 75 %
    repeats = corpus.notes["train: clips that repeat an earlier text of the split"]
    assert repeats == len(texts["train"]) - len(set(texts["train"])) == 243
    for split, count in (("dev", 25), ("test", 32)):
        shared = sum(text in set(texts["train"]) for text in texts[split])
        assert corpus.notes[f"{split}: clips whose text is also in train"] == shared == count


def test_real_phoenix_official_form() -> None:
    (path,) = real("phoenix2014t/PHOENIX-2014-T.dev.corpus.dummy.csv")
    corpus = read_corpus("phoenix2014t", [path], None)
    assert corpus.rejected == []
    (clip,) = corpus.clips
    assert (clip.split, clip.signer, clip.path.name, clip.fps) == ("dev", "Signer01", "1", 25)
