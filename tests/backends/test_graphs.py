"""The GPU's path of the engine: graphs, pinned copies, streams.

The order of copies, replays and sizes is tested everywhere, with a device that copies and "captures" on the CPU; what
only a GPU can show is marked.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import threading

import numpy as np
import pytest
import torch

pytest.importorskip("pydantic", reason="the engine needs pydantic, which is not installed here")

from support.testing import write_random_model

from pylumiere.backends.graphs import HostCalls
from pylumiere.engine import Engine
from pylumiere.request import GenerationRequest
from pylumiere.scheduling.memory import OWN_FACTOR
from pylumiere.scheduling.scheduler import call_shape


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_random_model(tmp_path_factory.mktemp("model"))


class FakeGraph:
    def __init__(self, device, function):
        self.device, self.function = device, function

    def replay(self):
        self.device.replayed += 1
        self.function()


class FakeDevice(HostCalls):
    """What `DeviceCalls` offers, on one queue that is worked off as late as a GPU may: when somebody waits. Operands
    that were not copied in are not seen. Final frames are fetched without waiting for what is queued."""

    def __init__(self):
        self.captured = self.replayed = self.runs = self.fetched = 0
        self.queue = []
        self.lock = threading.RLock()

    def making(self):
        return contextlib.nullcontext()

    def capture(self, function):
        function()
        self.captured += 1
        return FakeGraph(self, function)

    def copy_in(self, operands):
        with self.lock:
            self.queue += [functools.partial(buffer.copy_, source) for buffer, source in operands]

    def enqueue(self, function):
        with self.lock:
            self.queue.append(function)

    def run(self, compute, result, target):
        with self.lock:
            self.runs += 1
            while self.queue:
                self.queue.pop(0)()
            super().run(compute, result, target)

    def fetch(self, copies):
        for target, buffer in copies:
            assert target.shape == buffer.shape
            self.fetched += len(buffer)
            target.copy_(buffer)


def with_fake_device(engine):
    engine._scheduler._device_calls = FakeDevice()
    engine._scheduler._lanes.part_rows = None
    return engine._scheduler._device_calls


def row_by_row(engine, monkeypatch):
    """The network's calls as a reproducible engine makes them on a CPU, so that bytes can be compared in company."""
    predict = engine._backend.predict

    def rows(stage, *operands, num_threads=None, **kw):
        parts = [[None if t is None else t[row : row + 1] for t in operands] for row in range(len(operands[0]))]
        return torch.cat([predict(stage, *part, num_threads=1, **kw) for part in parts])

    monkeypatch.setattr(engine._backend, "predict", rows)


@pytest.mark.parametrize("max_batch", [1, 3])
def test_copied_and_replayed_calls_give_the_same_clip(folder, max_batch):
    """Padding pictures as well: an edit holds the user's pixels at every step, after the replay."""
    options = dict(precision="fp32", reproducible=False, max_batch=max_batch)
    picture = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    requests = [{"prompt": "a red circle", "seed": 7}, {"prompt": "x", "seed": 8, "image": picture}]
    with Engine.load(folder, **options) as plain, Engine.load(folder, **options) as engine:
        device = with_fake_device(engine)
        engine.warm_up()
        captured = device.captured
        assert captured == 2 * max_batch and engine.metrics()["graphs"] == captured, "each size of both networks"
        runs, fetched = device.runs, device.fetched
        for fields in requests:
            assert np.array_equal(engine.generate(**fields).frames, plain.generate(**fields).frames)
        assert device.captured == captured and device.replayed == device.runs - runs > 0, "replays alone"
        assert device.fetched - fetched == 2 * (8 + 8), "of the device's states nothing comes back but final frames"


