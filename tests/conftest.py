"""Fixtures shared by all tests."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from launching import ROOT, Launcher

# The same examples in every run, however slow the machine.
settings.register_profile(
    "tests", deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("tests")


@pytest.fixture(scope="session")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Variables for child processes: nothing left over from a launcher or a scheduler, a private extension cache."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if (not name.startswith(("SLURM_", "MASTER_", "DS_")) or name == "DS_ACCELERATOR")
        and name not in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_SIZE", "LOCAL_WORLD_SIZE")
    }
    return kept | {
        "TORCH_EXTENSIONS_DIR": str(tmp_path_factory.mktemp("torch_extensions")),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }


@pytest.fixture
def launcher(environment: dict[str, str]) -> Iterator[Launcher]:
    launcher = Launcher(environment)
    yield launcher
    launcher.end()


@pytest.fixture(scope="session")
def command(environment: dict[str, str]) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run a Python script or ``-m module`` from the repository root; output captured, time limited."""

    def run(*arguments: str | Path, seconds: float = 600, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, *map(str, arguments)],
            cwd=cwd,
            env=environment,
            capture_output=True,
            text=True,
            timeout=seconds,
            check=False,
        )

    return run
