from __future__ import annotations

import json
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

from annotation_files import write

from sltscale.data.clips import Clip
from sltscale.data.corpora import read_corpus


def test_folder_of_videos_from_a_table_or_json(tmp_path: Path, videos: Path) -> None:
    (videos / "sub").mkdir()
    (videos / "sub" / "d.mp4").touch()
    rows: list[dict[str, Any]] = [
        {"file": "b.webm", "text": " Hello. "},
        {"file": "sub/d.mp4", "text": "Tschüss.", "start": 0.1, "end": "00:00:02.500", "language": "de"},
        {
            "id": "me/1:a.b",
            "file": "c.mp4",
            "text": "Hi.",
            "split": "validation",
            "signer": "S1",
            "crop": [8, 0, 64, 48],
        },
        {"file": "c.mp4", "text": "To the end.", "start": 1},
        {"file": "../secret.mp4", "text": "x"},
        {"file": "/etc/passwd", "text": "x"},
        {"file": "sub", "text": "x"},
        {"file": "", "text": "x"},
        {"file": "c.gif", "text": "x", "start": 2, "end": 1},
        {"file": "c.gif", "text": "x", "end": "soon"},
        {"file": "c.gif", "text": "x", "crop": "0,0,0,5"},
        {"file": "c.gif", "text": "x", "crop": "0,0,5,0"},
        {"file": "c.gif", "text": "x", "crop": "1,2,3"},
        {"file": "c.gif", "text": "x", "language": "eng lish"},
        {"file": "c.gif", "text": "x", "split": "tset"},
        {"file": "c.gif", "text": ""},
        {"file": "b.webm", "text": "again"},
    ]
    columns = ("id", "file", "text", "start", "end", "language", "split", "signer", "crop", "remark")

    def cell(value: Any) -> str:
        return ",".join(map(str, value)) if isinstance(value, list) else str(value)

    table = ["\t".join(cell(row.get(column, "")) for column in columns) for row in rows]
    files = [
        write(tmp_path / "list.train.tsv", "\t".join(columns), *table),
        write(tmp_path / "list.train.jsonl", *map(json.dumps, rows)),
    ]
    for file, first_line in zip(files, (2, 1), strict=True):
        corpus = read_corpus("folder", [file], videos)
        assert {clip.file for clip in corpus.clips} == {file.name}
        assert [replace(clip, file="") for clip in corpus.clips] == [
            Clip("b", videos / "b.webm", None, None, "Hello.", "en", "train", first_line),
            Clip(
                "sub/d-0.1-00:00:02.500",
                videos / "sub/d.mp4",
                Fraction(1, 10),
                Fraction(5, 2),
                "Tschüss.",
                "de",
                "train",
                first_line + 1,
            ),
            Clip("me/1:a.b", videos / "c.mp4", None, None, "Hi.", "en", "dev", first_line + 2, "S1", (8, 0, 64, 48)),
            Clip("c-1", videos / "c.mp4", Fraction(1), None, "To the end.", "en", "train", first_line + 3),
        ]
        assert [(row.line - first_line, row.reason) for row in corpus.rejected] == [
            (4, "file '../secret.mp4' leads outside the folder of videos"),
            (5, "file '/etc/passwd' leads outside the folder of videos"),
            (6, "video missing"),
            (7, "file '' leads outside the folder of videos"),
            (8, "ends at 1, not after its start at 2"),
            (9, "unreadable time 'soon'"),
            (10, "crop '0,0,0,5': expected left,top,width,height in pixels"),
            (11, "crop '0,0,5,0': expected left,top,width,height in pixels"),
            (12, "crop '1,2,3': expected left,top,width,height in pixels"),
            (13, "'eng lish' is no language code such as de or en-US"),
            (14, "unknown split 'tset'"),
            (15, "empty text"),
            (16, f"id already used in line {first_line}"),
        ]
        assert corpus.notes.get("column 'remark' is not used") == (4 if first_line == 2 else None)


def test_folder_json_lines_that_are_none(tmp_path: Path, videos: Path) -> None:
    annotations = write(
        tmp_path / "train.jsonl",
        '{"file": "b.webm", "text": "Good.", "id": null}',
        '{"file": "b.webm", "text": "Cut',
        '["b.webm", "A list."]',
        '{"file": "b.webm"}',
        '{"text": "No file."}',
        '{"id": "deep", "file": "b.webm", "text": {"en": "Hi."}}',
        '{"id": "truth", "file": "b.webm", "text": true}',
        '{"id": "texts", "file": "b.webm", "text": ["a", "b"]}',
        '{"id": "nan", "file": "b.webm", "text": "x", "start": NaN, "end": Infinity}',
        '{"id": "half\\ud800", "file": "b.webm", "text": "x"}',
        "[" * 100_000,
    )
    corpus = read_corpus("folder", [annotations], videos)
    assert [clip.id for clip in corpus.clips] == ["b"]
    found = [(row.id, row.line, row.reason) for row in corpus.rejected]
    assert found[0][2].startswith("not JSON (Unterminated string")
    assert found[1:8] == [
        ("", 3, "not a JSON object"),
        ("b.webm", 4, "'text' is missing"),
        ("", 5, "'file' is missing"),
        ("deep", 6, "'text' is neither text nor a number"),
        ("truth", 7, "'text' is neither text nor a number"),
        ("texts", 8, "'text' is neither text nor a number"),
        ("nan", 9, "unreadable time 'NaN'"),
    ]
    assert found[8] == ("half\\ud800", 10, "half of a surrogate pair in its id, text, signer or file")
    assert found[9][1:] == (11, "not JSON (maximum recursion depth exceeded)") or found[9][2].startswith("not JSON")
    json.dumps([row.__dict__ for row in corpus.rejected], ensure_ascii=False).encode()
