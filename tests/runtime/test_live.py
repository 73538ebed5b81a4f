"""Slow and vanished consumers, exceptions on every side, cancel, NaN, inputs that end: nothing hangs or leaks."""

from __future__ import annotations

import gc
import re
import threading
import time
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from support.testing import no_new_threads

from pylumiere import _runtime
from pylumiere.cli import main
from pylumiere.diffusion.windows import (
    BatchSampler,
    FrameBuffer,
    NonFiniteOutput,
    WindowPlan,
    frame_noise,
    in_background,
    sample_clip,
)
from pylumiere.errors import Cancelled
from pylumiere.media.writers import VideoWriter

SHAPE = (2, 2, 3)


@dataclass
class Table:
    timesteps: np.ndarray
    coef: np.ndarray
    init_sigma: float = 1.0
    init_alpha: float = 0.0


def table(steps=4):
    coef = np.tile(np.array([0.5, 0.5, 0.5, 0.5, 0.0, 0.1]), (steps, 1))
    coef[-1:] = 0.5, 0.5, 0, 1, 0, 0
    return Table(np.arange(steps, dtype=np.float32)[::-1].copy(), coef)


def half(x, timesteps, windows, frames):
    return x[None] * np.float32(0.5)


def chunks(denoise=half, num_frames=80, plan=None, steps=4, **kw):
    plan = plan or WindowPlan(num_frames, 8, 2)
    kw.setdefault("capacity", 2)
    return sample_clip(
        denoise, num_frames=num_frames, frame_shape=SHAPE, table=table(steps), plan=plan, seed=3, stage=1, **kw
    )


def test_work_happens_only_when_the_consumer_asks():
    calls = []
    stream = chunks(lambda *a: calls.append(1) or half(*a), num_frames=800)
    assert not calls
    next(stream)
    early = len(calls)
    assert 0 < early < 40
    time.sleep(0.02)
    assert len(calls) == early
    stream.close()
    with pytest.raises(StopIteration):
        next(stream)


def test_a_slow_consumer_slows_the_producer():
    made = []
    before = threading.active_count()

    def produce():
        for i in range(1000):
            made.append(i)
            yield i

    with in_background(produce(), capacity=2) as items:
        for expected in range(5):
            assert next(items) == expected
            time.sleep(0.02)
            assert len(made) <= expected + 1 + 2 + 1
    assert no_new_threads(before)


@pytest.mark.parametrize("leave", ["close", "drop"])
def test_a_consumer_that_goes_away_stops_the_producer(leave):
    closed = threading.Event()
    before = threading.active_count()

    def produce():
        try:
            while True:
                yield np.zeros(1000)
        finally:
            closed.set()

    items = in_background(produce(), capacity=1)
    next(items)
    if leave == "close":
        items.close()
    else:
        del items
        gc.collect()
    assert closed.wait(5)
    assert no_new_threads(before)


def test_an_exception_of_the_denoiser_reaches_the_caller_with_its_cause():
    calls = []

    def failing(x, *rest):
        calls.append(1)
        if len(calls) > 20:
            raise OSError("the device is gone")
        return half(x, *rest)

    before = threading.active_count()
    got = []
    with pytest.raises(OSError, match="the device is gone"):
        for chunk in in_background(chunks(failing)):
            got.append(chunk)
    assert got and got[0][0] == 0
    assert no_new_threads(before)


def test_cancel_within_one_call():
    calls, stop = [], threading.Event()

    def denoise(*a):
        calls.append(1)
        if len(calls) == 7:
            stop.set()
        return half(*a)

    with pytest.raises(Cancelled, match="final frames"):
        list(chunks(denoise, should_stop=stop.is_set))
    assert len(calls) == 7


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nan_is_named_and_delivered_frames_stay(bad):
    def denoise(x, timesteps, windows, frames):
        out = half(x, timesteps, windows, frames)
        for row, (t, w) in enumerate(zip(timesteps, windows, strict=True)):
            if w == 9 and t == 1:  # step 2 of 4
                out[0, row, 3, 1, 1, 2] = bad
        return out

    got = []
    with pytest.raises(NonFiniteOutput, match="stage 1, step 2, window 9") as caught:
        for start, frames in chunks(denoise):
            got.append((start, frames))
    assert (caught.value.stage, caught.value.step, caught.value.window) == (1, 2, 9)
    assert got[0][0] == 0 and all(np.isfinite(frames).all() for _, frames in got)


