"""Files of an evaluation: what stands in them, that they merge, and that they give the same scores again."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from sltscale.errors import InputError
from sltscale.evaluation import retrieval, translation
from sltscale.evaluation.report import table, write_retrieval, write_translation

# everything that could break a line, a column, a spreadsheet or a CSV reader
NASTY = {
    "-Ab_3": ("- nein", "- nein\tdoch"),
    "=1+1": ("=HYPERLINK(1)", "=SUM(A1)\r\n+2"),
    "@x": ('"offenes Zitat', '"offen und weiter'),
    "a:00:01.5": ("wort-\nteil hier ist es", "wort- teil hier ist\x00 es\ud800"),
    "ü": ("Sätze für alle 你好", ""),
    "+49": ("+49 ist die Vorwahl", "+49 war die Vorwahl"),
}


def write_nasty(folder: Path) -> dict[str, object]:
    references, hypotheses = [r for r, _ in NASTY.values()], [h for _, h in NASTY.values()]
    scores = translation.score(hypotheses, references, language="de", convention="13a")
    write_translation(folder, list(NASTY), hypotheses, references, scores)
    return scores


def test_metrics_are_stored_in_full_precision_and_sorted(tmp_path: Path) -> None:
    scores = write_nasty(tmp_path / "new" / "folder")
    text = (tmp_path / "new" / "folder" / "metrics.json").read_text(encoding="utf-8")
    stored = json.loads(text)
    assert stored == scores  # bit for bit: json writes the shortest digits that give the same float
    assert list(stored) == sorted(stored)
    assert stored["sentences"] == 6 and stored["empty_hypotheses"] == 1
    assert stored["signature"]["bleu"].startswith("nrefs:1|")


def test_sacrebleu_command_on_the_columns_agrees(tmp_path: Path) -> None:
    scores = write_nasty(tmp_path)
    rows = [line.split("\t") for line in (tmp_path / "hypotheses.tsv").read_text(encoding="utf-8").split("\n")[1:-1]]
    for name, column in (("ref", 1), ("hyp", 2)):
        (tmp_path / name).write_text("".join(f"{row[column]}\n" for row in rows), encoding="utf-8")
    command = [sys.executable, "-m", "sacrebleu", "ref", "-i", "hyp", "-m", "bleu", "chrf", "-w", "12"]
    output = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True, timeout=600).stdout
    found = {result["name"]: result["score"] for result in json.loads(output)}
    assert found["BLEU"] == pytest.approx(scores["bleu4"], abs=1e-9)
    assert found["chrF2"] == pytest.approx(scores["chrf"], abs=1e-9)
    assert 0 < found["BLEU"] < 100


def test_hypotheses_open_the_same_way_everywhere(tmp_path: Path) -> None:
    write_nasty(tmp_path)
    text = (tmp_path / "hypotheses.tsv").read_text(encoding="utf-8")
    by_hand = [line.split("\t") for line in text.split("\n")[:-1]]
    assert by_hand == list(csv.reader(text.split("\n")[:-1], delimiter="\t"))
    assert by_hand[0] == ["id", "reference", "hypothesis"]
    assert all(len(row) == 3 for row in by_hand) and len(by_hand) == len(NASTY) + 1
    assert by_hand[1] == ["-Ab_3", " - nein", " - nein doch"]  # an ordinary id stays as it is
    assert not any(cell.startswith(("=", "+", "@", '"')) for row in by_hand for cell in row)


def test_translation_and_retrieval_share_one_file(tmp_path: Path) -> None:
    ids, texts = ["v1", "v2", "v3"], ["regen", "sonne", "regen"]
    similarity = np.array([[0.9, 0.1, 0.9], [0.8, 0.3, 0.8], [0.2, 0.4, 0.2]])
    both = retrieval.score_both(similarity, texts)
    translated = translation.score(texts, texts, language="de")
    write_retrieval(tmp_path, ids, texts, similarity, both)
    write_translation(tmp_path, ids, texts, texts, translated)
    stored = json.loads((tmp_path / "metrics.json").read_text())
    assert stored == {**both, **translated, "retrieval_clips": 3, "retrieval_sentences": 2}
    # a second evaluation replaces its own part and leaves the other
    worse = translation.score(["x"] * 3, texts, language="de")
    write_translation(tmp_path, ids, ["x"] * 3, texts, worse)
    again = json.loads((tmp_path / "metrics.json").read_text())
    assert again["bleu1"] == 0 and again["t2v_recall@1"] == both["t2v_recall@1"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hypotheses.tsv", "metrics.json", "rankings.tsv"]


def test_rankings_by_hand(tmp_path: Path) -> None:
    ids, texts = ["v1", "v2", "v3"], ["regen", "sonne", "regen"]
    similarity = np.array([[0.9, 0.1, 0.9], [0.8, 0.3, 0.8], [0.2, 0.4, 0.2]])
    write_retrieval(tmp_path, ids, texts, similarity, {})
    rows = [line.split("\t") for line in (tmp_path / "rankings.tsv").read_text().splitlines()]
    assert rows == [
        ["id", "text", "t2v_rank", "v2t_rank", "t2v_top5", "v2t_top5"],
        # "regen": its best video v1 (0.9) before v2 (0.8). v1 finds "regen", named by its first clip, first
        ["v1", "regen", "1", "1", "v1 v2", "v1 v2"],
        # "sonne": the group of "regen" with v3 (0.4) before v2 (0.3). v2 finds "regen" (0.8) first
        ["v2", "sonne", "2", "2", "v3 v2", "v1 v2"],
        ["v3", "regen", "1", "2", "v1 v2", "v2 v1"],
    ]


def test_tied_ranks_are_written_as_halves(tmp_path: Path) -> None:
    write_retrieval(tmp_path, ["a", "b"], ["x", "y"], np.ones((2, 2)), {})
    assert (tmp_path / "rankings.tsv").read_text().splitlines()[1] == "a\tx\t1.5\t1.5\ta b\ta b"


def test_only_five_are_listed(tmp_path: Path) -> None:
    n = 8
    write_retrieval(tmp_path, [f"c{i}" for i in range(n)], [f"t{i}" for i in range(n)], np.eye(n), {})
    assert (tmp_path / "rankings.tsv").read_text().splitlines()[4].split("\t")[4] == "c3 c0 c1 c2 c4"


@pytest.mark.parametrize("content", ["[1, 2]", "{broken", ""])
def test_foreign_metrics_file_is_refused_before_anything_is_written(tmp_path: Path, content: str) -> None:
    (tmp_path / "metrics.json").write_text(content)
    with pytest.raises(InputError, match=r"metrics.json is no JSON object"):
        write_nasty(tmp_path)
    assert (tmp_path / "metrics.json").read_text() == content
    assert not (tmp_path / "hypotheses.tsv").exists()


def test_unwritable_folder_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"cannot write .*hypotheses.tsv: .*; choose a folder"):
        write_nasty(tmp_path / "file" / "below")


def test_a_failed_write_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "hypotheses.tsv").mkdir()  # in the way of the final rename
    with pytest.raises(InputError, match=r"cannot write .*hypotheses.tsv"):
        write_nasty(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["hypotheses.tsv"]


def test_unequal_columns_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="2 ids, 1 hypotheses, 2 references"):
        write_translation(tmp_path, ["a", "b"], ["x"], ["x", "y"], {})


def test_table() -> None:
    rows = [
        ("stage", "BLEU-4", "clips"),
        ("translation", 81.456, 120),
        ("预训练", None, 7),
    ]
    assert table(rows).split("\n") == [
        "stage        BLEU-4  clips",
        "-----------  ------  -----",
        "translation   81.46    120",
        "预训练            -      7",
    ]


def test_table_with_only_a_header() -> None:
    assert table([("a", "bc")]) == "a  bc\n-  --"
