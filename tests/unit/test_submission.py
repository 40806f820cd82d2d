"""Job scripts: what is rendered is a sound script that asks for what was asked for; mistakes are refused before."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from launching import ROOT

from sltscale.errors import InputError
from sltscale.submission import Job, Site, read_site, render

Command = Callable[..., subprocess.CompletedProcess[str]]
SCRIPTS = sorted((ROOT / "slurm").glob("*.sbatch"))
JOB = Job("demo", ("--recipe", "demo", "--run", "/a run"), nodes=4, processes=8, gpus=True, time="1-00:00:00")


def site(tmp_path: Path, text: str) -> Site:
    path = tmp_path / "site.env"
    path.write_text(text)
    return read_site(path)


def directives(script: str) -> dict[str, str]:
    lines = [line.removeprefix("#SBATCH --") for line in script.splitlines() if line.startswith("#SBATCH")]
    options = dict(line.partition("=")[::2] for line in lines)
    assert len(options) == len(lines), "an option is there twice"
    return options


def check_syntax(script: Path) -> None:
    subprocess.run(["bash", "-n", script], check=True)
    if shutil.which("shellcheck") is not None:
        done = subprocess.run(["shellcheck", "--external-sources", script], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("path", [*SCRIPTS, ROOT / "slurm/environment.sh"], ids=lambda path: path.name)
def test_the_scripts_are_sound(path: Path) -> None:
    check_syntax(path)


def test_dry_run_prints_a_sound_script(command: Command, tmp_path: Path) -> None:
    (tmp_path / "site.env").write_text("SBATCH_ACCOUNT=me\nNCCL_DEBUG='WARN'\nMODULES=\"a b\"\n")
    done = command(
        *("-m", "sltscale.cli", "submit", "demo", "--nodes", "4", "--gpus", "2", "--time", "12:00:00", "--dry-run"),
        *("--run", tmp_path / "a run", "--optim.lr", "1e-4", "--site", tmp_path / "site.env", "--max-requeues", "7"),
    )
    assert done.returncode == 0, done.stderr
    (tmp_path / "job.sh").write_text(done.stdout)
    check_syntax(tmp_path / "job.sh")
    options = directives(done.stdout)
    assert (options["nodes"], options["ntasks-per-node"], options["gpus-per-node"]) == ("4", "2", "2")
    assert (options["time"], options["account"], options["signal"]) == ("12:00:00", "me", "USR1@180")
    assert {"requeue", "open-mode"} <= options.keys()
    assert "export MAX_REQUEUES=7\n" in done.stdout
    assert "export MODULES='a b'\n" in done.stdout
    assert not (tmp_path / "a run").exists()


def test_what_the_job_is_given_arrives(tmp_path: Path) -> None:
    """The rendered script, with programs in place of srun and Python that print their arguments and variables."""
    lines = render("train", Site({"NCCL_DEBUG": "a b", "VENV": ""}), JOB).splitlines()
    script = "\n".join(line for line in lines if not line.startswith(". slurm/environment.sh"))
    fakes = 'step=(printf "<%s>"); finish() { echo; echo "$1 $NCCL_DEBUG $#"; }\n'
    head, body = script.split("export site_included=yes\n")
    done = subprocess.run(["bash", "-c", f"{head}\n{fakes}{body}"], capture_output=True, text=True, check=True)
    arguments, end = done.stdout.splitlines()
    assert arguments == (
        "<python><sltscale/train.py><--deepspeed><ds_configs/zero2.json><--recipe><demo><--run></a run>"
    )
    assert end == "0 a b 5"


def test_job_before_site_before_script(tmp_path: Path) -> None:
    where = site(tmp_path, "SBATCH_TIMELIMIT=10\nSBATCH_OUTPUT=logs/%j.out\nSBATCH_EXCLUSIVE=\n")
    options = directives(render("train", where, JOB))
    assert (options["time"], options["output"], options["job-name"]) == ("1-00:00:00", "logs/%j.out", "demo")
    assert options["exclusive"] == ""
    assert directives(render("train", where, Job("x", ())))["time"] == "10"
    assert "gpus-per-node" not in directives(render("train", where, Job("x", ())))


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("SBATCH_ACOUNT=me", "line 2: unknown key SBATCH_ACOUNT; did you mean SBATCH_ACCOUNT"),
        ("PATH=/bin", "unknown key PATH"),
        ("MODULES=$(reboot)", "no $ or `"),
        ("MODULES=cuda gcc", "VALUE in quotes if it has spaces"),
        ("just words", "expected KEY=VALUE"),
        ("VENV=a\nVENV=b", "line 3: VENV is set a second time"),
    ],
)
def test_mistakes_in_the_site_file(line: str, expected: str, tmp_path: Path) -> None:
    with pytest.raises(InputError) as refusal:
        site(tmp_path, f"# of the site\n{line}\n")
    assert expected in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_the_example_is_read_by_python_and_bash_alike(tmp_path: Path) -> None:
    text = (ROOT / "slurm/site.env.example").read_text()
    every_key = tmp_path / "site.env"
    every_key.write_text(
        "".join(line.removeprefix("#") + "\n" for line in text.splitlines() if not line.startswith("# "))
    )
    values = read_site(every_key).values
    assert len(values) > 20
    read = f"set -a; . {every_key}; python3 -c 'import json, os; print(json.dumps(dict(os.environ)))'"
    done = subprocess.run(["bash", "-c", read], capture_output=True, text=True, check=True)
    assert values.items() <= json.loads(done.stdout).items()


def test_refusals_of_submit(command: Command, tmp_path: Path) -> None:
    submit = ("-m", "sltscale.cli", "submit", "demo", "--dry-run")
    (tmp_path / "site.env").write_text("PARTITION=gpu\n")
    for arguments, expected in (
        (("--gpus", "8", "--site", tmp_path / "site.env"), "unknown key PARTITION"),
        (("--gpus", "8", "--site", tmp_path / "none"), "cannot be read"),
        (("--gpus", "8", "--time", "1 day"), "--time '1 day'"),
        (("--gpus", "8", "--nodes", "400"), "3200 ranks"),
        (("--gpus", "8", "--optim.rl", "1"), "optim.rl"),
        (("--gpus", "8", "--deepspeed", tmp_path / "none.json"), "does not exist"),
        (("--gpus", "0"), "at least 1"),
    ):
        done = command(*submit, *arguments)
        assert done.returncode == 2, done.stdout
        assert expected in done.stderr.splitlines()[-1]


def test_a_job_that_was_requeued_too_often_ends() -> None:
    script = "SLURM_JOB_ID=1 SLURM_RESTART_COUNT=4 MAX_REQUEUES=3; . slurm/environment.sh; echo on"
    done = subprocess.run(["bash", "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    assert "more than 3 times" in done.stderr
    outside = subprocess.run(["bash", "-c", ". slurm/environment.sh"], cwd=ROOT, env={}, capture_output=True, text=True)
    assert outside.returncode == 2
    assert "not inside a SLURM job" in outside.stderr


def test_progress(command: Command, tmp_path: Path, environment: dict[str, str]) -> None:
    """Of a run folder with two starts of job 9: at step 0 and, after a checkpoint of step 4, at step 4."""
    run = tmp_path / "run"
    (run / "checkpoints/step-00000004").mkdir(parents=True)
    attempts = [{"job": 9, "job_start": 1, "step": 0}, {"job": 9, "job_start": 2, "step": 4}, {"step": 0}]
    (run / "environment.json").write_text(json.dumps(attempts))

    def asked(code: int, start: int, job: int = 9) -> tuple[int, str]:
        arguments = ["progress", "--exit-code", str(code), "--recipe", "demo", "--run", str(run)]
        variables = environment | {"SLURM_JOB_ID": str(job), "SLURM_RESTART_COUNT": str(start - 1)}
        done = subprocess.run(
            [sys.executable, "-m", "sltscale.cli", *arguments],
            env=variables,
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
        return done.returncode, done.stdout

    assert asked(1, 1)[0] == 0
    assert asked(1, 2) == (1, "not requeued: no progress in 1 starts of job 9; the same would come again\n")
    assert [asked(75, start)[0] for start in (2, 3, 4)] == [0, 0, 1]
    assert asked(75, 1, job=10)[0] == 0
    assert asked(0, 1)[0] == 1
    assert "input is at fault" in asked(2, 1)[1]
    (run / "STATUS.json").write_text('{"state": "finished", "step": 4, "seconds": 1}')
    assert asked(1, 2)[0] == 0
