"""Streamed equals step by step, bit for bit, against plain numpy: windows, samplers, guidance, capacity, batches.

EXACT_CASES=5000 pytest tests/runtime/test_exact.py draws more random cases than the few hundred of every run.
"""

from __future__ import annotations

import math
import os
import random
from dataclasses import dataclass

import numpy as np
import pytest
from support import offline

from pylumiere.diffusion.windows import BatchSampler, FrameBuffer, WindowPlan, memory_bytes, sample_clip

F32 = np.float32
SHAPE = (1, 2, 3)
CASES = int(os.environ.get("EXACT_CASES", "400"))
VALUES = math.prod(SHAPE)


@dataclass
class Table:
    timesteps: np.ndarray
    coef: np.ndarray
    init_sigma: float
    init_alpha: float


def mix(x, step, window, guided):
    """A cheap denoiser of one window [L, P]: a frame depends on all frames, their order, the window and the step."""
    length = len(x)
    total = np.zeros_like(x[0])
    for i in range(length):
        total = total * F32(0.75) + x[i] * F32(1.0 + 0.125 * i)
    place = np.arange(length, dtype=F32)[:, None]
    out = total * F32(0.0625) + x * F32(0.5) + (place - F32(window % 7)) * F32(0.03125) + F32(0.015625 * (step + 1))
    return np.stack([out, out * F32(0.5) - x * F32(0.25)]) if guided else out[None]


def random_case(rng: random.Random) -> dict:
    window = rng.randint(1, 9)
    overlap = rng.randint(0, window - 1)
    steps = rng.randint(1, 6)
    case = {
        "num_frames": rng.choice([1, 2, rng.randint(1, 12), rng.randint(1, 30), rng.randint(20, 70)]),
        "window": window,
        "overlap": overlap,
        "weights": rng.choice(["flat", "linear", "gaussian"]),
        "loop": rng.random() < 0.3,
        "halo": rng.choice([0, 0, 0, 1, 2, 3]),
        "multiple": rng.choice([1, 1, 2, 4]),
    }
    # Rows as samplers make them: multistep where r != 0, stochastic where n != 0; the last may give the clean sample.
    multistep, stochastic = rng.random() < 0.5, rng.random() < 0.5
    coef = np.array(
        [
            [
                rng.uniform(-1, 1.5),
                rng.uniform(-1, 1),
                rng.uniform(-0.5, 1),
                rng.uniform(0, 1),
                rng.uniform(-0.5, 0.5) if multistep and s > 0 else 0.0,
                rng.uniform(0, 0.5) if stochastic else 0.0,
            ]
            for s in range(steps)
        ]
    )
    if rng.random() < 0.5:
        coef[-1, 2:] = 0, 1, 0, 0
    case |= {
        "coef": coef,
        "init_sigma": rng.uniform(0.5, 2),
        "init_alpha": rng.uniform(0, 1),
        "seed": rng.getrandbits(64),
        "stage": rng.randint(0, 2),
        "guidance": rng.choice([1.0, 1.0, 2.5, 7.0]),
        "clip": rng.choice([None, 1.0, 0.5]),
    }
    if case["clip"] is not None and rng.random() < 0.3:
        case |= {"threshold": rng.choice([0.5, 0.9, 1.0]), "threshold_max": rng.choice([0.0, 0.75, 2.0])}
    if case["guidance"] != 1.0 and rng.random() < 0.4:
        case["rescale"] = rng.choice([0.3, 0.7, 1.0])
    return case


def plan_of(case: dict, num_frames) -> WindowPlan:
    return WindowPlan(
        num_frames, case["window"], case["overlap"], case["weights"], case["loop"], case["halo"], case["multiple"]
    )


def table_of(case: dict) -> Table:
    steps = len(case["coef"])
    return Table(np.arange(steps, dtype=F32), case["coef"], case["init_sigma"], case["init_alpha"])


def settings_of(case: dict) -> dict:
    return {
        "seed": case["seed"],
        "stage": case["stage"],
        "guidance_scale": case["guidance"],
        "clip": case["clip"],
        "threshold": case.get("threshold"),
        "threshold_max": case.get("threshold_max", 0.0),
        "guidance_rescale": case.get("rescale", 0.0),
    }


