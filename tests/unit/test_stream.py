import hashlib
import io
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import psutil
import pytest
import torch

from sltscale.config import DataSettings
from sltscale.data.batches.augment import choose_frames, clip_generator, crop_corner, frames_after_sampling
from sltscale.data.batches.batching import BatchRule
from sltscale.data.batches.dealing import evaluation_shares
from sltscale.data.batches.plan import Plan
from sltscale.data.batches.selection import Selection
from sltscale.data.batches.stream import evaluation_batches, load_video, stream
from sltscale.data.shards.index import Index, Row, Shard, open_index, write_index
from sltscale.data.video.encoding import SourceFrame, encode
from sltscale.errors import InputError
from sltscale.structures import VideoBatch

FRAMES = [9, 4, 17, 1, 12, 5, 8, 3, 21, 6, 2]
SIZE = 32
SEED = 5


def mp4(frames: int, seed: int) -> bytes:
    coarse = np.random.default_rng(seed).integers(0, 256, (frames, 8, 8, 3), dtype=np.uint8)
    pictures = coarse.repeat(SIZE // 8, 1).repeat(SIZE // 8, 2)
    source = [SourceFrame(picture, pts, 1, Fraction(1, 25)) for pts, picture in enumerate(pictures)]
    return encode(source).data


def write_shards(folder: Path, clips: list[bytes], frames: list[int]) -> None:
    """Two shards of clips with a gap before each; the stream looks only at the places that the index gives."""
    shards = []
    for number, numbers in enumerate((range(6), range(6, len(clips)))):
        content, rows = b"", []
        for i in numbers:
            content += b"gap"
            digest = hashlib.sha256(clips[i]).hexdigest()
            place = (len(content), len(content) + len(clips[i]))
            rows.append(
                Row(
                    id=f"clip.{i}:x",
                    key=f"clip-{i}",
                    text=f"Satz {i} für üben",
                    language="de" if i % 2 else "en",
                    frames=frames[i],
                    fps=(25, 1),
                    offset=place[0],
                    size=len(clips[i]),
                    sha256=digest,
                    record=place,
                    crc32=(0, 0, 0),
                )
            )
            content += clips[i]
        name = f"train-{number}.tar"
        (folder / name).write_bytes(content)
        shards.append(Shard(name, len(content), "", rows))
    write_index(folder, "train", shards, corpus="test", frame_size=SIZE)


@pytest.fixture(scope="module")
def clips() -> list[bytes]:
    return [mp4(frames, seed) for seed, frames in enumerate(FRAMES)]


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory, clips: list[bytes]) -> Index:
    folder = tmp_path_factory.mktemp("shards")
    write_shards(folder, clips, FRAMES)
    return open_index(folder, "train")


def settings(**changes: object) -> DataSettings:
    values = {"shards": "x", "frame_size": SIZE, "crop_size": 24, "sampling_rate": 0.5, "global_batch": 4, "workers": 0}
    return DataSettings.model_validate({**values, **changes})


def run(
    index: Index, chosen: DataSettings, first: int, last: int, rank: int = 0, world_size: int = 1, training: bool = True
) -> Iterator[tuple[int, VideoBatch]]:
    plan = Plan(frames_after_sampling(index.frames, chosen), SEED, BatchRule.of(chosen))
    return stream(
        Selection([index]),
        plan,
        chosen,
        seed=SEED,
        rank=rank,
        world_size=world_size,
        first_step=first,
        last_step=last,
        training=training,
    )


