"""A clip's change against Pillow, which vidaug uses, and against the formula; draws; the stream that applies them."""

import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from fractions import Fraction
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageEnhance

from sltscale.config import DataSettings
from sltscale.data.batches.augment import clip_generator, frames_after_sampling
from sltscale.data.batches.batching import BatchRule
from sltscale.data.batches.plan import Plan
from sltscale.data.batches.selection import Selection
from sltscale.data.batches.stream import evaluation_batches, stream
from sltscale.data.batches.vidaug import Change, change_colours, draw_change, pixel_map
from sltscale.data.shards.index import Index, Row, Shard, open_index, write_index
from sltscale.data.video.encoding import SourceFrame, encode
from sltscale.data.video.stored import decode_pixels, decode_yuv
from sltscale.models.frames import yuv_to_rgb
from sltscale.recipe_files import load_recipe, recipe_names

WIDTH, HEIGHT = 210, 260  # of PHOENIX-2014T's pictures
SIZE, CROP, CORNER = 256, 224, (10, 22)

changes = st.builds(
    Change, angle=st.floats(-30, 30), scale=st.floats(0.8, 1.2), shift=st.tuples(*[st.integers(-10, 10)] * 2)
)


def lands(change: Change, x: float, y: float) -> tuple[float, float] | None:
    """Where vidaug takes a point of the original picture, in the window's pixels; None if it is lost on the way."""
    angle = math.radians(change.angle)
    across, down = x - WIDTH / 2, y - HEIGHT / 2  # counter-clockwise where y counts downwards
    x = WIDTH / 2 + across * math.cos(angle) + down * math.sin(angle)
    y = HEIGHT / 2 - across * math.sin(angle) + down * math.cos(angle)
    if not (0 <= x < WIDTH and 0 <= y < HEIGHT):
        return None
    width, height = int(WIDTH * change.scale), int(HEIGHT * change.scale)
    x = x * width / WIDTH - change.shift[0]
    y = y * height / HEIGHT - change.shift[1]
    if not (0 <= x < width and 0 <= y < height):
        return None
    return x * SIZE / width - CORNER[1], y * SIZE / height - CORNER[0]