def test_long_clips_and_company_on_a_device_give_the_cpus_bytes(folder, monkeypatch):
    """Clips of several windows in both stages, a loop, an input of unknown length, a multistep sampler."""
    options = dict(precision="fp32", max_batch=2)
    requests = [
        {"num_frames": 24, "num_inference_steps": 3},
        {"num_frames": 8, "num_inference_steps": 2, "guidance_scale": 1.0, "sampler": "dpmpp_2m"},
        {"num_frames": 20, "num_inference_steps": 2, "loop": True},
        {"num_frames": 5, "num_inference_steps": 4, "sampler": "ddpm"},
    ]
    low = np.random.default_rng(1).integers(0, 256, (21, 16, 16, 3), dtype=np.uint8)
    with Engine.load(folder, **options) as plain, Engine.load(folder, **options) as engine:
        with_fake_device(engine)
        row_by_row(engine, monkeypatch)
        jobs = [engine.submit("x", seed=seed, **fields) for seed, fields in enumerate(requests)]
        upscaled = np.concatenate([chunk.frames for chunk in engine.upscale(iter(low), num_inference_steps=2)])
        for seed, (job, fields) in enumerate(zip(jobs, requests, strict=True)):
            assert np.array_equal(job.result(60).frames, plain.generate("x", seed=seed, **fields).frames), fields
        expected = [chunk.frames for chunk in plain.upscale(iter(low), num_inference_steps=2)]
        assert np.array_equal(upscaled, np.concatenate(expected))


def test_calls_of_ones_own_find_their_graph(folder, monkeypatch):
    """Of clips that are in both stages at once, and of `upscale`. A second one at a time goes without a graph."""
    low = np.zeros((11, 16, 16, 3), np.uint8)
    with Engine.load(folder, precision="fp32", max_batch=2, reproducible=True) as engine:
        device = with_fake_device(engine)
        engine._scheduler._fixed_batch = True
        engine.warm_up([{}, {"num_frames": 24}])
        assert device.captured == 3, "base, and the super-resolution that is shared and that is lent"
        for _ in range(2):
            runs, replayed = device.runs, device.replayed
            engine.generate("x", seed=1, num_frames=24)
            list(engine.upscale(iter(low)))
            assert device.replayed - replayed == device.runs - runs > 0
        assert engine.metrics()["call_shapes"] == 3
        first = engine.upscale(iter(low))
        next(first)
        engine.generate("x", seed=1, num_frames=24)
        list(first)
        runs, replayed = device.runs, device.replayed
        list(engine.upscale(iter(low)))
        assert device.replayed - replayed == device.runs - runs > 0, "it came back"
        assert engine.metrics()["call_shapes"] == 3 and device.captured == 3


@pytest.mark.parametrize("fails", ["nan", "memory"])
def test_a_clip_that_fails_on_the_device_ends_alone(folder, fails, monkeypatch):
    with Engine.load(folder, precision="fp32", max_batch=2) as engine:
        with_fake_device(engine)
        row_by_row(engine, monkeypatch)
        expected = engine.generate("x", seed=1, num_inference_steps=6).frames
        backend, calls = engine._backend, []
        predict = backend.predict

        def wrong(stage, sample, *rest, **kw):
            out = predict(stage, sample, *rest, **kw)
            calls.append(stage)
            if len(calls) == 3:
                if fails == "memory":
                    raise MemoryError("of the device")
                out = out.clone()
                out[-1, 0, 0, 0, 0] = float("nan")  # the last row is a clip of its own, or one alone
            return out

        monkeypatch.setattr(backend, "predict", wrong)
        jobs = [engine.submit("x", seed=seed, num_inference_steps=6) for seed in (1, 2)]
        errors = [job._future.exception(60) for job in jobs]
        names = [type(error).__name__ for error in errors if error is not None]
        if fails == "nan":
            assert names == ["NonFiniteOutput"]
        assert names and set(names) <= {"NonFiniteOutput", "MemoryError"}
        for job, error, seed in zip(jobs, errors, (1, 2), strict=True):
            if error is None and seed == 1:
                assert np.array_equal(job.result().frames, expected)
        monkeypatch.setattr(backend, "predict", predict)
        assert np.array_equal(engine.generate("x", seed=1, num_inference_steps=6).frames, expected)