def test_a_faulty_clip_does_not_harm_its_neighbour():
    plan = WindowPlan(20, 8, 2)
    sampler = BatchSampler(frame_shape=SHAPE, call_frames=8, capacity=2)
    good = sampler.add_clip(plan, table(), seed=1, stage=1)
    faulty = sampler.add_clip(plan, table(), seed=2, stage=1)
    got, named = [], []
    while not sampler.is_finished(good):
        batch = sampler.next_batch()
        out = half(batch.x, None, None, None)
        out[:, batch.clips == faulty] = np.nan
        try:
            sampler.complete(out)
        except NonFiniteOutput as error:
            named.append(error.clip)
            sampler.remove_clip(error.clip)
            sampler.complete(out)
        if final := sampler.take_final(good):
            got.append(final[1])
    alone = [
        f for _, f in sample_clip(half, num_frames=20, frame_shape=SHAPE, table=table(), plan=plan, seed=1, stage=1)
    ]
    assert named == [faulty]
    assert np.array_equal(np.concatenate(got), np.concatenate(alone))


def test_context_and_padding_of_the_output_may_be_anything():
    def denoise(x, timesteps, windows, frames):
        out = half(x, timesteps, windows, frames)
        out[:, :, 3:] = np.nan  # a clip of three frames in calls of eight
        return out

    assert np.isfinite(np.concatenate([f for _, f in chunks(denoise, num_frames=3)])).all()


@pytest.mark.parametrize("num_frames", [1, 2, 7, 8, 9, 13, 14, 15, 80])
@pytest.mark.parametrize("window,overlap", [(8, 2), (8, 0), (8, 6), (5, 4), (16, 2)])
def test_every_frame_comes_once_for_lengths_that_do_not_fit(num_frames, window, overlap):
    plan = WindowPlan(num_frames, window, overlap)
    ends = [0]
    for start, frames in chunks(num_frames=num_frames, plan=plan):
        assert start == ends[-1]
        ends.append(start + len(frames))
    assert ends[-1] == num_frames


def test_unknown_length_drops_old_conditioning_and_ends():
    held = []
    source = FrameBuffer(np.full((1, 1, 3), i, np.float32) for i in range(300))

    def denoise(x, timesteps, windows, frames):
        held.append(len(source))
        assert np.array_equal(source.gather(frames)[..., 0, 0, 0], frames)
        return half(x, timesteps, windows, frames)

    stream = chunks(denoise, num_frames=None, plan=WindowPlan(None, 8, 2), source=source)
    assert sum(len(frames) for _, frames in stream) == 300
    assert max(held) < 70


def test_an_input_that_ends_early_or_changes_size_is_named():
    def frames(n, change=None):
        return FrameBuffer(np.zeros((2 if i == change else 1, 1, 3)) for i in range(n))

    got = []
    with pytest.raises(ValueError, match="ended after 41 of 80"):
        for _, chunk in chunks(source=frames(41)):
            got.append(chunk)
    assert got
    with pytest.raises(ValueError, match=r"frame 30 of the input has shape \(2, 1, 3\)"):
        list(chunks(num_frames=None, plan=WindowPlan(None, 8, 2), source=frames(80, 30)))
    with pytest.raises(ValueError, match="no frames"):
        list(chunks(num_frames=None, plan=WindowPlan(None, 8, 2), source=frames(0)))


