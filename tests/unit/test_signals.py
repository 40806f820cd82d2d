"""What a signal does to a rank, at each time of its life."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from sltscale.engine.signals import SIGNALS, HeldSignals, StoppedError, StopRequest


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in SIGNALS}
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell without job control has it ignored
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_held_until_heeded() -> None:
    held = HeldSignals()
    signal.raise_signal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        held.heed()
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGUSR1)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_request_while_steps_are_taken(number: signal.Signals) -> None:
    HeldSignals().heed()
    with StopRequest() as stop:
        signal.raise_signal(number)
        assert stop.received == number.name
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(number)


def test_what_the_launcher_sends_to_a_rank_that_has_stopped_changes_nothing() -> None:
    HeldSignals().heed()
    with pytest.raises(StoppedError), StopRequest():
        raise StoppedError
    try:
        for number in SIGNALS:
            signal.raise_signal(number)
    except KeyboardInterrupt:  # or it would end the whole session
        pytest.fail("interrupted")


LEAVING = """
import os, signal, sys
from sltscale.engine.signals import HeldSignals, leave
HeldSignals().heed()
class Slow:
    def flush(self):
        os.kill(os.getpid(), signal.SIGTERM)
sys.stdout = Slow()
leave(2)
"""


def test_a_rank_that_leaves_is_not_interrupted() -> None:
    done = subprocess.run([sys.executable, "-c", LEAVING], capture_output=True, text=True, timeout=600, check=False)
    assert (done.returncode, done.stderr) == (2, "")
