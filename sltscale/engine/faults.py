"""Named places in a save where a process can be made to die, so that tests can prove that no moment is a bad one.

``SLTSCALE_FAULT="renamed:rank0:step8:kill"`` ends rank 0 by SIGKILL when it comes to the place ``renamed`` of the save
after step 8; ``stop`` in place of ``kill`` freezes it (SIGSTOP). Without the variable nothing happens.
"""

from __future__ import annotations

import os
import re
import signal

from sltscale import parallel
from sltscale.errors import InputError

# In the order in which a save comes by; from "gathered" on only rank 0 does.
POINTS = (
    *("begin", "collected", "measured", "staged", "written", "flushed", "hashed"),
    *("gathered", "manifest", "synced", "renamed", "committed", "pruning", "pruned"),
)
SIGNALS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}


def fault_point(point: str, step: int) -> None:
    """Carry out what SLTSCALE_FAULT asks for at this place; InputError if it cannot be understood."""
    wanted = os.environ.get("SLTSCALE_FAULT")
    if wanted is None:
        return
    fields = re.fullmatch(r"(\w+):rank(\d+):step(\d+):(kill|stop)", wanted)
    if fields is None or fields[1] not in POINTS:
        raise InputError(
            f"SLTSCALE_FAULT is {wanted!r}; expected POINT:rankR:stepS:kill or :stop, POINT one of {', '.join(POINTS)}"
        )
    if (fields[1], int(fields[2]), int(fields[3])) == (point, parallel.rank(), step):
        os.kill(os.getpid(), SIGNALS[fields[4]])