def assert_equal(ours: list[tuple[int, VideoBatch]], theirs: list[tuple[int, VideoBatch]]) -> None:
    assert [step for step, _ in ours] == [step for step, _ in theirs]
    for (_, a), (_, b) in zip(ours, theirs, strict=True):
        assert (a.ids, a.texts, a.languages, a.frames.max_seqlen) == (b.ids, b.texts, b.languages, b.frames.max_seqlen)
        assert torch.equal(a.frames.cu_seqlens, b.frames.cu_seqlens)
        assert torch.equal(a.frames.values, b.frames.values)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_every_clip_once_an_epoch_on_any_number_of_ranks(index: Index, world_size: int) -> None:
    chosen = settings()
    plan = Plan(FRAMES, SEED, BatchRule.of(chosen))
    ranks = [list(run(index, chosen, 0, plan.steps(2), rank, world_size)) for rank in range(world_size)]
    for epoch in range(2):
        steps = range(plan.steps(epoch), plan.steps(epoch + 1))
        seen = [id for batches in ranks for step, batch in batches if step in steps for id in batch.ids]
        assert sorted(seen) == sorted(index.id(clip) for clip in range(len(index)))
    for step, parts in enumerate(zip(*ranks, strict=True)):
        assert {number for number, _ in parts} == {step}
        together = sorted(id for _, batch in parts for id in batch.ids)
        assert together == sorted(index.id(clip) for clip in plan.batch(step))
        # What a clip looks like does not depend on who reads it.
        alone = dict(zip(*clips_of(next(run(index, chosen, step, step + 1))[1]), strict=True))
        assert all(
            torch.equal(alone[id], frames) for _, batch in parts for id, frames in zip(*clips_of(batch), strict=True)
        )


