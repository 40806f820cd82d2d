"""``sltscale doctor``: a sound set-up gives nothing but green, a broken one every fault with its remedy."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tiny_recipes import Corpus
from torch.utils.file_baton import FileBaton

from sltscale.config import Recipe
from sltscale.diagnosis import clips, disk, inputs, software
from sltscale.diagnosis.examination import examination
from sltscale.diagnosis.finding import Finding
from sltscale.engine.run_folder import RunFolder
from sltscale.recipe_files import load_recipe

Command = Callable[..., subprocess.CompletedProcess[str]]
Mount = Callable[[str], Path]


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Mount]:
    """A small file system of its own, mounted with the given options."""
    mounted = []

    def mount(options: str) -> Path:
        folder = tmp_path / f"disk{len(mounted)}"
        folder.mkdir()
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", folder], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"no file system of a given kind can be mounted here: {done.stderr.strip()}")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", folder], check=True)


@pytest.fixture
def memory(tmp_path: Path) -> Iterator[Path]:
    """A folder that no busy disk makes slow."""
    shared_memory = Path("/dev/shm")  # noqa: S108
    with tempfile.TemporaryDirectory(dir=shared_memory if shared_memory.is_dir() else tmp_path) as folder:
        yield Path(folder)


@pytest.fixture
def extensions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))
    return tmp_path / "extensions"


def tuned(corpus: Corpus, *overrides: str) -> list[str]:
    """A recipe with an attention that can be chosen, on the test's shards."""
    fitting = ["--data.shards", str(corpus.shards), "--data.synthetic", "none"]
    return [*fitting, "--data.frame_size", "32", "--data.crop_size", "32", *overrides]


def recipe_on(corpus: Corpus, *overrides: str) -> Recipe:
    return load_recipe("hfa_pretrain_tiny", tuned(corpus, *overrides))


def leave_lock_behind(extensions: Path) -> Path:
    """As torch leaves it when a compiling process is killed."""
    lock = extensions / "some_op" / "lock"
    lock.parent.mkdir(parents=True)
    baton = FileBaton(str(lock))
    assert baton.try_acquire()
    os.close(baton.fd)
    return lock


def cut_off(corpus: Corpus, folder: Path) -> Path:
    """A copy of the shards, one of which has lost its end."""
    for path in corpus.shards.iterdir():
        if path.is_file():
            (folder / path.name).write_bytes(path.read_bytes())
    shard = min(folder.glob("train-*.tar"))
    os.truncate(shard, shard.stat().st_size - 4000)
    return shard


def faults(findings: Iterator[Finding] | list[Finding]) -> list[Finding]:
    """All but the green; each names a remedy."""
    amiss = [finding for finding in findings if finding.state != "ok"]
    assert all(finding.remedy for finding in amiss)
    return amiss


def test_a_sound_set_up_is_green(command: Command, corpus: Corpus, memory: Path) -> None:
    done = command(
        *("-m", "sltscale.cli", "doctor", "--json", "--recipe", "hfa_pretrain_tiny", "--run", memory / "run"),
        *tuned(corpus, "--method.visual.temporal.attention", "sdpa"),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    findings = json.loads(done.stdout)["findings"]
    assert [finding for finding in findings if finding["state"] != "ok"] == []
    looked_at = {finding["subject"].split()[0] for finding in findings}
    assert looked_at >= {"packages", "GPU", "DeepSpeed", "compile", "attention", "codecs", "free", "run", "write"}
    assert looked_at >= {"clock", "shards", "hub"}
    assert not (memory / "run").exists()


def test_a_broken_set_up_is_named_with_remedies(
    command: Command, environment: dict[str, str], corpus: Corpus, mount: Mount, tmp_path: Path
) -> None:
    """All five at once: the run folder's file system is too small, full and read-only."""
    lock = leave_lock_behind(Path(environment["TORCH_EXTENSIONS_DIR"]) / "of_doctor")
    disk = mount("size=1m,ro")
    broken = tmp_path / "shards"
    broken.mkdir()
    shard = cut_off(corpus, broken)
    try:
        done = command(
            *("-m", "sltscale.cli", "doctor", "--recipe", "hfa_pretrain_tiny", "--run", disk / "run"),
            *tuned(corpus, "--data.shards", str(broken), "--method.visual.temporal.attention", "flash_attn"),
        )
    finally:
        lock.unlink()
    assert done.returncode == 1, done.stdout + done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith(("fault", "warning"))]
    assert len(lines) == 5, done.stdout
    assert all(" -> " in line for line in lines)
    for line, fault, remedy in zip(
        lines, ("stale lock", "flash_attn", "no space", "cannot be written", shard.name), REMEDIES, strict=True
    ):
        assert fault in line
        assert remedy in line
    assert done.stdout.endswith("5 faults, no warnings\n")


