"""One corpus for all tests of this folder."""

from __future__ import annotations

import subprocess
from collections.abc import Callable

import pytest
from tiny_recipes import Corpus, make_corpus


@pytest.fixture(scope="session")
def corpus(
    tmp_path_factory: pytest.TempPathFactory, command: Callable[..., subprocess.CompletedProcess[str]]
) -> Corpus:
    return make_corpus(tmp_path_factory.mktemp("corpus"), command)
