"""The decoder as a stage: groups and their order, a budget that makes them smaller, and memory as it was planned."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch

from pylumiere.diffusion.windows import NonFiniteOutput, WindowPlan
from pylumiere.engine import Engine
from pylumiere.errors import BudgetExceeded
from pylumiere.request import GenerationRequest
from pylumiere.scheduling.decoding import GroupSampler

FIELDS = {"prompt": "a dog", "seed": 7, "num_inference_steps": 2, "guidance_scale": 1.0}


@pytest.fixture(scope="module")
def engine(tiny_sd):
    """Two lanes, also where the environment allows one thread; a decoder's group is then two frames at most."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    engine = Engine.load(tiny_sd(sd2=False)[1], precision="fp32", temporal_shift=8, memory_budget=2**40)
    torch.set_num_threads(before)
    with engine:
        yield engine


def group_of(engine, request):
    return engine._ordered(request)[0].last.windows.window


def test_groups_of_clips_take_turns_and_leave_in_order():
    sampler = GroupSampler()
    first, second = sampler.add(WindowPlan(5, 2, 0)), sampler.add(WindowPlan(3, 2, 0))
    order = [sampler.hand_out() for _ in range(5)]
    assert order == [(first, range(0, 2)), (second, range(0, 2)), (first, range(2, 4)), (second, range(2, 3)),
                     (first, range(4, 5))]  # fmt: skip
    assert sampler.hand_out() is None and not sampler.is_finished(second)
    assert sampler.take_final(first) is None
    for handle, frames in order:
        sampler.put(handle, np.full((len(frames), 1, 1, 3), frames.start, np.float32))
    start, frames = sampler.take_final(first)
    assert start == 0 and frames[:, 0, 0, 0].tolist() == [0, 0, 2, 2, 4]
    assert sampler.is_finished(first) and sampler.frames_final(second) == 3


def test_a_clip_that_rests_is_given_no_group():
    sampler = GroupSampler()
    first, second = sampler.add(WindowPlan(2, 1, 0)), sampler.add(WindowPlan(2, 1, 0))
    sampler.set_paused(first, True)
    assert [sampler.hand_out()[0] for _ in range(2)] == [second, second] and sampler.hand_out() is None
    sampler.set_paused(first, False)
    assert sampler.hand_out() == (first, range(0, 1))


def test_a_budget_between_makes_the_decoders_groups_smaller_and_the_same_bytes(engine, monkeypatch):
    request = GenerationRequest(**FIELDS, num_frames=3, height=64, width=64)
    expected, budget = engine.generate(request).frames, engine._scheduler.budget
    order = engine._ordered(request)[0]
    large = budget.total([engine._need(order, request, None)])
    monkeypatch.setattr(budget, "limit", large - 1)
    small = budget.total([engine._need(engine._ordered(request)[0], request, None)])
    assert small < large and (order.last.windows.window, group_of(engine, request)) == (2, 1)
    for limit in (large - 1, small):
        monkeypatch.setattr(budget, "limit", limit)
        assert engine.generate(request).frames.tobytes() == expected.tobytes()
    chunks = list(engine.stream(request))
    assert np.concatenate([chunk.frames for chunk in chunks]).tobytes() == expected.tobytes()
    monkeypatch.setattr(budget, "limit", small - 1)
    for ask in (engine.generate, engine.submit):
        with pytest.raises(BudgetExceeded, match=rf"memory_budget={small - 1} bytes: {small} are needed \(weights "
                           r"\d+, process \d+, request \d+, unet \d+, decoder \d+\)"):  # fmt: skip
            ask(request)


def test_what_is_planned_grows_with_frames_and_size(engine):
    def planned(**fields):
        request = GenerationRequest(**{**FIELDS, **fields})
        return engine._need(engine._ordered(request)[0], request, None)

    def calls(need):
        return {shape.stage: size.activations for shape, size in need.calls.items()}

    small, long, large = planned(num_frames=8), planned(num_frames=32), planned(num_frames=8, height=64, width=64)
    assert calls(small).keys() == {"unet", "decoder"}
    assert calls(long)["unet"] > calls(small)["unet"] and calls(long)["decoder"] == calls(small)["decoder"]
    assert calls(large)["unet"] > calls(small)["unet"] and calls(large)["decoder"] > calls(small)["decoder"]
    assert long.own > 2 * small.own and large.own > 10 * small.own


def test_nan_of_the_decoder_names_its_frames(engine, monkeypatch):
    inner = engine._backend.decode

    def decode(latents, **options):
        frames = inner(latents, **options)
        return frames * torch.nan if (latents == marked).all() else frames

    latents = engine.generate(**FIELDS, num_frames=5, output_type="latent").frames
    marked = torch.from_numpy(latents[3])
    monkeypatch.setattr(engine._backend, "decode", decode)
    delivered = []
    with pytest.raises(NonFiniteOutput, match="the decoder gave NaN or infinity in frames 2 to 3"):
        for chunk in engine.stream(**FIELDS, num_frames=5):
            delivered.append(len(chunk.frames))
    assert sum(delivered) == 2


MEASURE = """
import sys, threading
import torch
torch.set_num_threads(2)
from pylumiere.engine import Engine
from pylumiere.scheduling.memory import peak_resident_bytes

with Engine.load(sys.argv[1], precision="fp32", temporal_shift=8, memory_budget=2**40) as engine:
    fields = dict(num_inference_steps=2, num_frames=16, height=64, width=64)
    planned, jobs = 0, [engine.submit("a dog", seed=seed, **fields) for seed in range(int(sys.argv[2]))]
    while not all(job.done for job in jobs):
        planned = max(planned, engine.metrics()["memory"]["planned"])
        threading.Event().wait(0.002)
    for job in jobs:
        job.result()
    print(planned, peak_resident_bytes(), engine.metrics()["memory"]["resident"])
"""


@pytest.mark.slow
@pytest.mark.parametrize("at_once", [1, 3])
def test_resident_memory_stays_under_what_was_planned(tiny_sd, at_once):
    command = [sys.executable, "-P", "-c", MEASURE, str(tiny_sd(sd2=False)[1]), str(at_once)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    planned, peak, _ = map(int, done.stdout.split())
    assert peak < planned