def expected_of(case: dict, initial=None) -> np.ndarray:
    guided = case["guidance"] != 1.0
    return offline.sample_offline(
        lambda x, step, window, frames: mix(x, step, window, guided), num_values=VALUES, initial=initial, **case
    )


def denoise_rows(x, steps, windows, guided):
    rows = [
        mix(row.reshape(len(row), VALUES), int(s), int(w), guided) for row, s, w in zip(x, steps, windows, strict=True)
    ]
    return np.ascontiguousarray(np.stack(rows, 1).reshape(2 if guided else 1, *x.shape))


def collect(chunks, num_frames) -> np.ndarray:
    frames = np.full((num_frames, VALUES), np.nan, F32)
    end = 0
    for start, chunk in chunks:
        assert start == end and len(chunk) >= 1
        assert chunk.shape[1:] == SHAPE and chunk.dtype == F32
        end = start + len(chunk)
        frames[start:end] = chunk.reshape(len(chunk), VALUES)
    assert end == num_frames
    return frames


def describe(case: dict) -> str:
    return ", ".join(f"{key}={value}" for key, value in case.items() if key != "coef") + f", steps={len(case['coef'])}"


def run_streamed(case: dict, rng: random.Random, initial=None) -> np.ndarray:
    guided = case["guidance"] != 1.0
    num_frames = case["num_frames"]
    capacity, fixed = rng.choice([1, 1, 2, 3, 5, 16]), rng.random() < 0.5
    plan = plan_of(case, num_frames)
    spans = {}

    def denoise(x, timesteps, windows, frames):
        assert x.shape == (len(windows), plan.call_frames, *SHAPE)
        assert len(windows) == capacity if fixed else len(windows) <= capacity
        for w, row in zip(windows.tolist(), frames.tolist(), strict=True):
            spans[w] = row
        return denoise_rows(x, timesteps, windows, guided)

    lazy = not case["loop"] and rng.random() < 0.3
    source = None
    if lazy:
        chunk = rng.randint(1, 4)
        source = FrameBuffer(
            np.zeros((min(chunk, num_frames - i), 1, 1, 3), np.uint8) for i in range(0, num_frames, chunk)
        )
    result = collect(
        sample_clip(
            denoise,
            num_frames=None if lazy else num_frames,
            frame_shape=SHAPE,
            table=table_of(case),
            plan=plan_of(case, None) if lazy else plan,
            initial=initial if initial is None or not lazy else lambda f: initial[f],
            source=source,
            capacity=capacity,
            fixed_batch=fixed,
            num_threads=rng.choice([1, 2]),
            **settings_of(case),
        ),
        num_frames,
    )
    starts = offline.window_starts(num_frames, case["window"], case["overlap"], case["loop"])
    assert sorted(spans) == list(range(len(starts)))
    for w, start in enumerate(starts):
        expected = offline.window_frames(
            start, num_frames, case["window"], case["halo"], case["multiple"], case["loop"]
        )[0]
        assert spans[w] == expected, f"frames read by window {w}"
    return result


