from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture
def videos(tmp_path: Path) -> Path:
    folder = tmp_path / "videos"
    folder.mkdir()
    for name in ("-a.b.mp4", "b.webm", "c.gif", "c.mp4", "notes.txt"):
        (folder / name).touch()
    return folder
