"""SPLIT.report.json: what became of the clips of one split."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from sltscale.data.clips import Rejected
from sltscale.errors import InputError
from sltscale.files import readable_bytes

SUFFIX = ".report.json"


@dataclass(frozen=True)
class Report:
    """What became of a split's clips. settings: all that its bytes depend on. notes: of the reader, on the corpus."""

    split: str
    packed: int
    rejected: tuple[Rejected, ...]
    frames: int
    seconds: float
    bytes: int
    shards: int
    settings: dict[str, Any]
    notes: dict[str, int] = field(default_factory=dict)

    def to_json(self) -> str:
        facts = asdict(self) | {"hours": self.seconds / 3600, "rejected_count": len(self.rejected)}
        facts["rejected_by_reason"] = dict(by_reason(self.rejected).most_common())
        return json.dumps(facts, indent=1, ensure_ascii=False, sort_keys=True) + "\n"

    def summary(self) -> str:
        """One line; reasons without their numbers, so that like ones are counted together."""
        reasons = "".join(f"; {count} x {reason}" for reason, count in by_reason(self.rejected).most_common())
        return (
            f"{self.split}: {self.packed} clips, {self.frames} frames, {self.seconds / 3600:.3f} h, "
            f"{readable_bytes(self.bytes)} in {self.shards} shards; {len(self.rejected)} rejected{reasons}"
        )


def read_reports(folder: Path) -> list[Report]:
    """All in ``folder``, by name; InputError for one that cannot be read."""
    return [_read(path) for path in sorted(Path(folder).glob(f"*{SUFFIX}"))]


def by_reason(rejected: Iterable[Rejected]) -> Counter[str]:
    """Counts of the reasons without what is quoted in them and without numbers."""
    return Counter(reason_kind(row.reason) for row in rejected)


def reason_kind(reason: str) -> str:
    return re.sub(r"'.*'|[0-9]+([.:][0-9]+)*", "_", reason)


def _read(path: Path) -> Report:
    try:
        facts = json.loads(path.read_bytes())
        facts["rejected"] = tuple(Rejected(**row) for row in facts["rejected"])
        return Report(**{field.name: facts[field.name] for field in fields(Report)})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is not a report of this version ({error!r}); pack again or remove it") from None
