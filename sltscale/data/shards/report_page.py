"""The page of a shard report: one file without scripts or anything from outside, in light and in dark.

All that comes from a corpus is escaped, and the content security policy allows nothing but the page's own style and
embedded pictures, so that a text which is HTML does nothing even if an escape were missing.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

WIDTH, HEIGHT, FLOOR, LEFT = 640, 200, 160, 44
COLOURS = 4  # classes s0 ... of the style sheet
TITLES = {
    "seconds": "Duration (seconds)",
    "frames": "Frames",
    "characters": "Text length (characters)",
    "fps": "Frames per second",
    "resolution": "Resolution of the sources (width x height)",
}
RULES = {
    "exact": "the same text",
    "normalised": "the same but for case, punctuation, white space and Unicode form",
    "same_words": "the same words in any order and number",
}
STYLE = """
:root { color-scheme: light dark; --ink: #1b1b1b; --paper: #fff; --line: #ccc; --s0: #2b6cb0; --s1: #c05621;
  --s2: #2f855a; --s3: #805ad5; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e6e6; --paper: #161616; --line: #444; --s0: #63a4e8;
  --s1: #ed8936; --s2: #68d391; --s3: #b794f4; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 70rem;
  margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; margin: .5rem 0 1rem; }
th, td { text-align: left; vertical-align: top; padding: .2rem .8rem .2rem 0; border-bottom: 1px solid var(--line); }
td.number { text-align: right; font-variant-numeric: tabular-nums; }
svg { width: 100%; max-width: 640px; height: auto; }
svg text { fill: var(--ink); font: 11px system-ui, sans-serif; }
svg line { stroke: var(--line); }
.s0 { fill: var(--s0); color: var(--s0); } .s1 { fill: var(--s1); color: var(--s1); }
.s2 { fill: var(--s2); color: var(--s2); } .s3 { fill: var(--s3); color: var(--s3); }
figure { display: inline-block; width: 200px; margin: 0 .6rem 1rem 0; vertical-align: top; overflow-wrap: anywhere; }
figcaption { font-size: 12px; }
"""


@dataclass(frozen=True)
class Thumbnail:
    """The middle frame of a clip. jpeg: base64, None if the clip cannot be read, for the reason ``fault``."""

    split: str
    id: str
    text: str
    jpeg: str | None
    fault: str


def page(facts: Mapping[str, Any], thumbnails: Sequence[Thumbnail]) -> str:
    """A whole HTML document. facts: as ``report.shard_facts`` gives them."""
    splits = list(facts["splits"])
    title = f"Shards: {', '.join(facts['corpus']) or 'no clip was packed'}"
    style = base64.b64encode(hashlib.sha256(STYLE.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'sha256-{style}'; base-uri 'none'; form-action 'none'"
    body = [
        f"<h1>{_text(title)}</h1>",
        _splits(facts["splits"]),
        *(f"<h2>{_text(TITLES[name])}</h2>{_chart(chart, splits)}" for name, chart in facts["histograms"].items()),
        "<h2>Clips</h2>",
        *map(_figure, thumbnails),
        "<h2>Rejected</h2>",
        _rejected(facts["rejected"]),
        "<h2>Notes of the reader</h2>",
        _table(
            ("splits", "note", ""),
            ((", ".join(part["splits"]), note, n) for part in facts["notes"] for note, n in part["notes"].items()),
        ),
        "<h2>Source videos in several splits</h2>",
        _table(
            ("splits", "videos", "examples"),
            (
                (pair, shared["sources"], ", ".join(shared["examples"]))
                for pair, shared in facts["shared_sources"].items()
            ),
        ),
        "<h2>Texts that occur more than once</h2>",
        *(f"<h3>{_text(RULES[rule])}</h3>{_duplicates(found)}" for rule, found in facts["duplicate_texts"].items()),
        "<h2>Characters outside the expected script</h2>",
        _characters(facts["foreign_characters"]),
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_text(policy)}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{_text(title)}</title><style>{STYLE}</style></head>\n<body>\n" + "\n".join(body) + "\n</body></html>\n"
    )


def _text(value: object) -> str:
    return escape(str(value), quote=True)


def _cell(value: object) -> str:
    if isinstance(value, int | float):
        return f'<td class="number">{f"{value:,}" if isinstance(value, int) else f"{value:,.2f}"}</td>'
    return f"<td><bdi>{_text(value)}</bdi></td>"


def _table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = ["".join(map(_cell, row)) for row in rows]
    if not lines:
        return "<p>none</p>"
    head = "".join(f"<th>{_text(name)}</th>" for name in header)
    return f"<table><tr>{head}</tr>" + "".join(f"<tr>{line}</tr>" for line in lines) + "</table>"


def _splits(splits: Mapping[str, Mapping[str, Any]]) -> str:
    names = ("clips", "hours", "frames", "bytes", "shards", "frame_size", "sources", "signers", "languages")
    header = ("split", *(name.replace("_", " ") for name in names))
    return _table(
        header,
        (
            (split, *(", ".join(total[name]) if name == "languages" else total[name] for name in names))
            for split, total in splits.items()
        ),
    )


def _rejected(kinds: Sequence[Mapping[str, Any]]) -> str:
    def example(row: Mapping[str, Any]) -> str:
        return f"{row['file'] or 'annotations'}:{row['line']} {row['id']}: {row['reason']}"

    return _table(
        ("clips", "reason", "the first"),
        ((kind["count"], kind["reason"], "; ".join(map(example, kind["examples"]))) for kind in kinds),
    )


def _duplicates(found: Mapping[str, Any]) -> str:
    within = ((split, clips) for split, clips in found["within"].items())
    across = (
        (
            pair,
            shared["texts"],
            ", ".join(f"{clips} of {split}" for split, clips in shared["clips"].items()),
            "; ".join(f"{row['text']} ({' = '.join(row['ids'])})" for row in shared["examples"]),
        )
        for pair, shared in found["across"].items()
    )
    most = ((row["clips"], row["split"], row["text"]) for row in found["most_frequent"])
    return (
        _table(("within split", "clips whose text an earlier clip has"), within)
        + _table(("across splits", "texts", "clips", "examples"), across)
        + _table(("clips", "split", "most frequent"), most)
    )


def _characters(splits: Mapping[str, Mapping[str, Any]]) -> str:
    rows = [
        (
            split,
            language,
            json.dumps(one["character"]).strip('"'),
            one["character"],
            one["name"],
            one["count"],
            one["first"],
        )
        for split, languages in splits.items()
        for language, found in languages.items()
        for one in found["characters"]
    ]
    unknown = sorted({name for languages in splits.values() for name, one in languages.items() if not one["expected"]})
    note = f"<p>not checked, for want of a known script: {_text(', '.join(unknown))}</p>" if unknown else ""
    return note + _table(("split", "language", "code", "character", "name", "count", "first in clip"), rows)


def _figure(thumbnail: Thumbnail) -> str:
    if thumbnail.jpeg is None:
        picture = f"<p>cannot be shown: {_text(thumbnail.fault)}</p>"
    else:
        picture = f'<img alt="middle frame" src="data:image/jpeg;base64,{_text(thumbnail.jpeg)}">'
    caption = f"{_text(thumbnail.split)} <bdi>{_text(thumbnail.id)}</bdi>: <bdi>{_text(thumbnail.text)}</bdi>"
    return f"<figure>{picture}<figcaption>{caption}</figcaption></figure>"


def _chart(chart: Mapping[str, Any], splits: Sequence[str]) -> str:
    """Bars, one split on top of the other."""
    edges = chart.get("edges")
    labels = [f"{edge:g}" for edge in edges] if edges is not None else chart["values"]
    counts = [[chart["counts"][split][bar] for split in splits] for bar in range(len(labels))]
    highest = max(map(sum, counts), default=0)
    if not highest:
        return "<p>none</p>"
    step = (WIDTH - LEFT) / len(labels)
    marks = [
        f'<text x="{LEFT - 4}" y="12" text-anchor="end">{highest:,}</text>',
        f'<line x1="{LEFT}" y1="{FLOOR}" x2="{WIDTH}" y2="{FLOOR}"/>',
    ]
    for bar, (label, column) in enumerate(zip(labels, counts, strict=True)):
        x, y = LEFT + bar * step, float(FLOOR)
        last = edges is not None and bar == len(labels) - 1
        span = f"{label} and more" if last else f"{label} to {labels[bar + 1]}" if edges is not None else label
        for number, count in enumerate(column):
            height = count * (FLOOR - 4) / highest
            y -= height
            tip = f"<title>{_text(f'{splits[number]}, {span}: {count:,}')}</title>"
            place = f'x="{x + 1:.1f}" y="{y:.2f}" width="{max(step - 2, 1):.1f}" height="{height:.2f}"'
            marks.append(f'<rect class="s{number % COLOURS}" {place}>{tip}</rect>')
        if edges is None or bar % 4 == 0:
            at = x if edges is not None else x + step / 2
            turned = f' transform="rotate(-20 {at:.1f} {FLOOR + 16})"' if edges is None and len(labels) > 6 else ""
            marks.append(f'<text x="{at:.1f}" y="{FLOOR + 16}" text-anchor="middle"{turned}>{_text(label)}</text>')
    legend = " ".join(f'<span class="s{n % COLOURS}">■</span> {_text(split)}' for n, split in enumerate(splits))
    return f'<p>{legend}</p><svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img">{"".join(marks)}</svg>'
