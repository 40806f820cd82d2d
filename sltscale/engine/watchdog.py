"""A run that hangs says where, on every rank, and ends.

Each rank watches itself: when a step (or the start-up) takes longer than ``train.watchdog_seconds``, the stacks of all
its threads go to RUN/stacks/rank-00000.txt. Ranks that wait in a collective for one that hangs are late at the same
moment, so there is a file for each. A little later all end with exit code 1.
"""

from __future__ import annotations

import datetime
import faulthandler
import os
import sys
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import NoReturn

from sltscale import parallel
from sltscale.engine.compile_lock import compile_locks
from sltscale.engine.run_folder import OWNER_SECONDS, FencedError, RunFolder

LOOK_SECONDS = 1.0
# Other ranks have come to the same point a little later; the launcher ends them as soon as one has gone.
GRACE_SECONDS = 10.0
# A thread that never lets go of the interpreter also stops ours; then the C library's timer writes to stderr.
LAST_RESORT_SECONDS = 20.0


class Watchdog:
    """``watch`` begins what may take ``seconds``, ``rest`` ends it; ``folder`` is set as soon as it is opened."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.folder: RunFolder | None = None
        self._now: tuple[str, float, float] | None = None  # what, its seconds, and until when; replaced as a whole
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._guard, daemon=True)

    def __enter__(self) -> Watchdog:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: BaseException | TracebackType | None) -> None:
        self.rest()
        self._ended.set()

    def watch(self, what: str, times: int = 1) -> None:
        """From now on ``what`` is being done, which may take so many times ``seconds``; it replaces what was before."""
        allowed = times * self.seconds
        self._now = (what, allowed, time.monotonic() + allowed)
        faulthandler.dump_traceback_later(allowed + LAST_RESORT_SECONDS, exit=True, file=2)

    def rest(self) -> None:
        """Nothing that could be late is being done."""
        self._now = None
        faulthandler.cancel_dump_traceback_later()

    def _guard(self) -> None:
        owner_looked_at = time.monotonic()
        while not self._ended.wait(min(LOOK_SECONDS, self.seconds / 4)):
            now = self._now
            if now is not None and time.monotonic() > now[2]:
                self._give_up(now[0], now[1])
            if self.folder is not None and time.monotonic() > owner_looked_at + OWNER_SECONDS:
                owner_looked_at = time.monotonic()
                try:
                    self.folder.check_owner()
                except FencedError as error:
                    print(f"error: rank {parallel.rank()}: {error}", file=sys.stderr, flush=True)
                    os._exit(1)

    def _give_up(self, what: str, allowed: float) -> NoReturn:
        rank = int(os.environ.get("RANK", "0"))
        line = f"error: rank {rank}: {what} has taken longer than {allowed:g} s (train.watchdog_seconds)"
        try:
            if self.folder is None:
                faulthandler.dump_traceback(file=2, all_threads=True)
            else:
                self.folder.check_owner()
                line += f"; where it is: {_write_stacks(self.folder.stacks, rank, line)}"
                with self.folder.log.open("a", encoding="utf-8") as log:
                    log.write(line + "\n")
        except (OSError, FencedError) as error:
            line += f"; stacks not written ({error})"
        locks = ", ".join(str(lock) for lock in compile_locks())
        print(f"{line}; compile locks: {locks}" if locks else line, file=sys.stderr, flush=True)
        time.sleep(GRACE_SECONDS)
        os._exit(1)


def _write_stacks(folder: Path, rank: int, headline: str) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / f"rank-{rank:05d}.txt"
    with path.open("w", encoding="utf-8") as file:
        file.write(f"{datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds')} {headline}\n\n")
        file.flush()
        faulthandler.dump_traceback(file=file, all_threads=True)
    return path
