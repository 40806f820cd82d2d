"""How each sign of the synthetic corpus is performed, and how signs flow into each other.

Body coordinates: x grows towards the side of the dominant hand, y grows downwards, (0, 0) is the middle of the chest;
the head's centre is (0, -0.52), the shoulders are (+-0.34, -0.2), the picture shows about -1 to 1. A pose is a vector
[POSE] = dominant hand [HAND], weak hand [HAND], face [FACE]:
    hand  x, y, angle (degrees; 0 = fingers up, 90 = towards the other side, 180 = down),
          extension 0..1 of thumb, index, middle, ring and little finger, spread 0..1, ring 0..1 (thumb meets index)
    face  brows -1..1 (lowered..raised), mouth width 0..1, mouth opening 0..1, eyes 0..1.5 (shut..wide), head tilt -1..1
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

HAND, FACE = 10, 5
POSE = 2 * HAND + FACE

#             thumb index middle ring little spread ring
_HANDSHAPES = {
    "fist": (0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0),
    "flat": (0.2, 1.0, 1.0, 1.0, 0.9, 0.0, 0.0),
    "spread": (1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.0),
    "point": (0.0, 1.2, 0.0, 0.0, 0.0, 0.0, 0.0),
    "vee": (0.0, 1.1, 1.1, 0.0, 0.0, 1.3, 0.0),
    "three": (1.1, 1.1, 1.1, 0.0, 0.0, 1.2, 0.0),
    "horns": (1.1, 0.0, 0.0, 0.0, 1.2, 1.2, 0.0),
    "thumb": (1.4, 0.0, 0.0, 0.0, 0.0, 1.0, 0.0),
    "ell": (1.3, 1.3, 0.0, 0.0, 0.0, 0.8, 0.0),
    "ring": (0.0, 0.0, 0.8, 0.8, 0.8, 0.8, 1.0),
}
#          brows width open eyes tilt
_FACES = {
    "calm": (0.0, 0.5, 0.1, 1.0, 0.0),
    "raised": (1.0, 0.4, 0.2, 1.4, 0.0),
    "frown": (-1.0, 0.6, 0.0, 0.7, 0.0),
    "smile": (0.3, 1.0, 0.4, 0.9, 0.0),
    "round": (0.2, 0.2, 0.9, 1.0, 0.0),
    "gape": (0.6, 0.8, 1.0, 1.3, 0.0),
    "shut": (0.1, 0.5, 0.1, 0.0, 0.0),
    "lean": (0.2, 0.7, 0.2, 1.0, 0.9),
    "recoil": (-0.5, 0.3, 0.3, 0.8, -0.9),
}
_REST_HAND = (0.3, 0.8, 150.0, 0.3, 0.4, 0.4, 0.4, 0.4, 0.2, 0.0)


class Form(NamedTuple):
    """How one sign is made.

    hands: one (dominant), both (mirror images), alternate (mirror images half a cycle apart) or base (the dominant
    hand over a flat weak hand). place: where the dominant hand starts. move: line and arc travel by (dx, dy); shake
    swings twice by +-(dx, dy); circle turns once, dx wide and dy high. face: the cue that goes with the hands;
    shake_head turns it from side to side.
    """

    hands: Literal["one", "both", "alternate", "base"]
    handshape: str
    place: tuple[float, float]
    angle: float
    move: Literal["line", "arc", "shake", "circle"]
    by: tuple[float, float]
    face: str
    shake_head: bool = False


FORMS: dict[str, Form] = {
    "YESTERDAY": Form("one", "thumb", (0.26, -0.46), -20, "line", (0.36, -0.06), "recoil"),
    "TODAY": Form("both", "flat", (0.30, 0.30), 180, "shake", (0.0, 0.10), "raised"),
    "TOMORROW": Form("one", "point", (0.26, -0.58), 10, "arc", (0.46, 0.10), "smile"),
    "EVENING": Form("both", "spread", (0.56, -0.52), 40, "line", (-0.42, 0.42), "shut"),
    "SUMMER": Form("one", "flat", (0.20, -0.76), 80, "line", (-0.42, 0.0), "gape"),
    "MARKET": Form("alternate", "flat", (0.58, 0.12), -50, "shake", (0.0, 0.16), "gape"),
    "SCHOOL": Form("both", "flat", (0.20, -0.02), 30, "shake", (0.12, 0.0), "frown"),
    "GARDEN": Form("both", "spread", (0.38, 0.58), 0, "line", (0.04, -0.34), "smile"),
    "STATION": Form("one", "fist", (0.62, -0.68), 0, "line", (0.0, 0.34), "round"),
    "TOWN": Form("both", "flat", (0.10, -0.36), 45, "line", (0.44, 0.40), "calm"),
    "APPLE": Form("one", "ring", (0.24, -0.42), 60, "shake", (0.06, 0.06), "gape"),
    "BOOK": Form("both", "flat", (0.10, 0.16), 0, "line", (0.30, 0.06), "shut"),
    "CAKE": Form("base", "spread", (0.00, 0.30), 170, "line", (0.0, -0.24), "round"),
    "FLOWER": Form("one", "ring", (0.16, -0.36), 10, "arc", (-0.36, 0.0), "shut"),
    "DOG": Form("both", "fist", (0.30, -0.08), 180, "shake", (0.0, 0.10), "gape"),
    "BAG": Form("one", "fist", (0.66, 0.46), 180, "shake", (0.0, 0.12), "lean"),
    "BALL": Form("both", "spread", (0.34, 0.04), 60, "circle", (0.06, 0.12), "round"),
    "PICTURE": Form("both", "ell", (0.44, -0.44), 0, "line", (0.0, 0.56), "raised"),
    "RED": Form("one", "point", (0.02, -0.30), 30, "line", (0.0, 0.22), "round"),
    "BIG": Form("both", "ell", (0.16, 0.10), 0, "line", (0.56, -0.04), "gape"),
    "NEW": Form("one", "ell", (0.40, 0.14), 30, "arc", (-0.56, -0.04), "raised"),
    "OLD": Form("one", "fist", (-0.06, -0.28), 90, "line", (-0.30, 0.44), "frown"),
    "BEAUTIFUL": Form("one", "spread", (0.02, -0.50), 40, "circle", (0.28, 0.26), "smile"),
    "TWO": Form("one", "vee", (0.46, -0.20), 0, "shake", (0.0, 0.06), "calm"),
    "THREE": Form("one", "three", (0.68, 0.02), -35, "shake", (0.0, 0.06), "raised"),
    "FIVE": Form("one", "spread", (0.54, -0.46), -10, "shake", (0.06, 0.0), "frown"),
    "TEACHER": Form("both", "ring", (0.38, -0.52), 30, "shake", (0.0, 0.10), "round"),
    "DOCTOR": Form("both", "three", (0.38, 0.00), 70, "shake", (0.08, 0.0), "frown"),
    "CHILD": Form("one", "flat", (0.64, 0.40), 90, "shake", (0.0, 0.10), "smile"),
    "MOTHER": Form("one", "spread", (0.14, -0.24), 50, "shake", (0.05, 0.03), "lean"),
    "FATHER": Form("one", "spread", (0.18, -0.76), 30, "shake", (0.05, -0.03), "recoil"),
    "FRIEND": Form("both", "point", (0.10, 0.04), 80, "shake", (0.0, 0.10), "smile"),
    "BAKER": Form("alternate", "horns", (0.26, 0.38), 150, "circle", (0.08, 0.14), "round"),
    "NEIGHBOUR": Form("one", "horns", (0.44, -0.10), -20, "shake", (0.14, 0.0), "lean"),
    "BUY": Form("base", "ring", (-0.06, 0.20), 100, "arc", (0.62, -0.04), "calm"),
    "SEEK": Form("both", "vee", (0.16, -0.50), 40, "line", (0.34, 0.10), "frown"),
    "FIND": Form("one", "thumb", (-0.10, 0.44), 0, "line", (0.16, -0.44), "raised"),
    "PAINT": Form("one", "flat", (-0.26, 0.00), 80, "shake", (0.0, 0.22), "recoil"),
    "LOSE": Form("both", "spread", (0.22, 0.06), 180, "line", (0.16, 0.46), "frown"),
    "GIVE": Form("one", "ring", (0.20, 0.20), 60, "arc", (-0.58, 0.10), "lean"),
    "SHOW": Form("both", "point", (0.22, 0.20), -40, "line", (0.44, -0.34), "raised"),
    "WORK": Form("alternate", "fist", (0.28, 0.24), 90, "shake", (0.0, 0.14), "shut"),
    "WAIT": Form("both", "spread", (0.60, 0.32), -70, "shake", (0.05, 0.05), "recoil"),
    "DANCE": Form("base", "vee", (0.02, 0.10), 180, "shake", (0.20, 0.0), "smile"),
    "WANT": Form("both", "ring", (0.56, 0.10), 40, "line", (-0.34, 0.16), "frown"),
    "CAN": Form("both", "thumb", (0.42, -0.26), 0, "line", (0.0, 0.42), "shut"),
    "NOT": Form("one", "point", (0.42, -0.12), 0, "shake", (0.18, 0.0), "frown", shake_head=True),
    "QUESTION": Form("both", "horns", (0.54, -0.24), -20, "circle", (0.08, 0.08), "raised"),
}


def _mirrored(hand: np.ndarray) -> np.ndarray:
    weak = hand.copy()
    weak[..., 0] *= -1
    return weak


def _hand(form: Form, phase: np.ndarray, size: float) -> np.ndarray:
    """phase [T] -> [T, HAND] of the dominant hand; oscillations may run past phase 1."""
    dx, dy = size * form.by[0], size * form.by[1]
    hand = np.empty((len(phase), HAND))
    hand[:, 2] = form.angle
    hand[:, 3:] = _HANDSHAPES[form.handshape]
    cycle = 2 * np.pi * phase
    if form.move == "shake":
        along = np.sin(2 * cycle)
        offset_x, offset_y = dx * along, dy * along
    elif form.move == "circle":
        offset_x, offset_y = dx * np.cos(cycle), dy * np.sin(cycle)
    else:
        along = phase * phase * (3 - 2 * phase)
        across = (0.35 if form.move == "arc" else 0.0) * np.sin(np.pi * phase)
        offset_x, offset_y = dx * along + dy * across, dy * along - abs(dx) * across
    hand[:, 0] = form.place[0] + offset_x
    hand[:, 1] = form.place[1] + offset_y
    return hand


def perform(form: Form, phase: np.ndarray, *, size: float = 1.0) -> np.ndarray:
    """The poses [T, POSE] of a sign at phases 0..1 [T]; size scales the movement."""
    poses = np.empty((len(phase), POSE))
    dominant = _hand(form, phase, size)
    poses[:, :HAND] = dominant
    if form.hands == "one":
        poses[:, HAND : 2 * HAND] = _mirrored(np.array(_REST_HAND))
    elif form.hands == "both":
        poses[:, HAND : 2 * HAND] = _mirrored(dominant)
    elif form.hands == "alternate":
        shift = 0.25 if form.move == "shake" else 0.5  # half a cycle: a shake swings twice
        poses[:, HAND : 2 * HAND] = _mirrored(_hand(form, phase + shift, size))
    else:
        poses[:, HAND : 2 * HAND] = (-0.10, 0.42, 80.0, *_HANDSHAPES["flat"])
    poses[:, 2 * HAND :] = _FACES[form.face]
    if form.shake_head:
        poses[:, -1] = np.sin(4 * np.pi * phase)
    return poses


def rest(phase: np.ndarray) -> np.ndarray:
    """Hands in the lap, face calm: [T, POSE]."""
    hand = np.array(_REST_HAND)
    return np.tile(np.concatenate([hand, _mirrored(hand), _FACES["calm"]]), (len(phase), 1))


@dataclass(frozen=True)
class _Segment:
    form: Form | None  # None = rest
    start: float  # seconds
    end: float
    size: float
    shift: tuple[float, float]

    def poses(self, times: np.ndarray) -> np.ndarray:
        phase = np.clip((times - self.start) / (self.end - self.start), 0, 1)
        if self.form is None:
            return rest(phase)
        poses = perform(self.form, phase, size=self.size)
        poses[:, :2] += self.shift
        if self.form.hands != "one":
            poses[:, HAND : HAND + 2] += (-self.shift[0], self.shift[1])
        return poses


def perform_sentences(
    sentences: Sequence[Sequence[str]], *, fps: float, speed: float, rng: random.Random
) -> tuple[np.ndarray, list[tuple[int, int]]]:
    """Several sentences in a row, hands in the lap between them.

    sentences: glosses; speed 1 = about half a second a sign. Within a sentence the hands glide from one sign into the
    next without a pause, over a time that grows with the way. Returns poses [T, POSE] and, per sentence, the frames
    (first, one past the last) from the hands leaving the lap to their being half-way back.
    """
    segments = [_Segment(None, 0.0, rng.uniform(0.15, 0.4), 1.0, (0.0, 0.0))]
    bounds: list[tuple[float, float]] = []
    for glosses in sentences:
        begin = segments[-1].end
        for gloss in glosses:
            segments.append(_following(segments[-1], FORMS[gloss], 0.36 * rng.uniform(0.88, 1.14) / speed, speed, rng))
        segments.append(_following(segments[-1], None, rng.uniform(0.2, 0.5), speed, rng))
        bounds.append((begin, (segments[-2].end + segments[-1].start) / 2))
    times = np.arange(int(np.ceil(segments[-1].end * fps))) / fps
    poses = np.zeros((len(times), POSE))
    arrived = [_arrival(before, after, times) for before, after in itertools.pairwise(segments)]
    for segment, enter, leave in zip(
        segments, [np.ones_like(times), *arrived], [*arrived, np.zeros_like(times)], strict=True
    ):
        weight = enter - leave
        at = np.flatnonzero(weight)
        poses[at] += weight[at, None] * segment.poses(times[at])
    return poses, [(int(np.ceil(a * fps)), int(np.ceil(b * fps))) for a, b in bounds]


def _following(previous: _Segment, form: Form | None, duration: float, speed: float, rng: random.Random) -> _Segment:
    shift = (0.0, 0.0) if form is None else (rng.gauss(0, 0.015), rng.gauss(0, 0.015))
    segment = _Segment(form, 0.0, duration, rng.uniform(0.9, 1.1), shift)
    here = previous.poses(np.array([previous.end]))[0]
    there = segment.poses(np.zeros(1))[0]
    way = max(np.hypot(*(here[hand : hand + 2] - there[hand : hand + 2])) for hand in (0, HAND))
    start = previous.end + (0.08 + 0.08 * float(way)) / speed
    return _Segment(form, start, start + duration, segment.size, shift)


def _arrival(before: _Segment, after: _Segment, times: np.ndarray) -> np.ndarray:
    """0 while ``before`` is performed, 1 while ``after`` is, smooth between; the glide bites a little into both."""
    begin = before.end - 0.1 * (before.end - before.start)
    end = after.start + 0.1 * (after.end - after.start)
    share = np.clip((times - begin) / (end - begin), 0, 1)
    return share * share * (3 - 2 * share)
