"""How a rank ends. A signal is a wish; the ranks carry it out together at the end of a step."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from types import FrameType
from typing import NoReturn

EXIT_STOPPED = 75  # EX_TEMPFAIL: the run saved its state and can go on
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class StoppedError(Exception):
    """A signal asked the run to stop; its state is saved."""


class HeldSignals:
    """While a rank checks what it was given, SIGTERM and SIGUSR1 are held; from ``heed`` on they interrupt as
    SIGINT does.

    All ranks find the same fault, one of them first, and the launcher then ends the others. Of the ranks of a step srun
    reports the highest exit code: a rank that was interrupted before it found the fault would end with 75 and hide
    the 2.
    """

    def __init__(self) -> None:
        self._received = self.heeded = False
        self._set(self._hold)

    def heed(self) -> None:
        """Raises KeyboardInterrupt if there was one already."""
        self.heeded = True
        self._set(signal.default_int_handler)
        if self._received:
            raise KeyboardInterrupt

    def _hold(self, _number: int, _frame: FrameType | None) -> None:
        self._received = True

    @staticmethod
    def _set(handler: Callable[[int, FrameType | None], None]) -> None:
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, handler)


class StopRequest:
    """While active, SIGINT, SIGTERM and SIGUSR1 set a flag instead of ending the process.

    The loop all-reduces the flag, so that one rank's signal becomes every rank's decision. Repeated signals change
    nothing: a terminal's Ctrl-C reaches launcher and ranks at once, and the launcher adds a SIGTERM of its own. After a
    StoppedError it stays so: the launcher ends the ranks that are left as soon as the first is gone.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        self._previous: dict[int, object] = {}

    def __enter__(self) -> StopRequest:
        for number in SIGNALS:
            self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is StoppedError:
            return
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _note(self, number: int, _: FrameType | None) -> None:
        self.received = self.received or signal.Signals(number).name


def leave(code: int) -> NoReturn:
    """End this process at once with that exit code, whatever it is sent meanwhile.

    Nothing is left to do when a rank is done, but tearing down gloo's and DeepSpeed's threads now and then ends in
    SIGABRT ("terminate called without an active exception", seen once in some 60 launches although the process group
    was destroyed), and the launcher would report a finished run as failed.
    """
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