@pytest.mark.parametrize(
    "arguments,message",
    [
        ({"plan": (80, 8, 8)}, "overlap=8"),
        ({"plan": (79, 8, 2)}, "the plan was made for 79"),
        ({"steps": 0}, "no steps"),
        ({"capacity": 0}, "capacity=0"),
        ({"threshold": 1.5}, "threshold=1.5"),
        ({"threshold": 0.9, "clip": None}, "finite clip"),
        ({"initial": np.zeros((3, *SHAPE))}, "initial clip has shape"),
        ({"denoise": lambda x, *_: x}, "the denoiser returned shape"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    arguments = dict(arguments)
    with pytest.raises(ValueError, match=message):
        if "plan" in arguments:
            arguments["plan"] = WindowPlan(*arguments["plan"])
        list(chunks(**arguments))


def test_step_callback_counts_and_its_exception_ends_the_clip():
    infos = []
    list(chunks(on_step=infos.append))
    assert infos[-1].tasks_done == infos[-1].num_tasks == 13 * 4
    assert infos[-1].frames_final == infos[-1].num_frames == 80
    with pytest.raises(LookupError):
        list(chunks(on_step=lambda info: {}[info]))


def test_outputs_of_sixteen_bits_from_torch():
    def denoise(dtype):
        return lambda x, *_: torch.from_numpy(x)[None].mul(0.5).to(dtype)

    full = np.concatenate([f for _, f in chunks(denoise(torch.float32))])
    for dtype, bound in ((torch.bfloat16, 0.05), (torch.float16, 0.01)):
        part = np.concatenate([f for _, f in chunks(denoise(dtype))])
        assert 0 < np.abs(part - full).max() < bound


@pytest.mark.parametrize("instruction_set", range(len(_runtime.instruction_sets())))
def test_step_and_noise_equal_the_torch_reference(instruction_set):
    from pylumiere.kernels import denoise_step

    rng = np.random.default_rng(0)
    frames, positions = 5, 1037
    x, prev = (rng.standard_normal((frames, positions), np.float32) for _ in range(2))
    rows = np.array([[0, -1], [1, 2], [3, 4], [5, -1], [-1, 6]], np.int32)
    weights = np.array([[1, 0], [0.25, 0.75], [0.5, 0.5], [1, 0], [0, 1]], np.float32)
    coef = rng.uniform(0.1, 1, (frames, 10)).astype(np.float32)
    coef[1, 4] = coef[2, 5] = 0
    coef[3, 8] = np.inf
    key = [[-5, 1, 3, 2**31, 0], [7, 0, -1, 0, 0], [2**62, 2, 9, 5, 0], [1, 1, 1, 1, 0], [0, 0, 0, 0, 0]]
    key = np.array(key, np.int64)
    pool = _runtime.ThreadPool(2)
    for outputs in (1, 2):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            out = torch.from_numpy(rng.standard_normal((outputs, 7, positions), np.float32)).to(dtype)
            for previous in (None, prev):
                expected = denoise_step.reference(
                    torch.from_numpy(x),
                    None if previous is None else torch.from_numpy(previous),
                    out,
                    torch.from_numpy(rows),
                    torch.from_numpy(weights),
                    torch.from_numpy(coef),
                    torch.from_numpy(key),
                )
                result = np.empty_like(x), np.empty_like(x)
                _runtime.denoise_step(x, previous, out, rows, weights, coef, key, *result, pool, instruction_set)
                for have, want in zip(result, expected, strict=True):
                    assert np.array_equal(have.view(np.int32), want.numpy().view(np.int32))
    assert np.array_equal(
        frame_noise(2**64 - 5, 2, 4, [0, 9], (7, 11, 3)).reshape(2, -1),
        denoise_step.frame_noise(2**64 - 5, 2, 4, [0, 9], 231).numpy(),
    )


def test_the_command_line_says_when_the_first_frames_came(tmp_path, capsys):
    with VideoWriter(tmp_path / "in.mp4", 16) as writer:
        writer.write(np.zeros((2, 16, 16, 3), np.uint8))
    assert main(["upscale", str(tmp_path / "in.mp4"), "-o", str(tmp_path / "out.mp4"), "--steps", "1"]) == 0
    assert re.search(r"first frames after \d+\.\d s", capsys.readouterr().out)
