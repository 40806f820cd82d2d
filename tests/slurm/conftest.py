"""One cluster for all tests of this folder; without SLURM's packages they are skipped."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from slurm.cluster import Cluster, missing
from tiny_recipes import Corpus, make_corpus


@pytest.fixture(scope="session")
def cluster(environment: dict[str, str]) -> Iterator[Cluster]:
    """Three nodes n1 to n3 of two CPUs; partition low (the default) is pre-empted by high."""
    reason = missing()
    if reason is not None:
        pytest.skip(reason)
    site = {
        "site_included": "yes",  # not the one of whoever runs the tests
        "VENV": str(Path(sys.prefix)),
        "MASTER_ADDR": "127.0.0.1",  # n1 is no name that could be looked up
    }
    cluster = Cluster(nodes=3, cpus=2, environment=environment | site)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


@pytest.fixture(scope="session")
def corpus(
    cluster: Cluster, tmp_path_factory: pytest.TempPathFactory, command: Callable[..., subprocess.CompletedProcess[str]]
) -> Corpus:
    return make_corpus(tmp_path_factory.mktemp("corpus"), command)