def yuv(data: bytes, top: int, left: int, size: int = 24) -> np.ndarray:
    """uint8 [T, 3 size / 2, size]: whole planes as PyAV gives them, then cut."""
    with av.open(io.BytesIO(data)) as container:
        frames = [frame.to_ndarray(format="yuv420p") for frame in container.decode(video=0)]
    planes = []
    for frame in frames:
        flat = frame.ravel()
        y = flat[: SIZE * SIZE].reshape(SIZE, SIZE)[top : top + size, left : left + size]
        quarter = SIZE * SIZE // 4
        chroma = [
            flat[SIZE * SIZE + k * quarter :][:quarter].reshape(SIZE // 2, SIZE // 2)[
                top // 2 : (top + size) // 2, left // 2 : (left + size) // 2
            ]
            for k in range(2)
        ]
        planes.append(np.concatenate([y.ravel(), *(plane.ravel() for plane in chroma)]).reshape(size * 3 // 2, size))
    return np.stack(planes)


def clips_of(batch: VideoBatch) -> tuple[list[str], list[torch.Tensor]]:
    return batch.ids, batch.frames.split()


@pytest.mark.parametrize(("workers", "world_size"), [(1, 2), (2, 3)])
def test_workers_change_nothing_nor_does_a_new_start(index: Index, workers: int, world_size: int) -> None:
    state = torch.get_rng_state()
    unbroken = list(run(index, settings(), 0, 9, 1, world_size))
    resumed = list(run(index, settings(workers=workers), 2, 9, 1, world_size))
    assert_equal(resumed, unbroken[2:])
    assert torch.equal(torch.get_rng_state(), state), "the stream must not draw from the training's random numbers"


SETUPS = [(ranks, workers) for ranks in (1, 2, 3, 4) for workers in (0, 1, 3)]


@pytest.mark.parametrize(
    ("before", "after"),
    [((1, 0), (4, 1)), ((3, 3), (2, 0))]
    + [pytest.param(a, b, marks=pytest.mark.slow) for a, b in zip(SETUPS, SETUPS[5:] + SETUPS[:5], strict=True)],
)
def test_exactly_once_though_ranks_and_workers_change_in_mid_epoch(
    index: Index, before: tuple[int, int], after: tuple[int, int]
) -> None:
    plan = Plan(FRAMES, SEED, BatchRule.of(settings(global_batch=6)))

    def read(setup: tuple[int, int], first: int, last: int) -> dict[int, list[tuple[str, bytes]]]:
        batches: dict[int, list[tuple[str, bytes]]] = {}
        for rank in range(setup[0]):
            changed = settings(global_batch=6, workers=setup[1])
            for step, batch in run(index, changed, first, last, rank, setup[0]):
                batches.setdefault(step, []).extend(
                    (id, f.numpy().tobytes()) for id, f in zip(*clips_of(batch), strict=True)
                )
        return {step: sorted(clips) for step, clips in batches.items()}

    steps = plan.steps(2)
    unbroken = read((1, 0), 0, steps)
    assert read(before, 0, 1) | read(after, 1, steps) == unbroken
    for epoch in range(2):
        ids = [id for step in range(plan.steps(epoch), plan.steps(epoch + 1)) for id, _ in unbroken[step]]
        assert sorted(ids) == sorted(index.id(clip) for clip in range(len(index)))


@pytest.mark.parametrize("workers", [1, 2])
def test_batches_that_are_let_go_give_their_memory_to_later_ones_unharmed(index: Index, workers: int) -> None:
    expected = [int(batch.frames.values.long().sum()) for _, batch in run(index, settings(), 0, 40)]
    assert [
        int(batch.frames.values.long().sum()) for _, batch in run(index, settings(workers=workers), 0, 40)
    ] == expected


def test_frames_texts_and_layout_are_those_of_the_shards(index: Index, clips: list[bytes]) -> None:
    chosen = settings(max_frames=7)
    for step, batch in run(index, chosen, 0, 6):
        epoch = step // 3
        values = batch.frames.values
        assert values.dtype == torch.uint8
        assert values.is_contiguous()
        assert values.shape[1:] == (36, 24)
        for id, text, language, frames in zip(
            batch.ids, batch.texts, batch.languages, batch.frames.split(), strict=True
        ):
            clip = int(id.removeprefix("clip.").removesuffix(":x"))
            assert (text, language) == (f"Satz {clip} für üben", "de" if clip % 2 else "en")
            rng = clip_generator(SEED, epoch, clip)
            keep = choose_frames(FRAMES[clip], chosen, rng)
            top, left = crop_corner(SIZE, SIZE, 24, rng)
            assert frames.tolist() == yuv(clips[clip], top, left)[keep].tolist()


def test_training_draws_anew_each_epoch_but_not_without_augmentation(index: Index, clips: list[bytes]) -> None:
    def longest(chosen: DataSettings, training: bool) -> list[torch.Tensor]:
        batches = run(index, chosen, 0, 6, training=training)
        return [dict(zip(*clips_of(batch), strict=True))["clip.8:x"] for _, batch in batches if "clip.8:x" in batch.ids]

    first, second = longest(settings(), training=True)
    assert not torch.equal(first, second)
    first, second = longest(settings(), training=False)
    assert torch.equal(first, second)
    assert first.tolist() == yuv(clips[8], 4, 4)[[21 * i // 10 for i in range(10)]].tolist()
    evaluated = first
    first, second = longest(settings(augment="off"), training=True)
    assert torch.equal(first, second) and torch.equal(first, evaluated)


@pytest.mark.parametrize("world_size", [1, 2, 14])
def test_evaluation_sees_every_clip_once_and_the_same(index: Index, world_size: int) -> None:
    chosen = settings()
    ranks = evaluation_shares(frames_after_sampling(index.frames, chosen), world_size, 3)
    seen: dict[str, torch.Tensor] = {}
    for shares in ranks:
        batches = list(evaluation_batches(Selection([index]), chosen, shares))
        assert [batch.ids for batch in batches] == [[index.id(clip) for clip in clips] for clips in shares]
        for batch in batches:
            seen |= dict(zip(*clips_of(batch), strict=True))
    assert len(seen) == len(index)
    expected = {
        id: f for _, batch in run(index, chosen, 0, 3, training=False) for id, f in zip(*clips_of(batch), strict=True)
    }
    assert all(torch.equal(seen[id], expected[id]) for id in expected)


def test_a_video_file_gets_evaluations_transforms(tmp_path: Path) -> None:
    path = tmp_path / "-odd name.mp4"
    path.write_bytes(mp4(9, 0))
    frames = load_video(path, settings(frame_size=48, crop_size=40))
    assert frames.shape == (4, 60, 40)
    assert frames.dtype == torch.uint8
    original = yuv(mp4(9, 0), 4, 4)[[0, 2, 4, 6]]
    assert abs(frames.float().mean() - original.mean()) < 10
    path.write_bytes(b"no video")
    with pytest.raises(InputError, match=r"-odd name\.mp4: "):
        load_video(path, settings())


@pytest.mark.parametrize("workers", [0, 1])
def test_a_bad_clip_is_named_with_its_shard(tmp_path: Path, clips: list[bytes], workers: int) -> None:
    write_shards(tmp_path, [*clips[:8], b"\0" * 2000, *clips[9:]], FRAMES)
    with pytest.raises(InputError, match=r"^[^\n]*train-1\.tar: clip clip-8 \(id clip\.8:x\): [^\n]+$"):
        list(run(open_index(tmp_path, "train"), settings(workers=workers), 0, 3))


def test_a_clip_of_other_length_than_its_index_says(tmp_path: Path, clips: list[bytes]) -> None:
    write_shards(tmp_path, clips, [*FRAMES[:-1], 30])
    with pytest.raises(InputError, match=r"train-1\.tar: clip clip-10 .*fewer frames"):
        list(run(open_index(tmp_path, "train"), settings(sampling_rate=1.0), 0, 3))


def test_what_cannot_start_fails_before_the_first_batch(index: Index) -> None:
    with pytest.raises(InputError, match=r"holds clips of 32 pixels, but data\.frame_size is 30"):
        run(index, settings(frame_size=30), 0, 3)
    with pytest.raises(InputError, match=r"holds clips of 32 pixels"):
        evaluation_batches(Selection([index]), settings(frame_size=30), [[0]])


MAIN = """
import sys, time
from pathlib import Path
from sltscale.config import DataSettings
from sltscale.data.shards.index import open_index
from sltscale.data.batches.batching import BatchRule
from sltscale.data.batches.plan import Plan
from sltscale.data.batches.selection import Selection
from sltscale.data.batches.stream import stream

if __name__ == "__main__":
    index = open_index(Path(sys.argv[1]), "train")
    settings = DataSettings(shards="x", frame_size=32, crop_size=32, global_batch=4, workers=1)
    plan = Plan(index.frames, 0, BatchRule(clips=4))
    batches = stream(Selection([index]), plan, settings, seed=0, rank=0, world_size=1, first_step=0, last_step=10_000)
    for step, _ in batches:
        print(step, flush=True)
        if step == int(sys.argv[2]):
            raise SystemExit(3)
        time.sleep(0.05)
"""


@pytest.fixture
def main_process(index: Index, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[subprocess.Popen[str]]:
    """A training process that ends at the step given by the parameter, in the middle of its stream."""
    script = tmp_path / "main.py"
    script.write_text(MAIN)
    command = [sys.executable, script, index.folder, str(request.param)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    yield process
    process.kill()
    process.communicate()


def child_of(process: subprocess.Popen[str], command: str) -> psutil.Process:
    children = psutil.Process(process.pid).children(recursive=True)
    (child,) = [child for child in children if command in " ".join(child.cmdline())]
    return child


@pytest.mark.parametrize("main_process", [10_000], indirect=True)
def test_workers_outlive_the_jobs_signals_but_not_the_main_process(main_process: subprocess.Popen[str]) -> None:
    assert main_process.stdout is not None
    assert main_process.stdout.readline() == "0\n"
    worker, tracker = (child_of(main_process, command) for command in ("spawn_main", "resource_tracker"))
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        worker.send_signal(number)
        tracker.send_signal(number)
    for _ in range(40):
        assert main_process.stdout.readline().strip().isdigit()
    assert is_alive(worker) and is_alive(tracker)
    os.kill(main_process.pid, signal.SIGKILL)
    deadline = time.monotonic() + 120  # they look every five seconds
    while (running := is_alive(worker)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not running


def is_alive(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.mark.parametrize("main_process", [0], indirect=True)
def test_a_program_that_ends_in_mid_stream_ends(main_process: subprocess.Popen[str]) -> None:
    assert main_process.wait(600) == 3
