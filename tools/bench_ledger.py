"""Where the time of a piece of work goes, by account, for the benchmarks."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import wraps
from typing import Any

from torch import nn

REST = "the rest"


class Ledger:
    """Wall time by account while it is open. An account that begins inside another takes over until it ends, so no
    moment counts twice and all of them count; what is in no account is ``REST``.

    synchronise: waits until the device has done what it was given; called at every border, so that time goes to the
    account that caused it.
    """

    def __init__(self, synchronise: Callable[[], None]) -> None:
        self._synchronise = synchronise
        self.seconds: dict[str, float] = {}
        self._open: list[str] = []
        self._since = 0.0

    def start(self) -> None:
        self._synchronise()
        self._open, self._since = [REST], time.perf_counter()

    def stop(self) -> None:
        self._turn()
        self._open = []

    def enter(self, account: str) -> None:
        if self._open:
            self._turn()
            self._open.append(account)

    def leave(self) -> None:
        if len(self._open) > 1:
            self._turn()
            self._open.pop()

    def _turn(self) -> None:
        self._synchronise()
        now = time.perf_counter()
        account = self._open[-1]
        self.seconds[account] = self.seconds.get(account, 0.0) + now - self._since
        self._since = now

    def watch(self, owner: Any, name: str, account: str) -> None:
        """From now on calls of ``owner.name`` are in that account."""
        work = getattr(owner, name)

        @wraps(work)
        def watched(*arguments: Any, **options: Any) -> Any:
            self.enter(account)
            try:
                return work(*arguments, **options)
            finally:
                self.leave()

        setattr(owner, name, watched)

    def watch_module(self, module: nn.Module, account: str) -> None:
        """From now on forward passes of ``module`` are in that account."""
        module.register_forward_pre_hook(lambda *_: self.enter(account))
        module.register_forward_hook(lambda *_: self.leave(), always_call=True)
