"""A small synthetic corpus, packed with the real tools, and tiny recipes on it."""

from __future__ import annotations

import subprocess
from collections.abc import Callable

import pytest
from tiny_recipes import Corpus, write_recipes


@pytest.fixture(scope="session")
def corpus(
    tmp_path_factory: pytest.TempPathFactory, command: Callable[..., subprocess.CompletedProcess[str]]
) -> Corpus:
    folder = tmp_path_factory.mktemp("corpus")
    drawn = command("tools/make_synthetic.py", "--out", folder / "source", "--clips", "60", "--seed", "2")
    assert drawn.returncode == 0, drawn.stderr
    packed = command(
        *("tools/make_shards.py", "--corpus", "openasl", "--annotations", folder / "source/annotations.tsv"),
        *("--videos", folder / "source/videos", "--out", folder / "shards", "--frame-size", "32", "--language", "de"),
    )
    assert packed.returncode == 0, packed.stderr
    return write_recipes(folder, folder / "shards")
