"""Choosing frames by their times; the exactness of cutting itself is in test_cutting."""

from __future__ import annotations

from fractions import Fraction
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sltscale.data.video.limits import VideoError
from sltscale.data.video.spans import Shown, at_rate, span


def shown(times: list[int], duration: int = 0) -> list[Shown[int]]:
    return [Shown(number, time, duration) for number, time in enumerate(times)]


def kept(times: list[int], time_base: Fraction, fps: Fraction) -> list[int]:
    """Times of the frames kept; the last frame lasts as long as the one before."""
    last = times[-1] - times[-2] if len(times) > 1 else 40
    frames = [Shown(number, time, last) for number, time in enumerate(times)]
    return [frame.pts for frame in at_rate(frames, time_base, fps)]


def rounded(rate: Fraction, count: int, per_second: int, begin: float = 0) -> list[int]:
    """Times of a constant rate as a container rounds them."""
    return [round((number / rate + Fraction(begin)) * per_second) for number in range(count)]


MS, AVI = Fraction(1, 1000), Fraction(1, 25)
NTSC = Fraction(30000, 1001)


def test_known_choices() -> None:
    assert kept(list(range(10)), AVI, Fraction(25, 2)) == [0, 2, 4, 6, 8]
    # shown at 0, 33.3, 66.7, 100 ms ...
    assert kept(list(range(7, 207, 20)), MS, Fraction(30)) == [7, 27, 67, 107, 127, 167]
    # one frame that stands for long is taken once
    assert kept([0, 10, 20, 500, 510, 520], MS, Fraction(10)) == [0, 20, 500]
    assert kept(list(range(25)), AVI, Fraction(24)) == [n for n in range(25) if n != 24]
    assert kept([5], MS, Fraction(25)) == [5]


@pytest.mark.parametrize("begin", [0, 0.0004, 0.0137])
def test_rounded_times_lose_no_frame(begin: float) -> None:
    for rate in (Fraction(25), NTSC, Fraction(24000, 1001)):
        times = rounded(rate, 2000, 1000, begin)
        assert kept(times, MS, rate) == times
    assert kept(times, MS, Fraction(25)) == times
    times = rounded(NTSC, 2000, 1000, begin)
    assert kept(times, MS, Fraction(30)) == times
    halved = kept(rounded(2 * NTSC, 2000, 1000, begin), MS, NTSC)
    assert len(halved) == 1000 and {b - a for a, b in pairwise(halved)} == {33, 34}


@given(
    gaps=st.lists(st.integers(1, 200), min_size=1, max_size=60),
    begin=st.integers(-500, 500),
    fps=st.fractions(1, 60, max_denominator=7),
    ticks=st.sampled_from([1000, 12800, 90000]),
)
def test_laws_of_thinning(gaps: list[int], begin: int, fps: Fraction, ticks: int) -> None:
    scale = ticks // 1000 or 1
    times = [begin]
    for gap in gaps:
        times.append(times[-1] + gap * scale)
    time_base = Fraction(1, ticks)
    found = kept(times, time_base, fps)
    assert found == sorted(set(found)) and set(found) <= set(times)
    lengths = dict(zip(times, [b - a for a, b in pairwise(times)] + [times[-1] - times[-2]], strict=True))
    assert all(time in found for time, length in lengths.items() if length * time_base >= 1 / fps)
    seconds = (times[-1] + lengths[times[-1]] - begin) * time_base
    assert len(found) <= seconds * fps * Fraction(33, 32) + 2
    # at every time k / fps the frame shown is kept, or (to a tick) the one after it
    slack = min(Fraction(1), 1 / (32 * fps * time_base))
    for k in range(int(seconds * fps)):
        due = begin + k / fps / time_base
        before = max(time for time in times if time <= due)
        after = [time for time in times if due < time <= due + slack]
        assert before in found or any(time in found for time in after)


def test_span_is_half_open_and_exact() -> None:
    times = [0, 1001, 2002, 3003, 4004]
    base = Fraction(1, 30000)
    for start, end, expected in [
        (None, None, times),
        (Fraction(1001, 30000), Fraction(3003, 30000), [1001, 2002]),
        (Fraction(1002, 30000), Fraction(3004, 30000), [2002, 3003]),
        (Fraction(4004, 30000), None, [4004]),
    ]:
        assert [frame.pts for frame in span(shown(times, 1001), base, start, end)] == expected
    # without durations the gap before counts
    assert [frame.duration for frame in span(shown(times), base, None, None)][1:] == [1001] * 4


def test_span_stops_reading_at_its_end() -> None:
    source = iter(shown(list(range(100)), 1))
    assert len(list(span(source, AVI, None, Fraction(1)))) == 25
    assert next(source).pts == 26


def test_span_refuses() -> None:
    for times, start, end, promised, reason in [
        ([0, 2, 1], None, None, None, "run backwards"),
        ([0, 1, 2], None, Fraction(1), None, r"past the video's end at 0\.120 s"),
        ([0, 1, 2], None, None, Fraction(1), r"breaks off at 0\.120 s of 1\.000 s"),
        ([0, 1, 2], Fraction(3), None, None, r"no frames from 3\.000 s on"),
        ([], None, None, None, "no frames"),
        (list(range(0, 4000, 25)), None, None, None, "longer than 120 s"),
        (list(range(8000)), None, None, None, "7200 frames"),
    ]:
        with pytest.raises(VideoError, match=reason):
            list(span(shown(times, 1), AVI if len(times) < 8000 else MS, start, end, promised))