REMEDIES = ("start a training, which removes it, or rm ", "take one of ", "make room", "make ", "shards verify")


def test_one_fault_alone_is_the_only_one_named(
    corpus: Corpus, mount: Mount, extensions: Path, memory: Path, tmp_path: Path
) -> None:
    recipe, run = recipe_on(corpus), memory / "runs" / "run"
    assert faults(examination(recipe, run, None)) == []

    lock = leave_lock_behind(extensions)
    (found,) = faults(examination(recipe, run, None))
    assert str(lock) in found.found
    assert lock.exists()
    lock.unlink()

    (found,) = faults(examination(recipe_on(corpus, "--method.visual.temporal.attention", "xformers"), run, None))
    assert "xformers is not installed" in found.found or "xformers needs a CUDA device" in found.found
    (found,) = faults(examination(recipe_on(corpus, "--train.attention", "nonsense"), run, None))
    assert found.found == "train.attention: attention backend 'nonsense' is unknown"

    read_only = mount("size=64m,ro")
    (found,) = faults(disk.run_folder(read_only / "run", recipe))
    assert "cannot be written: Read-only file system" in found.found

    small = mount("size=1m")
    (found,) = faults(disk.run_folder(small / "run", recipe))
    assert found.found.startswith("no space: ")
    (small / "ballast").write_bytes(bytes(2**20 - 4096))
    assert faults(disk.run_folder(small / "run", recipe))[0].found.startswith("no space: ")

    few_files = mount("size=64m,nr_inodes=50")
    (found,) = faults(disk.run_folder(few_files / "run", recipe))
    assert "more files" in found.found

    broken = tmp_path / "shards"
    broken.mkdir()
    shard = cut_off(corpus, broken)
    (found,) = faults(examination(recipe, run, str(broken)))
    assert f"{shard.name} has {shard.stat().st_size} bytes instead of " in found.found
    shard.unlink()
    (found,) = faults(examination(recipe, run, str(broken)))
    assert f"{shard.name} is missing" in found.found
    assert [path.name for folder in (memory, tmp_path) for path in folder.glob("**/.doctor-*")] == []


def test_a_clip_that_is_another_than_indexed(corpus: Corpus, tmp_path: Path) -> None:
    """The sizes are right, so that only reading a clip can tell."""
    shard = cut_off(corpus, tmp_path)
    content = bytearray((corpus.shards / shard.name).read_bytes())
    content[len(content) // 4 :] = bytes(len(content) - len(content) // 4)
    shard.write_bytes(content)
    findings = faults(clips.shards(str(tmp_path), None))
    assert "is not the one in the index" in findings[0].found


def test_hub_files_that_are_not_there(corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    named = ["--method.language_model.pretrained", "nobody/no-model", "--text.tokenizer", str(tmp_path)]
    named += ["--method.visual.frames.pretrained", "not a name"]
    recipe = recipe_on(corpus, *named)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    dino, model, tokenizer = faults(inputs.hub_files(recipe))
    assert (model.state, model.subject) == ("fault", "method.language_model.pretrained")
    assert "config.json, model.safetensors" in model.found
    assert model.remedy.endswith("hf download nobody/no-model config.json model.safetensors")
    assert "neither a folder nor a name on the hub" in dino.found
    assert "lacks tokenizer_config.json or config.json, tokenizer.json or" in tokenizer.found
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    assert {one.state for one in inputs.hub_files(recipe) if "cache" in one.found} == {"warning"}


def test_a_run_folder_of_another_configuration(corpus: Corpus, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(recipe_on(corpus, "--optim.lr", "0.5").to_json())
    (found,) = faults(examination(recipe_on(corpus), tmp_path, None))
    assert found.state == "fault"
    assert "optim.lr 0.5 (run)" in found.found


def test_a_run_folder_in_use(corpus: Corpus, tmp_path: Path) -> None:
    recipe, folder = recipe_on(corpus), RunFolder(tmp_path / "run")
    folder.open(recipe, {}, {}, 1)
    (found,) = faults(examination(recipe, folder.path, None))
    folder.close()
    assert (found.state, found.found.startswith("in use by process ")) == ("warning", True)
    assert faults(examination(recipe, folder.path, None)) == []


def test_an_interface_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "nosuch0")
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "nosuch0")
    (found,) = faults(software.process_group())
    assert "SOCKET_IFNAME names nosuch0" in found.found
    assert "lo" in found.remedy


def test_overrides_need_a_recipe(command: Command) -> None:
    done = command("-m", "sltscale.cli", "doctor", "--optim.lr", "1")
    assert done.returncode == 2
    assert "name it with --recipe" in done.stderr
