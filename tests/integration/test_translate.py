"""sltscale translate on video files, through the real command."""

from __future__ import annotations

import json
import os
import pty
import shutil
import subprocess
import sys
import termios
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from launching import ROOT

from sltscale.cli import main
from sltscale.data.shards.index import open_index
from sltscale.data.text import build_corpus_tokenizer
from sltscale.evaluation.clip_files import clips_in, translate_files
from sltscale.methods import export
from sltscale.models.translator import Translator
from sltscale.recipe_files import load_recipe

Command = Callable[..., subprocess.CompletedProcess[str]]
COMMAND = ("-m", "sltscale.cli", "translate", "--run")


@pytest.fixture(scope="module")
def run(corpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with exported weights, as they are drawn, but for larger ones in the language model."""
    run = tmp_path_factory.mktemp("run")
    recipe = load_recipe(str(corpus.translate))
    train = open_index(corpus.shards, "train")
    tokenizer = build_corpus_tokenizer(train.texts(), train.languages(), recipe.text.vocabulary)
    method = export.build(recipe, tokenizer)
    with torch.no_grad():
        for name, parameter in method.named_parameters():
            parameter.mul_(20 if name.startswith("language_model") and parameter.dim() > 1 else 1)
    (run / "config.json").write_text(recipe.to_json())
    export.save_export(run / "export", recipe, dict(export.tensors(method)), tokenizer)
    return run


@pytest.fixture(scope="module")
def videos(corpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with nine videos of different lengths, one that is none, and a note."""
    folder = tmp_path_factory.mktemp("clips")
    for video in sorted((corpus.source / "videos").iterdir())[:9]:
        shutil.copy(video, folder)
    (folder / "broken.mp4").write_bytes(b"no video at all")
    (folder / "notes.txt").write_text("not a clip")
    return folder


def test_a_folder_with_a_broken_file(run: Path, videos: Path, command: Command) -> None:
    done = command(*COMMAND, run, "--json", videos)
    assert done.returncode == 2
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row["path"] for row in rows] == [str(path) for path in sorted(videos.glob("*.mp4"))]
    faulty = [row for row in rows if "error" in row]
    assert [Path(row["path"]).name for row in faulty] == ["broken.mp4"]
    for row in rows:
        if "error" not in row:
            assert row.keys() == {"path", "sentences"}
            assert [sentence.keys() for sentence in row["sentences"]] == [{"text", "score"}]
            assert row["sentences"][0]["score"] < 0
    lines = done.stderr.splitlines()
    assert [line for line in lines if line.startswith("error: ")] == [
        f"error: {faulty[0]['error']}",
        "error: 1 of 10 clips could not be translated, see above",
    ]
    assert "broken.mp4" in faulty[0]["error"]


def test_n_best_from_stdin(run: Path, videos: Path, environment: dict[str, str]) -> None:
    good = sorted(path for path in videos.glob("*.mp4") if path.name != "broken.mp4")[:3]
    listed = "".join(f"{path}\n" for path in (good[2], videos / "missing.mp4", good[0]))
    done = subprocess.run(
        [sys.executable, *COMMAND, run, "--n-best", "3", "--beams", "4", "-"],
        input=listed, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    rows = [line.split("\t") for line in done.stdout.splitlines()]
    assert [row[0] for row in rows] == [str(good[2])] * 3 + [str(good[0])] * 3
    for best in (rows[:3], rows[3:]):
        scores = [float(row[1]) for row in best]
        assert scores == sorted(scores, reverse=True)
        assert len(set(scores)) == 3
    assert "missing.mp4" in done.stderr
    assert "error: 1 of 3 clips could not be translated" in done.stderr


def test_one_clip_and_its_progress_on_a_terminal(run: Path, videos: Path, environment: dict[str, str]) -> None:
    clip = next(path for path in sorted(videos.glob("*.mp4")) if path.name != "broken.mp4")
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 100))
    with subprocess.Popen(
        [sys.executable, *COMMAND, run, clip], cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=theirs
    ) as process:
        os.close(theirs)
        output = process.communicate(timeout=600)[0].decode()
        shown = b""
        while True:
            try:
                part = os.read(ours, 65536)
            except OSError:  # Linux's way to say that the other end is closed
                break
            if not part:
                break
            shown += part
    os.close(ours)
    assert process.returncode == 0, shown
    path, tab, sentence = output.rstrip("\n").partition("\t")
    assert (path, tab) == (str(clip), "\t")
    assert "\n" not in sentence
    assert b"translating: 100%" in shown
    assert b"1/1" in shown


def test_together_as_alone_and_in_order(run: Path, videos: Path) -> None:
    """Batches are made by length; what a clip gets does not depend on the others, and the files keep their order."""
    model = export.load_export(run / "export")
    assert isinstance(model.method, Translator)
    paths = [path for path in clips_in(videos) if path.name != "broken.mp4"][:6]
    language = model.tokenizer.languages[0]
    options = (model.method, model.tokenizer, model.recipe)
    together = list(translate_files(*options, paths, language, torch.device("cpu"), 2))
    assert [one.path for one in together] == paths
    assert model.recipe.evaluation.batch < len(paths)
    for path, found in list(zip(paths, together, strict=True))[::2]:
        (alone,) = translate_files(*options, [path], language, torch.device("cpu"), 2)
        assert [one.text for one in alone.sentences] == [one.text for one in found.sentences]
        assert [one.score for one in alone.sentences] == pytest.approx([one.score for one in found.sentences], abs=1e-4)
    assert len({found.sentences[0].score for found in together}) > 1


def test_what_a_path_stands_for(tmp_path: Path) -> None:
    frames = tmp_path / "all/second"
    frames.mkdir(parents=True)
    for name in ("images0002.png", "images0001.png"):
        (frames / name).touch()
    (tmp_path / "all/first.MP4").touch()
    (tmp_path / "all/readme.md").touch()
    assert clips_in(tmp_path / "all") == [tmp_path / "all/first.MP4", frames]
    assert clips_in(frames) == [frames]
    assert clips_in(tmp_path / "absent.mp4") == [tmp_path / "absent.mp4"]
    assert clips_in(tmp_path) == [tmp_path]


def test_bad_input(run: Path, videos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refusal(*arguments: str | Path) -> str:
        assert main(["translate", "--run", str(run), *map(str, arguments)]) == 2
        shown = capsys.readouterr()
        assert (shown.out, shown.err.count("error: "), shown.err[-1]) == ("", 1, "\n")
        return shown.err

    assert "no code for language 'fr'; it knows: de" in refusal("--language", "fr", videos)
    assert "3 sentences are wanted of 2 beams" in refusal("--n-best", "3", videos)
    assert "notes.txt" in refusal(videos / "notes.txt")