@pytest.mark.parametrize("group", range(8))
def test_streamed_equals_offline(group):
    rng = random.Random(group)
    for _ in range(CASES // 8):
        case = random_case(rng)
        initial = None
        if rng.random() < 0.2:
            initial = (
                np.random.default_rng(rng.getrandbits(32)).standard_normal((case["num_frames"], *SHAPE)).astype(F32)
            )
        expected = expected_of(case, None if initial is None else initial.reshape(-1, VALUES))
        streamed = run_streamed(case, rng, initial)
        assert np.array_equal(expected.view(np.int32), streamed.view(np.int32)), describe(case)


@pytest.mark.parametrize("group", range(4))
def test_clips_that_share_batches_equal_offline(group):
    """Clips join while others run, are taken late, and one is removed in the middle."""
    rng = random.Random(100 + group)
    for _ in range(max(1, CASES // 40)):
        first = random_case(rng)
        guided = first["guidance"] != 1.0
        cases = [first]
        while len(cases) < 4:
            case = random_case(rng)
            case |= {key: first[key] for key in ("window", "halo", "multiple")}
            case["overlap"] = rng.randint(0, case["window"] - 1)
            case["guidance"] = first["guidance"]
            if not guided:
                case.pop("rescale", None)
            cases.append(case)
        sampler = BatchSampler(
            frame_shape=SHAPE,
            call_frames=plan_of(first, 1).call_frames,
            guided=guided,
            capacity=rng.choice([1, 2, 4, 8]),
            num_threads=1,
        )
        waiting, clips, results = list(cases), {}, []
        doomed = sampler.add_clip(plan_of(first, 40), table_of(first), **settings_of(first))
        while waiting or clips:
            if (waiting and rng.random() < 0.3) or (not clips and waiting):
                case = waiting.pop()
                clips[sampler.add_clip(plan_of(case, case["num_frames"]), table_of(case), **settings_of(case))] = (
                    case,
                    [],
                )
            batch = sampler.next_batch()
            if batch is not None:
                if doomed is not None and rng.random() < 0.1:
                    sampler.remove_clip(doomed)
                    doomed = None
                out = denoise_rows(batch.x, batch.steps, batch.windows, guided)
                sampler.complete(out)
            for handle in list(clips):
                case, chunks = clips[handle]
                if batch is not None and rng.random() < 0.5 and not sampler.is_finished(handle):
                    continue
                final = sampler.take_final(handle)
                if final is not None:
                    chunks.append(final)
                if sampler.is_finished(handle):
                    results.append((case, chunks))
                    sampler.remove_clip(handle)
                    del clips[handle]
        assert len(results) == 4
        for case, chunks in results:
            streamed = collect(chunks, case["num_frames"])
            assert np.array_equal(expected_of(case).view(np.int32), streamed.view(np.int32)), describe(case)


def test_memory_is_what_the_formula_says_and_does_not_grow():
    rng = random.Random(5)
    for _ in range(60):
        case = random_case(rng)
        capacity = rng.choice([1, 4])
        guided = case["guidance"] != 1.0
        sizes = []
        for num_frames in (2000, 20000):
            plan = plan_of(case, num_frames)
            sampler = BatchSampler(frame_shape=SHAPE, call_frames=plan.call_frames, guided=guided, capacity=capacity)
            handle = sampler.add_clip(plan, table_of(case), **settings_of(case))
            sizes.append(sampler.clip_bytes(handle))
            steps, reach = len(case["coef"]), (plan.call_frames - 1) // plan.stride
            slots, rows = plan.buffer_sizes(steps, capacity)
            ring = plan.call_frames + plan.stride * (reach * (steps - 1) + max(1, reach) * capacity)
            if case["loop"]:
                assert ring <= slots <= ring + case["halo"] + plan.stride * (reach * steps + 1)
            else:
                assert slots == ring
            assert sizes[-1] == memory_bytes(
                plan,
                frame_shape=SHAPE,
                steps=steps,
                capacity=capacity,
                num_outputs=1 + guided,
                multistep=bool(np.any(case["coef"][:, 4])),
            )
        if case["loop"]:  # the seam's place in the period of windows may differ
            assert abs(sizes[1] - sizes[0]) < 0.5 * sizes[0]
        else:
            assert sizes[0] == sizes[1], describe(case)


def test_first_frames_come_early():
    """8 steps, 1,000 windows: 36 evaluations at capacity 1, where step by step takes 7,001; 128 at capacity 16."""
    coef = np.tile([0.5, 0.5, 0.5, 0.5, 0.0, 0.0], (8, 1))
    table = Table(np.arange(8, dtype=F32), coef, 1.0, 0.0)
    for capacity, expected in ((1, 36), (16, 128)):
        evaluations = 0

        def denoise(x, timesteps, windows, frames):
            nonlocal evaluations
            evaluations += len(windows)
            return x[None].copy()

        plan = WindowPlan(999 * 6 + 8, 8, 2)
        assert plan.num_windows == 1000
        chunks = sample_clip(
            denoise,
            num_frames=plan.num_frames,
            frame_shape=(1, 1, 1),
            table=table,
            plan=plan,
            seed=1,
            stage=1,
            capacity=capacity,
        )
        start, frames = next(chunks)
        assert start == 0 and len(frames) >= 1 and evaluations == expected
        chunks.close()
