import pickle
from pathlib import Path

import numpy as np
import pytest

from sltscale.data.batches.selection import Selection
from sltscale.data.shards.index import Index, Row, Shard, open_index, write_index
from sltscale.errors import InputError


def make(folder: Path, name: str, count: int, language: str = "de") -> Index:
    folder = folder / name
    folder.mkdir()
    rows = [
        Row(
            id=f"{name}.{k}",
            key=f"{name}-{k}",
            text=f"{name} {k}",
            language=language,
            frames=10 + k,
            fps=(25, 1),
            offset=0,
            size=1,
            sha256="00" * 32,
            record=(0, 1),
            crc32=(0, 0, 0),
        )
        for k in range(count)
    ]
    write_index(folder, "train", [Shard("train-000000.tar", 1, "", rows)], corpus=name, frame_size=32)
    return open_index(folder, "train")


def test_numbers_run_over_all_indexes_without_the_damaged(tmp_path: Path) -> None:
    a, b = make(tmp_path, "a", 4), make(tmp_path, "b", 3, "en")
    clips = Selection([a, b], [[1], [0, 2]])
    assert len(clips) == 4
    assert [clips.id(k) for k in range(4)] == ["a.0", "a.2", "a.3", "b.1"]
    assert clips.texts() == ["a 0", "a 2", "a 3", "b 1"]
    assert clips.frames.tolist() == [10, 12, 13, 11]
    assert [clips.language(k) for k in range(4)] == ["de", "de", "de", "en"]
    assert clips.languages() == ["de", "en"]
    index, number = clips.locate(3)
    assert (index.corpus, number) == ("b", 1)
    again = pickle.loads(pickle.dumps(clips))  # noqa: S301
    assert [again.id(k) for k in range(4)] == ["a.0", "a.2", "a.3", "b.1"]


def test_the_digest_tells_what_is_in_it(tmp_path: Path) -> None:
    a, b = make(tmp_path, "a", 4), make(tmp_path, "b", 3)
    assert Selection([a]).digest == a.digest
    digests = {Selection(*made).digest for made in (([a],), ([a], [[1]]), ([a], [[2]]), ([a, b],), ([b, a],))}
    assert len(digests) == 5


def test_quotas_follow_size_weight_and_temperature(tmp_path: Path) -> None:
    clips = Selection([make(tmp_path, "a", 90), make(tmp_path, "b", 10)])

    def quotas(*weights: float, temperature: float = 1.0) -> list[int]:
        return [part.quota for part in clips.parts(weights, temperature)]

    assert quotas(1, 1) == [90, 10]
    assert quotas(1, 9) == [50, 50]
    assert quotas(1, 1, temperature=2) == [75, 25]  # 3 : 1, the square roots
    assert quotas(1, 1e-9) == [99, 1]
    assert sum(quotas(1, 0.37)) == 100
    assert np.concatenate([part.clips for part in clips.parts([1, 1], 1)]).tolist() == list(range(100))
    with pytest.raises(InputError, match="no clip of it is left"):
        Selection([clips.indexes[0], clips.indexes[1]], [[], range(10)]).parts([1, 1], 1)
