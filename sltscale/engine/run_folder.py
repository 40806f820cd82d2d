"""The folder of one run: everything needed to know what ran, and one process group at a time writing to it.

RUN/
  config.json        the resolved recipe          deepspeed.json   the engine settings
  environment.json   command, git commit, package versions, world size of each attempt
  steps.jsonl        one line per optimizer step  log.txt          what was printed
  checkpoints/  tokenizer/  tensorboard/  export/  evaluation/  curves.png  STATUS.json
  encoder.safetensors    the visual encoder, of a run that reads its tokens from files
  lock               who is writing              stacks/          where each rank was when a step took too long

The lock is held by rank 0 of the running attempt and names it. A rank that outlives its attempt - its launcher killed,
its node cut off - finds another name there and ends (fencing). Where that rank is the one that holds the lock, another
job cannot know; the next start of the same SLURM job does, for SLURM has given up the earlier one, and takes over.
"""

from __future__ import annotations

import datetime
import errno
import fcntl
import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from sltscale import config
from sltscale.engine.manifest import folders, versions
from sltscale.errors import InputError
from sltscale.files import write_atomically
from sltscale.recipe_files import differences, recipe_from_json

OWNER_SECONDS = 10.0  # how often an idle rank asks whether the run folder is still its attempt's
# Another start may have the lock for the instant of a look; one that has taken it writes its name within another.
INSTANT_SECONDS = 0.3
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)


class FencedError(Exception):
    """This process belongs to an earlier attempt: another one has taken the run folder over."""