def test_a_device_budget_counts_rings_and_no_host_memory(folder):
    with Engine.load(folder, precision="fp32", memory_budget=2**40, max_batch=2) as engine:
        with_fake_device(engine)
        engine._choice = dataclasses.replace(engine._choice, device=torch.device("cuda"))
        for fields in ({}, {"num_frames": 24}, {"sampler": "dpmpp_2m"}):
            request = GenerationRequest(prompt="x", **fields)
            order, _ = engine._ordered(request)
            rings = []
            for stage in order.stages:
                bucket = engine._scheduler._bucket(call_shape(stage))
                sampler = bucket.sampler
                scale = stage.guidance_scale
                handle = sampler.add_clip(stage.windows, stage.table, seed=0, guidance_scale=scale)
                rings.append(sampler.clip_bytes(handle))
                sampler.remove_clip(handle)
            at_once = order.is_streamed(order.stages[0])
            own = sum(rings) if at_once else max(rings)
            assert at_once == (fields.get("num_frames") == 24)
            assert engine._need(order, request, None).own == int(own * OWN_FACTOR)


def test_a_fixed_batch_has_one_graph_and_styles_none(folder):
    with Engine.load(folder, precision="fp32", max_batch=4) as engine:
        device = with_fake_device(engine)
        engine._scheduler._fixed_batch = True
        engine.warm_up()
        assert device.captured == 2
        engine.warm_up()
        assert device.captured == 2, "what is warm is not captured again"
        bucket = next(iter(engine._scheduler._buckets.values()))
        assert bucket.graph_sizes() == [4]
        engine._backend.can_capture = False
        assert bucket.graph_sizes() == []


def test_graphs_count_in_the_budget_beside_calls_without_one(folder):
    with Engine.load(folder, precision="fp32", memory_budget=2**40) as engine:
        with_fake_device(engine)
        before = engine.metrics()["memory"]["planned"]
        engine.warm_up()
        budget = engine._scheduler.budget
        largest = max(size.activations for size in budget.warm.values())
        assert budget.fixed["graphs"] == largest
        buffers = sum(size.buffers for size in budget.warm.values())
        assert engine.metrics()["memory"]["planned"] == before + 2 * largest + buffers


# ---- on a GPU -------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["torch", "triton"])
def load(request, folder):
    """Engines on the GPU, closed in the end."""
    with contextlib.ExitStack() as stack:
        yield lambda **options: stack.enter_context(
            Engine.load(folder, backend=request.param, device="cuda", precision="fp32", **options)
        )


@pytest.mark.gpu
def test_graphs_give_what_calls_without_them_give(load):
    plain, engine = load(max_batch=2), load(max_batch=2)
    engine.warm_up()
    graphs = engine.metrics()["graphs"]
    assert graphs == 4
    for seed in range(3):
        frames = [e.generate("a red circle", seed=seed).frames for e in (plain, engine)]
        assert np.array_equal(*frames)
    assert engine.metrics()["graphs"] == graphs and plain.metrics()["graphs"] == 0


@pytest.mark.gpu
def test_streamed_frames_are_those_of_the_clip(load):
    engine = load(reproducible=True)
    engine.warm_up()
    streamed = np.concatenate([chunk.frames for chunk in engine.stream("a red circle", seed=7)])
    assert np.array_equal(streamed, engine.generate("a red circle", seed=7).frames)


@pytest.mark.gpu
@pytest.mark.parametrize("warm", [False, True])
def test_bytes_do_not_depend_on_the_company_on_a_gpu(load, warm):
    """Requests of two shapes at once: two lanes, one compute stream, one pool."""
    engine = load(reproducible=True, max_batch=3)
    if warm:
        engine.warm_up([{}, {"num_frames": 4}])
    requests = [dict(seed=s, num_inference_steps=2 + s % 3, num_frames=(8, 4)[s % 2]) for s in range(8)]
    alone = [engine.generate("a red circle", **fields).frames for fields in requests]
    together = [engine.submit("a red circle", **fields) for fields in requests]
    for frames, job in zip(alone, together, strict=True):
        assert np.array_equal(job.result(60).frames, frames)


@pytest.mark.gpu
def test_a_warm_engine_takes_no_more_device_memory(load):
    """Rings come with the clips: the first six at once take what the next six find."""
    engine = load()
    engine.warm_up()
    for job in [engine.submit("a red circle", seed=seed) for seed in range(6)]:
        job.result(60)
    before = torch.cuda.memory_reserved(), engine.metrics()["graphs"], engine.metrics()["call_shapes"]
    for job in [engine.submit("a red circle", seed=seed) for seed in range(6)]:
        job.result(60)
    assert (torch.cuda.memory_reserved(), engine.metrics()["graphs"], engine.metrics()["call_shapes"]) == before
