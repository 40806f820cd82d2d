import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sltscale.config import DataSettings
from sltscale.data.batches.augment import (
    choose_frames,
    clip_generator,
    crop_corner,
    frames_after_sampling,
    limit_frames,
    rescale_frames,
    sample_frames,
)

rates = st.floats(0.01, 1.0)


def pieces(num_frames: int, n: int) -> list[range]:
    """The pieces as the authors' code cuts them."""
    starts = [num_frames * i // n for i in range(n)]
    return [range(s, max(s + 1, num_frames * (i + 1) // n)) for i, s in enumerate(starts)]


@given(st.integers(1, 500), rates, st.integers(0, 1000))
def test_one_frame_of_each_piece_and_the_pieces_cover_the_clip(num_frames: int, rate: float, seed: int) -> None:
    first = sample_frames(num_frames, rate)
    random = sample_frames(num_frames, rate, clip_generator(seed, 0, 0))
    cut = pieces(num_frames, len(first))
    assert [frame for piece in cut for frame in piece] == list(range(num_frames))
    assert first == [piece[0] for piece in cut] == sample_frames(num_frames, rate)
    assert len(random) == len(cut)
    assert all(frame in piece for frame, piece in zip(random, cut, strict=True))


def test_every_frame_of_a_piece_is_drawn_in_training() -> None:
    rng = clip_generator(0, 0, 0)
    drawn = {tuple(sample_frames(8, 0.25, rng)) for _ in range(500)}
    assert drawn == {(a, b) for a in range(4) for b in range(4, 8)}


@pytest.mark.parametrize(
    ("num_frames", "rate", "n"),
    [
        (112, 0.25, 28),
        (113, 0.25, 28),
        (3, 0.25, 1),
        (1, 0.5, 1),
        (7, 1.0, 7),
        (100, 0.29, 29),
        (3, 1 / 3, 1),
        (50, 0.7, 35),
    ],
)
def test_how_many_frames_are_kept(num_frames: int, rate: float, n: int) -> None:
    assert len(sample_frames(num_frames, rate)) == n


def test_a_clip_without_frames_is_refused() -> None:
    with pytest.raises(ValueError, match="0 frames"):
        sample_frames(0, 0.5)


@given(st.integers(1, 500), st.integers(0, 1000))
def test_rescaled_clips_keep_their_order(num_frames: int, seed: int) -> None:
    frames = rescale_frames(num_frames, 0.2, clip_generator(seed, 0, 0))
    shortest, longest = (min(max(int(num_frames * u), 32), 300) for u in (0.8, 1.2))
    assert shortest <= len(frames) <= longest
    assert frames == sorted(frames) and frames[0] >= 0 and frames[-1] < num_frames
    assert len(set(frames)) == len(frames) or len(frames) > num_frames


def test_every_speed_is_drawn() -> None:
    lengths = [len(rescale_frames(100, 0.2, clip_generator(0, 0, clip))) for clip in range(2000)]
    assert (min(lengths), max(lengths)) == (80, 119)
    assert abs(np.mean(lengths) - 99.5) < 1


@given(st.integers(1, 400), st.integers(1, 100))
def test_limit_thins_evenly(n: int, max_frames: int) -> None:
    kept = limit_frames(range(n), max_frames)
    assert len(kept) == min(n, max_frames)
    assert kept[0] == 0
    gaps = np.diff([*kept, n])
    assert gaps.min() >= 1
    assert gaps.max() - gaps.min() <= 1


def settings(**changes: object) -> DataSettings:
    return DataSettings.model_validate({"shards": "x", "frame_size": 32, "crop_size": 28, "global_batch": 4, **changes})


@given(st.lists(st.integers(1, 2000), min_size=1, max_size=30), rates, st.integers(1, 300))
def test_predicted_lengths_are_the_real_ones(frames: list[int], rate: float, max_frames: int) -> None:
    chosen = settings(sampling_rate=rate, max_frames=max_frames)
    predicted = frames_after_sampling(np.array(frames, dtype=np.int32), chosen)
    assert predicted.tolist() == [len(choose_frames(n, chosen, None)) for n in frames]


def test_random_windows_reach_every_valid_place_and_centre_windows_the_middle() -> None:
    rng = clip_generator(0, 0, 0)
    corners = {crop_corner(12, 11, 8, rng) for _ in range(300)}
    assert corners == {(top, left) for top in (0, 2, 4) for left in (0, 2)}
    assert crop_corner(256, 256, 224) == (16, 16)
    assert crop_corner(72, 74, 66) == (2, 4)
    assert crop_corner(8, 8, 8, rng) == (0, 0)
    with pytest.raises(ValueError, match="8x7"):
        crop_corner(8, 7, 8)


def test_draws_depend_on_seed_epoch_and_clip_alone() -> None:
    def draw(seed: int, epoch: int, clip: int) -> int:
        return int(clip_generator(seed, epoch, clip).integers(1 << 62))

    assert draw(1, 2, 3) == draw(1, 2, 3)
    keys = [(seed, epoch, clip) for seed in range(4) for epoch in range(4) for clip in range(4)]
    assert len({draw(*key) for key in keys}) == len(keys)
