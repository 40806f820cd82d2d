from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import pytest
from annotation_files import label, reasons, write_labels

from sltscale.data.corpora import read_corpus
from sltscale.errors import InputError


def test_csl_daily(tmp_path: Path) -> None:
    labels = {
        name: label(name, text, 2, gloss=["你", "好"])
        for name, text in (
            ("S000001_P0004_T00", "你好，世界。"),
            ("S000001_P0007_T00", "你好，世界。"),
            ("S000002_P0004_T01", "再见"),
            ("other", "再见!"),
        )
    }
    videos = tmp_path / "frames"
    (videos / "S000001_P0004_T00").mkdir(parents=True)
    (videos / "other").mkdir()
    (videos / "S000001_P0007_T00.mp4").touch()
    path = write_labels(tmp_path / "labels.dev", labels)
    corpus = read_corpus("csl_daily", [path], videos)
    folder, video, other = corpus.clips
    assert (folder.path, folder.fps, folder.signer) == (videos / "S000001_P0004_T00", Fraction(30), "P0004")
    assert folder.images == ("images0001.png", "images0002.png")
    assert (folder.language, folder.split, folder.text) == ("zh", "dev", "你好，世界。")
    assert (video.path, video.images, video.fps) == (videos / "S000001_P0007_T00.mp4", (), None)
    assert (other.signer, corpus.notes["ids that do not name their signer"]) == ("", 1)
    assert reasons(corpus.rejected) == [("S000002_P0004_T01", 3, "video missing")]
    assert corpus.notes["texts that NFKC normalisation changes"] == 2
    assert corpus.notes["dev: clips that repeat an earlier text of the split"] == 1
    # The name says nothing, so it is asked for.
    path = path.rename(tmp_path / "labels")
    assert read_corpus("csl_daily", [path], None, split="test", language="zh-CN").clips[3].language == "zh-CN"
    with pytest.raises(InputError, match="give --split"):
        read_corpus("csl_daily", [path], None)
