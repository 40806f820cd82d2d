"""The lock of a run folder: who is refused, and whom the refusal names."""

from __future__ import annotations

import fcntl
from pathlib import Path

import pytest

from sltscale.engine import run_folder
from sltscale.engine.run_folder import RunFolder
from sltscale.errors import InputError
from sltscale.recipe_files import load_recipe


def test_the_look_of_another_start_hinders_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "lock").touch()
    with (tmp_path / "lock").open() as look:
        fcntl.flock(look, fcntl.LOCK_SH)
        monkeypatch.setattr(run_folder.time, "sleep", lambda _: fcntl.flock(look, fcntl.LOCK_UN))
        folder = RunFolder(tmp_path)
        folder.open(load_recipe("demo"), {}, {}, 1)
        assert RunFolder(tmp_path).holder() is not None
        folder.close()


def test_a_holder_that_has_not_written_its_name_yet_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with (tmp_path / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)

        def sign(seconds: float) -> None:
            if seconds == run_folder.INSTANT_SECONDS:
                lock.write("process 7 on that host\n")
                lock.flush()

        monkeypatch.setattr(run_folder.time, "sleep", sign)
        with pytest.raises(InputError, match="in use by process 7 on that host"):
            RunFolder(tmp_path).check(load_recipe("demo"))
