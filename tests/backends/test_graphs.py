"""The GPU's path of the engine: graphs, pinned copies, streams.

The order of copies, replays and sizes is tested everywhere, with a device that copies and "captures" on the CPU; what
only a GPU can show is marked.
"""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
import torch

pytest.importorskip("pydantic", reason="the engine needs pydantic, which is not installed here")

from pylumiere.engine import Engine
from pylumiere.testing import write_random_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_random_model(tmp_path_factory.mktemp("model"))


class FakeGraph:
    def __init__(self, device, function):
        self.device, self.function = device, function

    def replay(self):
        self.device.replayed += 1
        self.function()


class FakeDevice:
    """What `DeviceCalls` offers, in order and without streams. Operands that were not copied in are not seen."""

    def __init__(self):
        self.captured = self.replayed = self.runs = 0

    def making(self):
        return contextlib.nullcontext()

    def pinned(self, like):
        return torch.zeros(like.shape, dtype=like.dtype)

    def capture(self, function):
        function()
        self.captured += 1
        return FakeGraph(self, function)

    def copy_in(self, operands):
        for buffer, source in operands:
            buffer.copy_(source)

    def run(self, compute, result, target):
        self.runs += 1
        compute()
        target.copy_(result)


def with_fake_device(engine):
    engine._scheduler._device_calls = FakeDevice()
    engine._scheduler._lanes.part_rows = None
    return engine._scheduler._device_calls


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
        runs = device.runs
        for fields in requests:
            assert np.array_equal(engine.generate(**fields).frames, plain.generate(**fields).frames)
        assert device.captured == captured and device.replayed == device.runs - runs > 0, "replays alone"


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
    engine = load()
    engine.warm_up()
    engine.generate("a red circle", seed=1)
    before = torch.cuda.memory_reserved(), engine.metrics()["graphs"], engine.metrics()["call_shapes"]
    for job in [engine.submit("a red circle", seed=seed) for seed in range(6)]:
        job.result(60)
    assert (torch.cuda.memory_reserved(), engine.metrics()["graphs"], engine.metrics()["call_shapes"]) == before
