"""Which frames and which window of a clip are used: one draw per clip. What is done to the pictures is in vidaug.py.

Letters: T frames of the clip, n frames kept. In training a draw comes from the clip's own generator, a function of
(seed, epoch, clip number) alone, so it does not depend on ranks, workers or interruptions. Without a generator every
function here is the deterministic transform of evaluation.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from functools import cache

import numpy as np
import numpy.typing as npt

from sltscale.config import DataSettings

SHORTEST_RESCALED, LONGEST_RESCALED = 32, 300


def clip_generator(seed: int, epoch: int, clip: int) -> np.random.Generator:
    """The source of all random choices for one clip in one epoch."""
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(seed, spawn_key=(epoch, clip))))


def sample_frames(num_frames: int, rate: float, rng: np.random.Generator | None = None) -> list[int]:
    """Temporal sampling at rate k (C2RL, arXiv 2408.09949, IV-B): n = max(1, int(k T)) frame numbers, ascending.

    The clip is cut into n consecutive pieces, piece i being the frames floor(T i / n) ... floor(T (i + 1) / n) - 1,
    none empty as n <= T. Of each piece: one uniformly random frame with ``rng``, the first one without.
    """
    if num_frames < 1:
        raise ValueError(f"a clip of {num_frames} frames cannot be sampled")
    n = int(_kept(np.array([num_frames]), rate)[0])
    if n == num_frames:
        return list(range(n))
    bounds = np.arange(n + 1, dtype=np.int64) * num_frames // n
    chosen = bounds[:-1] if rng is None else rng.integers(bounds[:-1], bounds[1:])
    return [int(frame) for frame in chosen]


def rescale_frames(num_frames: int, share: float, rng: np.random.Generator) -> list[int]:
    """Frame numbers of a clip played at another speed, ascending: int(u T) of the T, u uniform in 1 +- ``share``.

    GFSLT-VLP's TemporalRescale: at least 32 (some twice, then) and at most 300, chosen at random, without repetition
    where there are enough.
    """
    count = min(max(int(num_frames * rng.uniform(1 - share, 1 + share)), SHORTEST_RESCALED), LONGEST_RESCALED)
    return sorted(rng.choice(num_frames, count, replace=count > num_frames).tolist())


def limit_frames(indices: Sequence[int], max_frames: int) -> list[int]:
    """At most ``max_frames`` of ``indices``, evenly spread from the first on; shorter lists stay as they are."""
    if len(indices) <= max_frames:
        return list(indices)
    return [indices[i * len(indices) // max_frames] for i in range(max_frames)]


def frames_after_sampling(frames: npt.NDArray[np.integer], settings: DataSettings) -> npt.NDArray[np.int64]:
    """Frames of each clip that evaluation uses, and training but for rescaling, from the stored numbers [n]; all tokens
    of features."""
    if settings.features is not None:
        return np.asarray(frames, dtype=np.int64)
    return np.minimum(_kept(frames, settings.sampling_rate), settings.max_frames)


def choose_frames(num_frames: int, settings: DataSettings, rng: np.random.Generator | None = None) -> list[int]:
    """The frame numbers of a clip of ``num_frames`` that the settings ask for: rescaled in training, if at all, then
    sampled, then limited."""
    if rng is None or not settings.temporal_rescale:
        return limit_frames(sample_frames(num_frames, settings.sampling_rate, rng), settings.max_frames)
    played = rescale_frames(num_frames, settings.temporal_rescale, rng)
    sampled = sample_frames(len(played), settings.sampling_rate, rng)
    return limit_frames([played[frame] for frame in sampled], settings.max_frames)


def crop_corner(height: int, width: int, size: int, rng: np.random.Generator | None = None) -> tuple[int, int]:
    """(top, left) of a size x size window: uniform over all even places with ``rng``, else in the centre.

    Even, because stored clips hold one colour for four pixels.
    """
    if size > min(height, width):
        raise ValueError(f"a window of {size} does not fit in {height}x{width} frames")
    if rng is None:
        return (height - size) // 4 * 2, (width - size) // 4 * 2
    return 2 * int(rng.integers((height - size) // 2 + 1)), 2 * int(rng.integers((width - size) // 2 + 1))


def _kept(frames: npt.NDArray[np.integer], rate: float) -> npt.NDArray[np.int64]:
    """max(1, int(k T)) for k as it is written: as floats 0.29 * 100 is 28.999..., and 1/3 of 3 frames must be one."""
    exact = _exact(rate)
    return np.maximum(1, np.asarray(frames, dtype=np.int64) * exact.numerator // exact.denominator)


@cache
def _exact(rate: float) -> Fraction:
    return Fraction(rate).limit_denominator(10**6)