@given(changes, st.floats(0, WIDTH - 1), st.floats(0, HEIGHT - 1))
def test_a_point_lands_where_the_formula_says(change: Change, x: float, y: float) -> None:
    place = lands(change, x, y)
    if place is None or not all(0 <= value < CROP for value in place):
        return
    pixels = pixel_map(change, SIZE, CROP, CORNER, (WIDTH, HEIGHT))
    column, row = (int(value) for value in place)
    source = pixels[: CROP * CROP].reshape(CROP, CROP)[row, column]
    if source == SIZE * SIZE * 3 // 2:  # black: the point is at an edge, its pixel's centre beyond it
        assert min(x, y, WIDTH - x, HEIGHT - y, *place) < 2 or outside_nearby(change, x, y)
        return
    assert abs(source % SIZE + 0.5 - x * SIZE / WIDTH) <= 1.5
    assert abs(source // SIZE + 0.5 - y * SIZE / HEIGHT) <= 1.5
    u = pixels[CROP * CROP : CROP * CROP * 5 // 4].reshape(CROP // 2, CROP // 2)[row // 2, column // 2]
    if u < SIZE * SIZE * 3 // 2:
        half = SIZE // 2
        assert abs((u - SIZE * SIZE) % half + 0.5 - x * half / WIDTH) <= 1.5
        assert abs((u - SIZE * SIZE) // half + 0.5 - y * half / HEIGHT) <= 1.5


def outside_nearby(change: Change, x: float, y: float) -> bool:
    return any(lands(change, x + dx, y + dy) is None for dx in (-2, 0, 2) for dy in (-2, 0, 2))


def test_what_a_turn_has_lost_does_not_come_back() -> None:
    """A turned picture is cut at its frame before it is moved: behind the edge that comes into view nothing is left."""
    edge = 10 * SIZE // WIDTH
    for shift in ((10, 0), (-10, 0)):
        maps = [
            pixel_map(change, SIZE, SIZE, (0, 0), (WIDTH, HEIGHT))[: SIZE * SIZE].reshape(SIZE, SIZE)
            for change in (Change(angle=20), Change(angle=20, shift=shift))
        ]
        strips = [luma[:, -edge:] if shift[0] > 0 else luma[:, :edge] for luma in maps]
        black = SIZE * SIZE * 3 // 2
        assert (strips[0] != black).any() and (strips[1] == black).all()
        assert (maps[1][:, edge:-edge] != black).mean() > 0.7


def picture() -> Image.Image:
    """Smooth, asymmetric and coloured, with a bright spot."""
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    rgb = np.stack(
        [110 + 90 * np.sin(x / 17 + y / 40), 120 + 80 * np.cos(y / 23), 90 + 60 * np.sin((x + 2 * y) / 35)], -1
    )
    rgb[40:60, 120:150] = 250
    return Image.fromarray(rgb.clip(0, 255).astype(np.uint8))


def with_pillow(original: Image.Image, change: Change) -> np.ndarray:
    """RGB [C, C, 3], step by step as vidaug and GFSLT-VLP's loader do it."""
    image = original.rotate(change.angle)
    if change.scale != 1:
        size = (int(WIDTH * change.scale), int(HEIGHT * change.scale))
        image = image.resize(size, Image.Resampling.BILINEAR)
    x, y = change.shift
    image = image.transform(image.size, Image.Transform.AFFINE, (1, 0, x, 0, 1, y))
    top, left = CORNER
    return np.asarray(image.resize((SIZE, SIZE)).crop((left, top, left + CROP, top + CROP)), np.float32)


def stored(original: Image.Image) -> bytes:
    squashed = np.asarray(original.resize((SIZE, SIZE), Image.Resampling.BICUBIC))
    return encode([SourceFrame(squashed, pts, 1, Fraction(1, 25), original.size) for pts in range(2)]).data


def rgb(frames: np.ndarray) -> np.ndarray:
    """float32 [C, C, 3] of the first of frames [T, 3 C / 2, C]."""
    return yuv_to_rgb(torch.from_numpy(frames))[0].permute(1, 2, 0).numpy()


def warped(data: bytes, change: Change) -> np.ndarray:
    out = np.empty((1, CROP * 3 // 2, CROP), np.uint8)
    pixels = pixel_map(change, SIZE, CROP, CORNER, (WIDTH, HEIGHT))
    decode_pixels(data, [1], out.reshape(1, -1), SIZE, pixels)
    return rgb(out)


@pytest.mark.parametrize(
    "change",
    [
        Change(angle=30),
        Change(angle=-17.3),
        Change(shift=(10, -7)),
        Change(angle=21, scale=0.8),
        Change(scale=1.2, shift=(-10, 10)),
        Change(angle=-28, scale=0.83, shift=(-9, 6)),
    ],
    ids=str,
)
def test_pictures_are_those_of_pillow(change: Change) -> None:
    """But for the codec, halved colours, and the nearest pixel in place of interpolated ones."""
    original = picture()
    data, expected = stored(original), with_pillow(original, change)
    difference = np.abs(warped(data, change) - expected)
    assert difference.mean() < 2.6
    assert np.quantile(difference, 0.95) < 7
    for wrong in (
        Change(),
        replace(change, angle=-change.angle, shift=(-change.shift[0], -change.shift[1])),
        replace(change, angle=change.angle * 0.9 + 1, shift=(change.shift[0] * 2, change.shift[1])),
    ):
        assert np.abs(warped(data, wrong) - expected).mean() > 1.5 * difference.mean()
    black = expected.sum(-1) == 0
    if change.angle:
        assert (warped(data, change).sum(-1) == 0)[black].mean() >= 0.97


def test_nothing_changed_is_the_window_itself() -> None:
    data = stored(picture())
    window = np.empty((1, CROP * 3 // 2, CROP), np.uint8)
    decode_yuv(data, [1], window, *CORNER)
    for resolution in ((WIDTH, HEIGHT), (0, 0)):
        out = np.empty((1, CROP * CROP * 3 // 2), np.uint8)
        decode_pixels(data, [1], out, SIZE, pixel_map(Change(scale=0.9), SIZE, CROP, CORNER, resolution))
        assert np.array_equal(out, window.reshape(1, -1))


def test_an_unknown_resolution_is_a_square() -> None:
    change = Change(angle=20, shift=(3, 4))
    square = pixel_map(change, SIZE, CROP, CORNER, (SIZE, SIZE))
    assert np.array_equal(pixel_map(change, SIZE, CROP, CORNER, (0, 0)), square)
    assert not np.array_equal(pixel_map(change, SIZE, CROP, CORNER, (WIDTH, HEIGHT)), square)


@pytest.mark.parametrize(("brightness", "saturation"), [(0.3, 1.0), (1.2, 1.0), (1.0, 0.2), (1.0, 1.4), (0.6, 1.5)])
def test_colours_are_those_of_pillow(brightness: float, saturation: float) -> None:
    data = stored(picture())
    window = np.empty((2, CROP * 3 // 2, CROP), np.uint8)
    decode_yuv(data, [0, 1], window, *CORNER)
    image = Image.fromarray(rgb(window).round().clip(0, 255).astype(np.uint8))
    image = ImageEnhance.Brightness(image).enhance(brightness)
    expected = np.asarray(ImageEnhance.Color(image).enhance(saturation), np.float32)
    change_colours(window, Change(brightness=brightness, saturation=saturation))
    difference = np.abs(rgb(window) - expected)
    assert difference.mean() < 1.5
    assert np.quantile(difference, 0.99) < 8
    assert np.abs(window[0].astype(int) - window[1]).mean() < 3  # the second frame as well


def drawn(augment: str, count: int = 4000) -> list[Change]:
    chosen = settings(augment=augment).augment
    return [draw_change(chosen, clip_generator(3, 0, clip)) for clip in range(count)]


def test_draws_of_the_geometry() -> None:
    found = drawn("strong")
    for values, low, high in (
        ([change.angle for change in found], -30, 30),
        ([change.scale - 1 for change in found], -0.2, 0.2),
    ):
        moved = np.array([value for value in values if value])
        assert abs(len(moved) / len(found) - 0.5) < 0.04
        assert low <= moved.min() < 0.95 * low and 0.95 * high < moved.max() <= high
        assert abs(moved.mean()) < 0.05 * high
    shifts = [change.shift for change in found]
    assert abs(shifts.count((0, 0)) / len(found) - (0.5 + 0.5 / 441)) < 0.04
    assert {x for x, _ in shifts} == {y for _, y in shifts} == set(range(-10, 11))
    assert {(change.brightness, change.saturation) for change in found} == {(1.0, 1.0)}
    independent = sum(bool(change.angle) and change.scale != 1 for change in found) / len(found)
    assert abs(independent - 0.25) < 0.04


def test_draws_with_colours() -> None:
    """A clip keeps its geometry in 1/3 + 1/6 + 1/2 / 8 of the draws, likewise its colours, with their two switches."""
    found = drawn("strong_color", 6000)
    factors = np.array([[change.brightness, change.saturation] for change in found])
    touched = factors[factors != 1]
    assert 0.1 <= touched.min() < 0.15 and 1.45 < touched.max() <= 1.5
    for still, each in (
        ([not (c.moves or c.scale != 1) for c in found], 1 / 8),
        ([not c.recolours for c in found], 1 / 4),
    ):
        assert abs(np.mean(still) - (0.5 + 0.5 * each)) < 0.03
    kinds = Counter((change.moves, change.recolours) for change in found)
    assert abs(kinds[True, True] / 6000 - (1 / 3) * (3 / 4) ** 2) < 0.03


@pytest.mark.parametrize("augment", ["off", "light"])
def test_less_augmentation_leaves_pictures_alone(augment: str) -> None:
    assert set(drawn(augment, 100)) == {Change()}


FRAMES = [9, 40, 17, 2, 60, 5]
SMALL = 32


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Index:
    folder: Path = tmp_path_factory.mktemp("shards")
    content, rows = b"", []
    for number, frames in enumerate(FRAMES):
        coarse = np.random.default_rng(number).integers(0, 256, (frames, 8, 8, 3), dtype=np.uint8)
        pictures = coarse.repeat(SMALL // 8, 1).repeat(SMALL // 8, 2)
        data = encode(SourceFrame(p, pts, 1, Fraction(1, 25)) for pts, p in enumerate(pictures)).data
        place = (len(content), len(content) + len(data))
        rows.append(
            Row(
                id=f"clip-{number}",
                key=str(number),
                text="Text",
                language="de",
                frames=frames,
                fps=(25, 1),
                offset=place[0],
                size=len(data),
                sha256=sha256(data).hexdigest(),
                record=place,
                crc32=(0, 0, 0),
                resolution=(40, 60),
            )
        )
        content += data
    (folder / "train-0.tar").write_bytes(content)
    write_index(folder, "train", [Shard("train-0.tar", len(content), "", rows)], corpus="test", frame_size=SMALL)
    return open_index(folder, "train")


def settings(**changes: object) -> DataSettings:
    values = {"shards": "x", "frame_size": SMALL, "crop_size": 24, "global_batch": 3, "workers": 0}
    return DataSettings.model_validate({**values, "augment": "strong_color", **changes})


def clips(
    index: Index, chosen: DataSettings, ranks: int = 1, first: int = 0, training: bool = True
) -> dict[tuple[int, str], torch.Tensor]:
    """Frames by epoch and clip, of steps ``first`` to 8."""
    plan = Plan(frames_after_sampling(index.frames, chosen), 7, BatchRule.of(chosen))
    found = {}
    for rank in range(ranks):
        share = {"rank": rank, "world_size": ranks, "first_step": first, "last_step": 8}
        for step, batch in stream(Selection([index]), plan, chosen, seed=7, training=training, **share):
            found |= {
                (plan.epoch_of(step), id): frames for id, frames in zip(batch.ids, batch.frames.split(), strict=True)
            }
    return found


def assert_same(ours: dict[tuple[int, str], torch.Tensor], theirs: dict[tuple[int, str], torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.parametrize("temporal_rescale", [0.0, 0.2])
@pytest.mark.parametrize("augment", ["strong", "strong_color"])
def test_the_stream_shows_what_is_drawn_whoever_reads(index: Index, augment: str, temporal_rescale: float) -> None:
    chosen = settings(augment=augment, temporal_rescale=temporal_rescale)
    whole = clips(index, chosen)
    assert len(whole) == 4 * len(FRAMES)
    assert_same(clips(index, chosen, ranks=2), whole)
    resumed = clips(index, chosen.model_copy(update={"workers": 2}), first=5)
    assert_same(resumed, {key: whole[key] for key in resumed})
    plain = clips(index, settings(augment="light"))
    changed = [key for key in whole if not torch.equal(whole[key], plain[key])]
    assert len(whole) / 3 < len(changed)
    if not temporal_rescale:
        assert len(changed) < len(whole)  # the same frames and windows, where nothing was drawn
        for (epoch, id), frames in whole.items():
            assert frames.tolist() == expected(index, chosen, epoch, int(id.removeprefix("clip-"))).tolist()


def expected(index: Index, chosen: DataSettings, epoch: int, clip: int) -> np.ndarray:
    """By the pixel, from the draws in their order: window, then change."""
    rng = clip_generator(7, epoch, clip)
    top, left = (2 * int(rng.integers(5)) for _ in range(2))
    change = draw_change(chosen.augment, rng)
    whole = np.empty((FRAMES[clip], SMALL * 3 // 2, SMALL), np.uint8)
    decode_yuv(index.video_bytes(clip), range(FRAMES[clip]), whole, 0, 0)
    flat = np.pad(whole.reshape(len(whole), -1), ((0, 0), (0, 2)))
    flat[:, -2:] = 16, 128
    frames = flat[:, pixel_map(change, SMALL, 24, (top, left), (40, 60))].reshape(len(whole), 36, 24)
    change_colours(frames, change)
    return frames


def test_evaluation_is_as_ever(index: Index) -> None:
    strong, off = settings(temporal_rescale=0.3), settings(augment="off")
    for chosen in (strong, settings(augment="light")):
        assert_same(clips(index, chosen, training=False), clips(index, off))
    (ours,), (theirs,) = ([*evaluation_batches(Selection([index]), chosen, [[4, 1]])] for chosen in (strong, off))
    assert torch.equal(ours.frames.values, theirs.frames.values)


def test_rescaled_clips_are_of_other_lengths_within_the_limits(index: Index) -> None:
    lengths: dict[str, set[int]] = {}
    for (_, id), frames in clips(index, settings(temporal_rescale=0.2)).items():
        lengths.setdefault(id, set()).add(len(frames))
    assert lengths["clip-3"] == {32}  # two frames, again and again
    assert all(48 <= length <= 72 for length in lengths["clip-4"]) and len(lengths["clip-4"]) > 2
    halved = clips(index, settings(temporal_rescale=0.2, sampling_rate=0.5, max_frames=33))
    assert all(24 <= len(frames) <= 33 for (_, id), frames in halved.items() if id == "clip-4")


@pytest.mark.parametrize(
    ("prefix", "augment"),
    [
        ("gfslt", "strong"),
        ("hfa", "strong"),
        ("c2rl_pretrain", "light"),
        ("c2rl_slt", "off"),
        ("c2rl_retrieval", "off"),
    ],
)
def test_recipes_change_what_their_code_changes(prefix: str, augment: str) -> None:
    chosen = [load_recipe(name).data for name in recipe_names() if name.startswith(prefix) and "tiny" not in name]
    assert chosen
    assert {(data.augment, data.temporal_rescale) for data in chosen} == {(augment, 0.0)}


@pytest.fixture
def refused() -> Iterator[Callable[..., str]]:
    def message(**changes: object) -> str:
        with pytest.raises(ValueError) as caught:
            settings(**changes)
        return str(caught.value)

    yield message


def test_what_does_not_go_together(refused: Callable[..., str]) -> None:
    assert 'temporal_rescale is 0.2, but augment "off"' in refused(temporal_rescale=0.2, augment="off")
    for rule in ({"global_frames": 900, "bucket_window": 8}, {"micro_frames": 900}):
        assert "global_frames and micro_frames count" in refused(temporal_rescale=0.2, **rule)
    assert "'strong_color'" in refused(augment="stronger")
