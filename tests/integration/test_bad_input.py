"""Bad input to training: one clear line, exit code 2, before time is spent, nothing lost."""

import fcntl
import importlib.util
import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from launching import ROOT, Launcher

from sltscale.errors import InputError
from sltscale.preflight import check_kernels, plan_stages
from sltscale.recipe_files import recipe_chain

Command = Callable[..., subprocess.CompletedProcess[str]]
ZERO2 = ROOT / "ds_configs/zero2.json"


def train(command: Command, *arguments: str | Path, deepspeed: Path = ZERO2) -> subprocess.CompletedProcess[str]:
    return command("sltscale/train.py", "--deepspeed", deepspeed, *arguments)


def refusal(done: subprocess.CompletedProcess[str]) -> str:
    """The one line of a refusal."""
    assert done.returncode == 2, done.stdout + done.stderr
    lines = [line for line in done.stderr.splitlines() if "real_accelerator" not in line]
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("error: ")
    return lines[0]


def test_unknown_recipe_and_key(command: Command, corpus, tmp_path: Path) -> None:
    assert "did you mean demo" in refusal(train(command, "--recipe", "demmo"))
    line = refusal(train(command, "--recipe", corpus.pretrain, "--run", tmp_path / "run", "--optim.rl", "1"))
    assert "optim.rl" in line
    assert "lr" in line
    assert not (tmp_path / "run").exists()


def test_deepspeed_json_that_sets_what_the_recipe_owns(command: Command, corpus, tmp_path: Path) -> None:
    for content, expected in (
        ('{"train_batch_size": 8}', "train_batch_size"),
        ('{"optimizer": {"type": "AdamW"}}', "optimizer"),
        ('{"gradient_clipping": 1.0}', "gradient_clipping"),
        ("{", "not valid JSON"),
        ("[]", "no JSON object"),
        ('{"zero_optimization": {"stage": 2, "compute_grad_norm": false}}', "compute_grad_norm"),
        ('{"bf16": {"enabled": true, "check_grad_overflow": false}}', "check_grad_overflow"),
    ):
        path = tmp_path / "ds.json"
        path.write_text(content)
        assert expected in refusal(train(command, "--recipe", corpus.pretrain, deepspeed=path))
    assert "does not exist" in refusal(train(command, deepspeed=tmp_path / "none.json"))


def test_an_attention_backend_that_is_not_installed_or_not_for_this_device(command: Command, tmp_path: Path) -> None:
    run = tmp_path / "run"
    options = ("--data.shards", str(tmp_path / "none"))

    def check(name: str) -> None:
        chosen = [*options, "--method.visual.temporal.attention", name]
        check_kernels(plan_stages(recipe_chain("hfa_pretrain_tiny", chosen, run)), {})

    for name, expected in (
        ("flash_attn", r"is not installed: pip install 'sltscale\[cuda\]', or take one of "),
        ("torch_varlen", "needs a CUDA device, found cpu"),
        ("flash", "is unknown; expected one of flash_attn, "),
    ):
        if name == "flash_attn" and importlib.util.find_spec(name):
            continue
        with pytest.raises(InputError, match=f"method.visual.temporal.attention: attention backend .*{expected}"):
            check(name)
    check("sdpa")
    recipe = ("--recipe", "hfa_pretrain_tiny", "--run", run)
    line = refusal(train(command, *recipe, *options, "--train.attention", "torch_varlen"))
    assert "train.attention: attention backend torch_varlen needs a CUDA device, found cpu" in line
    assert not run.exists()
    assert not (tmp_path / "none").exists()


def test_run_folder_of_another_configuration(command: Command, corpus, tmp_path: Path) -> None:
    run = tmp_path / "run"
    done = train(command, "--recipe", corpus.pretrain, "--run", run, "--train.epochs", "1")
    assert done.returncode == 0, done.stderr
    before = sorted(path for path in run.rglob("*"))
    line = refusal(train(command, "--recipe", corpus.pretrain, "--run", run, "--optim.lr", "0.5"))
    assert "optim.lr 0.001 (run) / 0.5 (asked)" in line
    assert sorted(path for path in run.rglob("*")) == before


