"""The signers of the synthetic corpus and how a pose becomes a picture.

Signers differ in build, colours, hair, speed, place in the picture, zoom and background; they do not differ in
handedness. Drawn at twice the size and reduced, which smooths the edges.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from PIL import Image, ImageDraw

from sltscale.data.synthetic.signs import HAND

Colour = tuple[int, int, int]
Point = tuple[float, float]

_SKINS: tuple[Colour, ...] = (
    (244, 208, 178), (232, 184, 150), (214, 160, 120), (186, 128, 90), (146, 96, 64), (112, 72, 50),
)  # fmt: skip
_CLOTHES: tuple[Colour, ...] = (
    (34, 44, 84), (30, 70, 62), (92, 28, 48), (44, 44, 48),
    (70, 40, 96), (60, 96, 150), (226, 226, 220), (150, 190, 210),
)  # fmt: skip
_HAIRS: tuple[Colour, ...] = ((30, 24, 22), (74, 48, 30), (124, 82, 40), (196, 160, 92), (140, 140, 144))
_BACKGROUNDS: tuple[Colour, ...] = (
    (186, 204, 214), (176, 200, 178), (120, 146, 168), (206, 204, 220), (150, 168, 150), (130, 128, 152),
)  # fmt: skip
_LIPS: tuple[Colour, Colour] = ((130, 24, 34), (226, 92, 96))  # on light and on dark skin

_SHOULDER_Y, _HEAD_Y, _HEAD_RADIUS, _ARM = -0.20, -0.52, 0.22, 0.46
# Degrees from the hand's direction, towards the thumb's side: without spread, and added by spread 1.
_FINGERS = ((50.0, 25.0), (14.0, 12.0), (4.0, 2.0), (-6.0, -10.0), (-16.0, -24.0))


@dataclass(frozen=True)
class Signer:
    """speed 1 = average. zoom 1 = 2 body units fill the picture. shift: of the picture, in body units.

    furniture: rectangles on the wall, each left, top, width, height as shares of the picture, and shade.
    """

    number: int
    skin: Colour
    clothes: Colour
    hair: Colour
    hair_style: str
    background: Colour
    furniture: tuple[tuple[float, float, float, float, float], ...]
    shoulders: float
    head: float
    hands: float
    thickness: float
    speed: float
    zoom: float
    shift: Point


def draw_signer(seed: int, number: int) -> Signer:
    """The corpus's signer of that number; a pure function of the two."""
    rng = random.Random(f"signer {seed} {number}")  # noqa: S311
    skin = rng.choice(_SKINS)
    # hands are read against the clothes, and head and hands against the wall
    clothes = rng.choice([c for c in _CLOTHES if abs(_luma(c) - _luma(skin)) > 55])
    background = rng.choice([c for c in _BACKGROUNDS if abs(_luma(c) - _luma(skin)) > 18])
    return Signer(
        number=number,
        skin=_jitter(skin, rng),
        clothes=_jitter(clothes, rng),
        hair=_jitter(rng.choice(_HAIRS), rng),
        hair_style=rng.choice(("short", "long", "bun", "bald")),
        background=_jitter(background, rng),
        furniture=tuple(_furniture(rng) for _ in range(rng.randint(0, 2))),
        shoulders=rng.uniform(0.9, 1.12),
        head=rng.uniform(0.93, 1.08),
        hands=rng.uniform(0.94, 1.08),
        thickness=rng.uniform(0.85, 1.15),
        speed=rng.uniform(0.85, 1.2),
        zoom=rng.uniform(0.9, 1.08),
        shift=(rng.uniform(-0.07, 0.07), rng.uniform(-0.05, 0.05)),
    )


def _furniture(rng: random.Random) -> tuple[float, float, float, float, float]:
    left, top, width, height = (
        rng.uniform(*limits) for limits in ((-0.1, 0.85), (-0.1, 0.5), (0.12, 0.3), (0.12, 0.35))
    )
    return left, top, width, height, rng.uniform(0.86, 1.1)


def _luma(colour: Colour) -> float:
    return 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2]


