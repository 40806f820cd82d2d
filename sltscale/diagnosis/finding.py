"""What a look at one part of the set-up brings to light, and how a look that fails is told."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

from sltscale.errors import InputError

State = Literal["ok", "warning", "fault"]


@dataclass(frozen=True)
class Finding:
    """subject: what was looked at. found: one line. remedy: what to do about it; empty where all is well."""

    subject: str
    state: State
    found: str
    remedy: str = ""


Check = Callable[[], Iterable[Finding]]


def examine(subject: str, check: Check) -> list[Finding]:
    """The findings of ``check``. If it cannot go on, that is a fault too, and the other checks are still made."""
    findings = []
    try:
        for finding in check():
            findings.append(finding)  # noqa: PERF402 - what was found before an error counts
    except InputError as error:
        found, _, remedy = str(error).partition("; ")
        findings.append(Finding(subject, "fault", found, remedy or "see there"))
    except Exception as error:  # a diagnosis that dies of what it should name would be of no use
        reason = next(iter(str(error).splitlines()), "")
        findings.append(Finding(subject, "fault", f"{type(error).__name__}: {reason}", "mend what the error names"))
    return findings