def test_run_folder_that_cannot_be_written(command: Command, corpus, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    line = refusal(train(command, "--recipe", corpus.pretrain, "--run", tmp_path / "file/run"))
    assert "cannot be written" in line


def test_missing_shards_and_damaged_shards(command: Command, corpus, tmp_path: Path) -> None:
    run = tmp_path / "run"
    line = refusal(train(command, "--recipe", corpus.pretrain, "--data.shards", tmp_path / "none", "--run", run))
    assert "holds no index" in line
    assert not run.exists()
    shards = tmp_path / "shards"
    shutil.copytree(corpus.shards, shards)
    tar = next(shards.glob("train-*.tar"))
    content = bytearray(tar.read_bytes())
    rows = [json.loads(line) for line in show(command, shards) if json.loads(line)["split"] == "train"]
    damaged = rows[len(rows) // 2]
    content[damaged["offset"] + damaged["size"] // 2] ^= 1
    tar.write_bytes(content)
    run = tmp_path / "run"
    line = refusal(train(command, "--recipe", corpus.pretrain, "--data.shards", shards, "--run", run))
    assert tar.name in line
    assert damaged["id"] in line or damaged["key"] in line
    assert not (run / "steps.jsonl").exists()


def show(command: Command, shards: Path) -> list[str]:
    done = command("-m", "sltscale.cli", "shards", "show", shards)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_a_run_without_checkpoint_or_none_at_all(command: Command, corpus, tmp_path: Path) -> None:
    places = ("--shards", corpus.shards, "--out", tmp_path / "out")
    done = command("-m", "sltscale.cli", "evaluate", "--run", tmp_path / "nothing", *places)
    assert "is no run folder" in refusal(done)
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_text(command("-m", "sltscale.cli", "config", corpus.translate).stdout)
    done = command("-m", "sltscale.cli", "evaluate", "--run", run, *places)
    assert "holds no checkpoint" in refusal(done)


def test_start_from_a_run_that_is_not_there(command: Command, corpus, tmp_path: Path) -> None:
    done = train(
        *(command, "--recipe", corpus.translate, "--run", tmp_path / "run"),
        *("--start", "none", "--start.run", tmp_path / "absent"),
    )
    assert "absent" in refusal(done)


def test_a_rank_that_fails_says_so_through_the_launcher(corpus, launcher: Launcher, tmp_path: Path) -> None:
    """One line, whichever of the ranks meets the fault first; the launcher passes the exit code on."""
    arguments = ["--deepspeed", str(ZERO2), "--recipe", str(corpus.pretrain), "--run", str(tmp_path / "run")]
    done = launcher.run(ROOT / "sltscale/train.py", [*arguments, "--optim.lr", "fast"], ranks=2)
    assert done.returncode == 2
    assert done.output.count("error: ") == 1
    assert "optim.lr" in done.output
    # Of the demo, whose corpus would have to be drawn first.
    arguments = ["--deepspeed", str(ZERO2), "--run", str(tmp_path / "run"), "--data.shards", str(tmp_path / "shards")]
    done = launcher.run(ROOT / "sltscale/train.py", [*arguments, "--data.global_batch", "1"], ranks=2)
    assert done.returncode == 2
    assert "error: 2 ranks, but recipe demo has global batches of 1 clips" in done.output
    assert list(tmp_path.iterdir()) == []


def test_a_second_start_on_a_run_folder_in_use(command: Command, corpus, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    with (run / "lock").open("w+") as lock:
        lock.write("process 7 on that host\n")
        lock.flush()
        fcntl.flock(lock, fcntl.LOCK_EX)
        line = refusal(train(command, "--recipe", corpus.pretrain, "--run", run))
    assert "in use by process 7 on that host" in line


@pytest.mark.parametrize(("in_use", "code"), [(True, 2), (False, 75)])
def test_a_rank_that_is_ended_while_it_starts(
    in_use: bool, code: int, corpus, environment: dict[str, str], tmp_path: Path
) -> None:
    """Rank 0 is gone with the fault that all find; ended for it, the others end with its exit code and say
    nothing. Without a fault they end as one that was stopped."""
    run = tmp_path / "run"
    run.mkdir()
    place = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    arguments = ["--deepspeed", str(ZERO2), "--recipe", str(corpus.pretrain), "--run", str(run)]
    with (run / "lock").open("w") as lock:
        if in_use:
            fcntl.flock(lock, fcntl.LOCK_EX)
        process = subprocess.Popen(
            [sys.executable, str(ROOT / "sltscale/train.py"), *arguments],
            cwd=ROOT,
            env=environment | place,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        try:
            while not catches(process.pid, signal.SIGTERM):
                assert process.poll() is None
                time.sleep(0.01)
            process.terminate()
            output, _ = process.communicate(timeout=600)
        finally:
            process.kill()
    lines = [line for line in output.splitlines() if "real_accelerator" not in line]
    assert (process.returncode, lines) == (code, [])


def catches(process: int, number: signal.Signals) -> bool:
    status = dict(line.split(":\t", 1) for line in Path(f"/proc/{process}/status").read_text().splitlines())
    return bool(int(status["SigCgt"], 16) >> (number - 1) & 1)


def test_lengths_that_no_model_position_could_hold(command: Command, corpus, tmp_path: Path) -> None:
    for key in ("--data.max_frames", "--text.max_tokens", "--evaluation.max_new_tokens"):
        line = refusal(command("-m", "sltscale.cli", "config", corpus.translate, key, "129"))
        assert "max_positions 128" in line