def _jitter(colour: Colour, rng: random.Random) -> Colour:
    r, g, b = (min(255, max(0, channel + rng.randint(-8, 8))) for channel in colour)
    return r, g, b


def _shade(colour: Colour, factor: float) -> Colour:
    r, g, b = (min(255, int(channel * factor)) for channel in colour)
    return r, g, b


@dataclass(frozen=True)
class Painter:
    """Draws one signer in square pictures of ``size`` pixels."""

    signer: Signer
    size: int

    @property
    def _unit(self) -> float:
        """Drawn pixels per body unit, at twice the picture's size."""
        return self.size * self.signer.zoom

    def _at(self, x: float, y: float) -> Point:
        """Body coordinates to drawn pixels. The signer faces us: the dominant (right) side is the picture's left."""
        shift_x, shift_y = self.signer.shift
        return self.size - (x + shift_x) * self._unit, self.size * 1.06 + (y + shift_y) * self._unit

    @cached_property
    def _still(self) -> Image.Image:
        """What does not move: wall, furniture and torso."""
        signer, full = self.signer, 2 * self.size
        light = np.linspace(1.08, 0.92, full)[:, None, None] * np.array(signer.background)
        image = Image.fromarray(np.broadcast_to(light, (full, full, 3)).clip(0, 255).astype(np.uint8))
        draw = ImageDraw.Draw(image)
        for left, top, width, height, shade in signer.furniture:
            box = (left * full, top * full, (left + width) * full, (top + height) * full)
            draw.rectangle(box, fill=_shade(signer.background, shade))
        shoulder, width, thick = 0.36 * signer.shoulders, 0.33 * signer.shoulders, 0.09 * signer.thickness
        outline = [(-0.09, -0.30), (-shoulder, _SHOULDER_Y - 0.02), (-shoulder - thick, _SHOULDER_Y + 0.1)]
        outline += [(-width, 0.3), (-width, 1.4)]
        outline += [(-x, y) for x, y in reversed(outline)]
        draw.polygon([self._at(x, y) for x, y in outline], fill=signer.clothes)
        neck = [(-0.08, -0.40), (0.08, -0.40), (0.09, -0.24), (0.0, -0.14), (-0.09, -0.24)]
        draw.polygon([self._at(x, y) for x, y in neck], fill=_shade(signer.skin, 0.82))
        return image

    def draw(self, pose: np.ndarray) -> Image.Image:
        """pose [POSE] -> RGB picture of size x size."""
        image = self._still.copy()
        draw = ImageDraw.Draw(image)
        values = pose.tolist()
        self._head(draw, values[2 * HAND :])
        for side, hand in ((-1, values[HAND : 2 * HAND]), (1, values[:HAND])):
            self._arm(draw, side, hand)
        for side, hand in ((-1, values[HAND : 2 * HAND]), (1, values[:HAND])):
            self._hand(draw, side, hand)
        return image.reduce(2)

    def _disc(self, draw: ImageDraw.ImageDraw, at: Point, radius: float, fill: Colour, height: float = 0.0) -> None:
        height = height or radius
        draw.ellipse((at[0] - radius, at[1] - height, at[0] + radius, at[1] + height), fill=fill)

    def _head(self, draw: ImageDraw.ImageDraw, face: list[float]) -> None:
        brows, mouth_width, mouth_opening, eyes, tilt = face
        signer, radius = self.signer, _HEAD_RADIUS * self.signer.head
        turn = math.radians(18 * tilt)
        centre = (0.10 * tilt, _HEAD_Y + 0.02 * abs(tilt))
        scale = radius * self._unit

        def on(x: float, y: float) -> Point:
            """A place on the face, in head radii from its centre, turned with the head."""
            cos, sin = math.cos(turn), math.sin(turn)
            return self._at(centre[0] + radius * (x * cos - y * sin), centre[1] + radius * (x * sin + y * cos))

        if signer.hair_style != "bald":
            if signer.hair_style == "long":
                draw.polygon([on(-1.05, -0.3), on(-1.15, 1.1), on(1.15, 1.1), on(1.05, -0.3)], fill=signer.hair)
            elif signer.hair_style == "bun":
                self._disc(draw, on(0.0, -1.2), 0.45 * scale, signer.hair)
            self._disc(draw, on(0.0, -0.22), 1.06 * scale, signer.hair)
        self._disc(draw, on(0.0, 0.06), 0.92 * scale, signer.skin, 1.02 * scale)
        dark, line = _shade(signer.hair, 0.5), max(2, round(0.13 * scale))
        for side in (-1, 1):
            eye = on(0.38 * side, -0.10)
            if eyes > 0.25:
                self._disc(draw, eye, 0.19 * scale, (250, 250, 250), 0.19 * eyes * scale)
                self._disc(draw, eye, 0.11 * scale, (20, 20, 24), min(0.19 * eyes, 0.14) * scale)
            else:
                draw.line([on(0.38 * side - 0.2, -0.10), on(0.38 * side + 0.2, -0.10)], fill=dark, width=line)
            height = -0.42 - 0.16 * brows
            draw.line(
                [on(0.14 * side, height + 0.10 * max(0.0, -brows)), on(0.62 * side, height - 0.10 * min(0.0, brows))],
                fill=dark,
                width=line,
            )
        self._disc(
            draw,
            on(0.0, 0.56),
            (0.14 + 0.34 * mouth_width) * scale,
            _LIPS[_luma(signer.skin) < 120],
            (0.07 + 0.27 * mouth_opening) * scale,
        )

    def _arm(self, draw: ImageDraw.ImageDraw, side: int, hand: list[float]) -> None:
        signer = self.signer
        shoulder = (side * 0.36 * signer.shoulders, _SHOULDER_Y + 0.06)
        middle = ((shoulder[0] + hand[0]) / 2, (shoulder[1] + hand[1]) / 2)
        # the elbow leaves the line from shoulder to hand outwards and down, the more the nearer the hand
        reach = math.hypot(hand[0] - shoulder[0], hand[1] - shoulder[1]) / 2
        bend = math.sqrt(max(_ARM**2 - reach**2, 0.0))
        elbow = (middle[0] + 0.6 * side * bend, middle[1] + 0.8 * bend)
        points = [self._at(*shoulder), self._at(*elbow), self._at(hand[0], hand[1])]
        width = 0.15 * signer.thickness * self._unit
        sleeve = _shade(signer.clothes, 0.78)
        for edge, colour in ((2.0, _shade(signer.clothes, 0.5)), (0.0, sleeve)):
            draw.line(points[:2], fill=colour, width=round(width + 2 * edge))
            draw.line(points[1:], fill=colour, width=round(0.8 * width + 2 * edge))
            self._disc(draw, points[0], width / 2 + edge, colour)
            self._disc(draw, points[1], width / 2 + edge, colour)

    def _hand(self, draw: ImageDraw.ImageDraw, side: int, hand: list[float]) -> None:
        angle, extensions, spread, ring = hand[2], hand[3:8], hand[8], hand[9]
        palm = 0.125 * self.signer.hands * self._unit
        at = self._at(hand[0], hand[1])
        fingers: list[Point] = []
        for extension, (base, wide) in zip(extensions, _FINGERS, strict=True):
            if extension > 0.15:
                # positive angles turn towards the other side of the body: right in the picture for the dominant hand
                direction = math.radians(angle + base + wide * spread)
                length = palm * (0.9 + 1.45 * extension)
                fingers.append((at[0] + side * math.sin(direction) * length, at[1] - math.cos(direction) * length))
        thick = 0.46 * palm
        for edge, colour in ((2.5, _shade(self.signer.skin, 0.42)), (0.0, self.signer.skin)):
            for tip in fingers:
                draw.line([at, tip], fill=colour, width=round(thick + 2 * edge))
                self._disc(draw, tip, thick / 2 + edge, colour)
            self._disc(draw, at, palm + edge, colour)
        if ring > 0.3:
            direction = math.radians(angle + 20)
            hole = (at[0] + side * math.sin(direction) * palm * 0.3, at[1] - math.cos(direction) * palm * 0.3)
            self._disc(draw, hole, 0.62 * palm * ring, _shade(self.signer.skin, 0.25))
