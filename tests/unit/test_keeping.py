"""Which checkpoints stay: the newest, the best, none counted on that is damaged; what was written is read back."""

from pathlib import Path

import pytest

from sltscale.config import BestSettings
from sltscale.engine.keeping import ReadBack, best_step, note_scores, prune, read_scores
from sltscale.engine.manifest import folders, read_manifest, verify, write_manifest
from sltscale.errors import InputError

HIGHEST, LOWEST = BestSettings(score="bleu4"), BestSettings(score="median_rank", mode="min")


@pytest.fixture
def checkpoints(tmp_path: Path) -> Path:
    for step in (10, 20, 30, 40):
        folder = tmp_path / f"step-{step:08d}"
        folder.mkdir()
        (folder / "rank-00000.safetensors").write_bytes(b"weights")
        digest = (
            "0000000000000000000000000000000000000000000000000000000000000000"  # of no file: only ReadBack's test looks
        )
        write_manifest(folder, {"step": step, "files": {"rank-00000.safetensors": {"size": 7, "sha256": digest}}})
    return tmp_path


def steps(checkpoints: Path) -> list[int]:
    return [int(folder.name.removeprefix("step-")) for folder in folders(checkpoints)]


def test_the_best_is_the_highest_or_the_lowest_and_the_earliest_of_equals(tmp_path: Path) -> None:
    assert best_step(tmp_path, HIGHEST, 99) is None
    for step, bleu4, median_rank in ((10, 1.5, 7), (20, 3.0, 4), (30, 3.0, 3), (40, 2.0, 9)):
        note_scores(tmp_path, step, {"bleu4": bleu4, "median_rank": median_rank, "signature": "text"}, HIGHEST)
    assert read_scores(tmp_path)[20] == {"bleu4": 3.0, "median_rank": 4}
    assert best_step(tmp_path, HIGHEST, 99) == 20
    assert best_step(tmp_path, LOWEST, 99) == 30
    assert best_step(tmp_path, LOWEST, 20) == 20  # what a run that went back behind 30 knows
    assert best_step(tmp_path, None, 99) is None


def test_a_score_that_the_method_does_not_have(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"'bleu4' is no score of this method: chrf, rouge_l"):
        note_scores(tmp_path, 10, {"rouge_l": 1.0, "chrf": 2.0}, HIGHEST)
    (tmp_path / "scores.json").write_text("[]")
    with pytest.raises(InputError, match="no table of scores"):
        read_scores(tmp_path)


def test_the_newest_and_the_best_stay(checkpoints: Path) -> None:
    prune(checkpoints / "step-00000040", 2, 10, set())
    assert steps(checkpoints) == [10, 30, 40]
    prune(checkpoints / "step-00000040", 1, None, set())
    assert steps(checkpoints) == [40]
    assert [path.name for path in checkpoints.iterdir()] == ["step-00000040"]


def test_a_damaged_one_is_not_counted_and_a_newer_one_not_touched(checkpoints: Path) -> None:
    prune(checkpoints / "step-00000030", 2, None, {"step-00000020"})
    assert steps(checkpoints) == [10, 20, 30, 40]
    prune(checkpoints / "step-00000030", 1, None, set())
    assert steps(checkpoints) == [30, 40]


def test_what_was_written_is_read_back(checkpoints: Path) -> None:
    folder = checkpoints / "step-00000040"
    read_back = ReadBack()
    with pytest.raises(InputError, match="does not match its sha256"):
        verify(folder)
    read_back.start(read_manifest(folder))
    assert read_back.wait() == ["checkpoint step-00000040: rank-00000.safetensors does not match its sha256"]
    assert read_back.damaged == {"step-00000040"}
    assert read_back.wait() == []