class RunFolder:
    """Opened by every rank; only rank 0 of a run calls the methods that write.

    attempt: the name under which this process may write; None until ``join``, for a folder that is only read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.tensorboard = path / "tensorboard"
        self.export = path / "export"
        self.tokenizer = path / "tokenizer"
        self.lexicon = path / "lexicon"
        self.encoder = path / "encoder.safetensors"
        self.steps = path / "steps.jsonl"
        self.log = path / "log.txt"
        self.stacks = path / "stacks"
        self.attempt: str | None = None
        self._lock: IO[str] | None = None

    def check(self, recipe: config.Recipe) -> None:
        """InputError if the folder is in use, cannot be locked, or holds a run of another configuration; nothing is
        written."""
        self._check_lock()
        stored = self.stored_recipe()
        if stored is None:
            return
        different = differences(stored, recipe)
        if different:
            raise InputError(
                f"run folder {self.path} holds a run with another configuration: {'; '.join(different)}; "
                "choose another folder with --run, or go on with the same configuration"
            )

    def stored_recipe(self) -> config.Recipe | None:
        path = self.path / "config.json"
        return recipe_from_json(path.read_text(), str(path)) if path.is_file() else None

    def open(self, recipe: config.Recipe, deepspeed_json: dict[str, Any], data: dict[str, str], world_size: int) -> str:
        """Create or reopen the folder, take its lock, record what runs (rank 0 only); every rank has to ``join`` the
        attempt that it returns.

        data: digest of each split's index. InputError if the folder is in use, cannot be written, or was begun with
        other data.
        """
        attempt = uuid.uuid4().hex[:12]
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._take_lock(attempt)
            path = self.path / "data.json"
            begun_with = json.loads(path.read_text()) if path.is_file() else data
            if begun_with != data:
                changed = ", ".join(split for split in data if begun_with.get(split) != data[split])
                raise InputError(
                    f"run folder {self.path} was begun with other shards in "
                    f"{recipe.data.features or recipe.data.shards} (changed: {changed}); "
                    "choose another folder with --run"
                )
            write_atomically(path, json.dumps(data, indent=2) + "\n")
            write_atomically(self.path / "config.json", recipe.to_json())
            write_atomically(self.path / "deepspeed.json", json.dumps(deepspeed_json, indent=2) + "\n")
            self._record_attempt(world_size)
        except OSError as error:
            raise InputError(f"run folder {self.path} cannot be written: {error.strerror}") from None
        return attempt

    def join(self, attempt: str) -> None:
        """From now on this process writes as one of that attempt."""
        self.attempt = attempt

    def check_owner(self) -> None:
        """Called before anything is written: FencedError if the run folder is another attempt's by now."""
        if self.attempt is None:
            return
        with suppress(OSError):  # a file system that does not answer is no other attempt
            holder = (self.path / "lock").read_text().strip()
            # Empty for an instant while another attempt that has the lock writes its name.
            if not holder.endswith(f"attempt {self.attempt}"):
                raise FencedError(
                    f"run folder {self.path} has been taken over ({holder or 'another attempt'}); "
                    f"this process of attempt {self.attempt} writes nothing more and ends"
                )

    def bad_clips(self) -> list[dict[str, Any]]:
        """The damaged clips that this run leaves out."""
        path = self.path / "bad_clips.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []

    def record_bad_clips(self, rows: list[dict[str, Any]]) -> None:
        if rows:
            lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
            write_atomically(self.path / "bad_clips.jsonl", "".join(lines))

    def attempts(self) -> list[dict[str, Any]]:
        """What environment.json says of every start of this run, the oldest first; empty if there was none."""
        path = self.path / "environment.json"
        return json.loads(path.read_text()) if path.is_file() else []

    def holder(self) -> str | None:
        """Who writes to the folder now, by its lock; None if nobody does."""
        with suppress(FileNotFoundError, NotADirectoryError), (self.path / "lock").open() as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return lock.read().strip() or "another process"
        return None

    def newest_step(self) -> int:
        """Steps that the newest checkpoint holds, whole or not; 0 without one."""
        return max((int(folder.name.removeprefix("step-")) for folder in folders(self.checkpoints)), default=0)

    def _check_lock(self) -> None:
        """A look from any rank before work starts; shared, so that ranks do not take each other for owners."""
        try:
            with (self.path / "lock").open() as lock:
                self._flock(lock, fcntl.LOCK_SH)
        except (FileNotFoundError, NotADirectoryError):
            place = next(folder for folder in (self.path, *self.path.absolute().parents) if folder.is_dir())
            with suppress(OSError), tempfile.TemporaryFile(dir=place) as probe:  # what cannot be written is told later
                self._flock(probe, fcntl.LOCK_SH)

    def _take_lock(self, attempt: str) -> None:
        path = self.path / "lock"
        lock = path.open("a+")
        if not self._flock(lock, fcntl.LOCK_EX):
            lock.close()
            fresh = path.with_name(f"lock.{attempt}")
            lock = fresh.open("a+")
            self._flock(lock, fcntl.LOCK_EX)
            self._sign(lock, attempt)
            fresh.replace(path)
            # Until its ranks have found the new name there, and end; what they write before that is then complete.
            time.sleep(1.5 * OWNER_SECONDS)
        elif os.fstat(lock.fileno()).st_ino != path.stat().st_ino:
            raise InputError(f"run folder {self.path} has just been taken over by another process; start again")
        else:
            self._sign(lock, attempt)
        self._lock = lock

    def _sign(self, lock: IO[str], attempt: str) -> None:
        lock.truncate(0)
        start = _slurm_start()
        job = f", job {start[0]} start {start[1]}" if start else ""
        lock.write(f"process {os.getpid()} on {socket.gethostname()}{job} since {_now()}, attempt {attempt}\n")
        lock.flush()

    def _flock(self, lock: IO[Any], kind: int) -> bool:
        """Whether the lock could be had; False if an earlier start of this very job holds it."""
        began = time.monotonic()
        while True:
            try:
                fcntl.flock(lock, kind | fcntl.LOCK_NB)
                return True
            except BlockingIOError:
                if time.monotonic() > began + INSTANT_SECONDS:
                    break
                time.sleep(0.02)
            except OSError as error:
                if error.errno not in NO_LOCKS:
                    raise
                raise InputError(
                    f"run folder {self.path} is on a file system that cannot lock ({error.strerror}), so that two jobs "
                    "could write to it; mount it with locks (Lustre: -o flock), or choose another with --run"
                ) from None
        holder = _name_in(lock)
        if not holder:
            time.sleep(INSTANT_SECONDS)
            holder = _name_in(lock)
        theirs, ours = re.search(r", job (\d+) start (\d+) ", holder), _slurm_start()
        if theirs is not None and ours is not None and int(theirs[1]) == ours[0] and int(theirs[2]) < ours[1]:
            return False
        raise InputError(
            f"run folder {self.path} is in use by {holder or 'another process'}; "
            "wait for it or choose another folder with --run"
        )

    def close(self) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def _record_attempt(self, world_size: int) -> None:
        start = _slurm_start()
        job = {"job": start[0], "job_start": start[1]} if start else {}
        attempts = [
            *self.attempts(),
            {
                "started": _now(),
                "command": sys.argv,
                "world_size": world_size,
                "host": socket.gethostname(),
                "git": _git_commit(),
                "packages": versions(),
                "step": self.newest_step(),
                **job,
            },
        ]
        write_atomically(self.path / "environment.json", json.dumps(attempts, indent=2) + "\n")

    def keep_steps_until(self, step: int) -> None:
        """Forget the records of steps that a resumed run is about to repeat."""
        if self.steps.is_file():
            lines = self.steps.read_text().splitlines()
            kept = [line for line in lines if _step_of(line) is not None and _step_of(line) < step]  # type: ignore[operator]
            write_atomically(self.steps, "".join(f"{line}\n" for line in kept))

    def status(self) -> dict[str, Any]:
        path = self.path / "STATUS.json"
        return json.loads(path.read_text()) if path.is_file() else {"state": "new", "seconds": 0.0}

    def set_status(self, state: str, *, step: int, seconds: float) -> None:
        """state: running, stopped (by a signal), trained (not yet scored) or finished; seconds: over all attempts."""
        self.check_owner()
        content = {"state": state, "step": step, "seconds": round(seconds, 3)}
        write_atomically(self.path / "STATUS.json", json.dumps(content) + "\n")


def _name_in(lock: IO[Any]) -> str:
    lock.seek(0)
    return lock.read().strip()


def _step_of(line: str) -> int | None:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return None  # the last line of a killed attempt may be cut off


def _slurm_start() -> tuple[int, int] | None:
    """The SLURM job that this process belongs to, and which of its starts this is, counted from 1."""
    job = os.environ.get("SLURM_JOB_ID")
    return (int(job), int(os.environ.get("SLURM_RESTART_COUNT", "0")) + 1) if job else None


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def _git_commit() -> str:
    """The commit of the source tree, with "+changes" if the tree differs from it; "none" outside a repository."""
    try:
        commit = _git("rev-parse", "HEAD")
        return f"{commit}+changes" if _git("status", "--porcelain", "--untracked-files=no") else commit
    except (OSError, subprocess.SubprocessError):
        return "none"


def _git(*arguments: str) -> str:
    return subprocess.run(  # noqa: S603
        ["git", *arguments],  # noqa: S607
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        timeout=10,
        check=True,
    ).stdout.strip()
