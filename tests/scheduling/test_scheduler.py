"""Many requests at once: nobody's bytes depend on the company, and nobody is forgotten, starved or in the way."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from support.testing import wait_until, with_stage, write_random_model

from pylumiere.backends.choice import choose
from pylumiere.backends.torch import TorchBackend
from pylumiere.checkpoints.native import find_model, load_checkpoint
from pylumiere.diffusion.windows import NonFiniteOutput
from pylumiere.engine import Engine
from pylumiere.errors import BudgetExceeded, Cancelled, DeadlineExceeded, InvalidRequest, QueueFull
from pylumiere.networks.stunet.presets import model_preset
from pylumiere.request import GenerationRequest
from pylumiere.scheduling.memory import Budget, CallBytes, Need, parse_bytes

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module", autouse=True)
def two_threads():
    """Two lanes, also where the environment allows one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    config = with_stage(model_preset("tiny"), "ssr", augmentation=0.15)
    return write_random_model(tmp_path_factory.mktemp("model"), config)


@pytest.fixture(scope="module")
def alone(folder):
    """Bytes of a request that ran alone, kept by request."""
    engine, known = Engine.load(folder, precision="fp32", max_running=1), {}

    def result(fields):
        key = tuple(sorted(fields.items()))
        if key not in known:
            known[key] = engine.generate("a red circle", **fields).frames
        return known[key]

    yield result
    engine.close()


@pytest.fixture
def engine(folder):
    with Engine.load(folder, precision="fp32") as engine:
        yield engine


class Gate:
    """Holds the network's calls until it is opened."""

    def __init__(self, engine, monkeypatch):
        self.reached, self.opened, self.rows = threading.Event(), threading.Event(), 0
        self.inner = engine._backend.predict
        monkeypatch.setattr(engine._backend, "predict", self.predict)

    def predict(self, *args, **kwargs):
        self.reached.set()
        assert self.opened.wait(30)
        self.rows += 1
        return self.inner(*args, **kwargs)


# ---- the same bytes in any company ----------------------------------------------------------------------------------

REQUESTS = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 3),
        "num_inference_steps": st.integers(1, 4),
        "guidance_scale": st.sampled_from([1.0, 2.0, 3.5]),
        "sampler": st.sampled_from(["ddpm", "ddim", "dpmpp_2m"]),
        "num_frames": st.sampled_from([4, 8]),
        "window_overlap": st.sampled_from([0, 1, 2]),
    }
)


@settings(
    max_examples=5, deadline=None, derandomize=True, phases=[Phase.generate], suppress_health_check=list(HealthCheck)
)  # fmt: skip
@given(
    requests=st.lists(st.tuples(REQUESTS, st.sampled_from(["whole", "chunks", "cancel"])), min_size=2, max_size=4),
    capacity=st.integers(1, 4),
    max_running=st.integers(1, 4),
)
def test_bytes_do_not_depend_on_the_company(folder, alone, requests, capacity, max_running):
    with Engine.load(folder, precision="fp32", max_batch=capacity, max_running=max_running) as engine:
        jobs = []
        for number, (fields, way) in enumerate(requests):
            buffer = 1 if way == "chunks" else None
            jobs.append((engine.submit("a red circle", buffer_frames=buffer, **fields), fields, way))
            if way == "cancel":
                threading.Timer(0.01 * number, jobs[-1][0].cancel).start()
        for job, fields, way in jobs:
            if way == "chunks":
                chunks = list(job.frames())
                assert [c.start for c in chunks] == np.cumsum([0] + [len(c.frames) for c in chunks[:-1]]).tolist()
                frames = np.concatenate([c.frames for c in chunks])
            else:
                try:
                    frames = job.result(60).frames
                except Cancelled:
                    assert way == "cancel"
                    continue
            assert np.array_equal(frames, alone(fields)), (fields, way, capacity, max_running)
        wait_until(lambda: engine.metrics()["requests"]["running"] == 0)
        assert engine.metrics()["call_shapes"] == 0, "buffers of shapes that were not warmed up are freed"


def test_windows_of_several_requests_share_calls(engine):
    engine.warm_up([{"num_frames": 8, "guidance_scale": 1.0}])
    jobs = [engine.submit("x", seed=seed, guidance_scale=1.0, num_inference_steps=2 + seed) for seed in range(4)]
    for job in jobs:
        job.result(60)
    sizes = engine.metrics()["stages"]["base"]["windows_per_call"]
    assert sizes.get("2", 0) >= 4, f"one clip has one window in the base, so two are two requests: {sizes}"


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_row_of_the_demo_has_the_same_bits_with_one_thread_and_two(precision):
    """What `reproducible` stands on: a lane computes a row alone. Beside others, fp32 rows differ by their place."""
    backend = TorchBackend(load_checkpoint(find_model("demo")), choose("torch", "cpu", precision))
    generator = torch.Generator().manual_seed(0)
    for stage, shape, channels in (("base", (8, 32, 32), 7), ("ssr", (8, 64, 64), 6)):
        x = torch.randn(3, *shape, channels, generator=generator)
        times = torch.tensor([900.0, 400.0, 10.0])
        text = torch.randn(3, 24, 384, generator=generator) if stage == "base" else None
        mask = torch.arange(24)[None] < torch.tensor([[3], [24], [9]]) if stage == "base" else None
        level = torch.full((3,), 0.1) if stage == "ssr" else None

        def rows(order, num_threads, stage=stage, parts=(x, times, text, mask, level)):
            return backend.predict(stage, *(None if p is None else p[order] for p in parts), num_threads=num_threads)

        for row in range(3):
            assert torch.equal(rows([row], 1), rows([row], 2)), (stage, row)


# ---- one request's trouble is its own -------------------------------------------------------------------------------


def test_trouble_stays_with_its_request(engine, alone, monkeypatch):
    inner, lock, seen = engine._backend.predict, threading.Lock(), {"nan": 0, "error": 0}

    def predict(stage, sample, times, *args, **kwargs):
        out = inner(stage, sample, times, *args, **kwargs)
        text = args[0]
        if text is not None:
            for word, vector in vectors.items():
                if (text[0] == vector).all(-1).any():
                    with lock:
                        seen[word] += 1
                    if word == "error":
                        raise MemoryError("no room for this one")
                    return torch.full_like(out, float("nan"))
        return out

    encoder = engine._pipeline.encoder
    vectors = {word: encoder.encode([word])[0][0, 1] for word in ("nan", "error")}
    monkeypatch.setattr(engine._backend, "predict", predict)
    fields = [dict(seed=s, num_inference_steps=3, guidance_scale=2.0, sampler="ddim", num_frames=8, window_overlap=1)
              for s in range(2)]  # fmt: skip
    good = [engine.submit("a red circle", **f) for f in fields]
    wrong = engine.submit("nan", seed=1)
    failing = engine.submit("error", seed=1)
    raising = engine.submit("x", seed=1, callback_on_step_end=lambda progress: 1 / 0)
    for job, error in ((wrong, NonFiniteOutput), (failing, MemoryError), (raising, ZeroDivisionError)):
        with pytest.raises(error):
            job.result(60)
        assert job.status == "failed"
    assert all(seen.values())
    for job, f in zip(good, fields, strict=True):
        assert np.array_equal(job.result(60).frames, alone(f))
    assert engine.metrics()["requests"] == {"queued": 0, "running": 0, "completed": 2, "failed": 3, "cancelled": 0}


def test_a_slow_callback_and_a_slow_reader_slow_only_themselves(engine):
    release = threading.Event()
    slow = engine.submit("x", seed=1, callback_on_step_end=lambda progress: release.wait(30))
    unread = engine.submit("x", seed=2, buffer_frames=1)
    assert engine.submit("x", seed=3).result(20).frames.shape == (8, 32, 32, 3)
    wait_until(lambda: unread._num_waiting > 0)
    assert slow.status == unread.status == "running" and slow.progress.step == 1
    release.set()
    assert slow.result(20).frames.shape == unread.result(20).frames.shape


def test_a_long_request_does_not_starve_a_short_one(engine):
    long = engine.submit("x", seed=1, num_inference_steps=300)
    wait_until(lambda: long.progress is not None)
    begun = time.monotonic()
    engine.submit("x", seed=2, num_inference_steps=4).result(30)
    assert not long.done and long.progress.step < 150
    short = time.monotonic() - begun
    assert long.cancel() and short < 30


def test_equal_requests_get_equal_shares(engine):
    jobs = [engine.submit("x", seed=seed, num_inference_steps=100) for seed in range(3)]
    wait_until(lambda: min(job.progress.step if job.progress else 0 for job in jobs) >= 20)
    steps = [job.progress.step for job in jobs]
    assert max(steps) - min(steps) <= 3, steps
    for job in jobs:
        job.cancel()


def test_readers_of_a_kept_clip(engine, alone):
    fields = dict(seed=1, num_inference_steps=2, guidance_scale=2.0, sampler="ddim", num_frames=8, window_overlap=0)
    job, results = engine.submit("a red circle", **fields), []

    def read():
        results.append(np.concatenate([chunk.frames for chunk in job.frames()]))

    readers = [threading.Thread(target=read) for _ in range(3)]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join(30)
    read()  # again, after the end
    assert len(results) == 4 and all(np.array_equal(frames, alone(fields)) for frames in results)
    with pytest.raises(ValueError, match="read-only"):
        next(job.frames()).frames[0] = 0


def test_callback_of_a_submitted_job_has_a_thread_of_its_own(engine):
    names = set()
    engine.submit("x", seed=1, callback_on_step_end=lambda p: names.add(threading.current_thread().name)).result(30)
    assert names == {"pylumiere-callback"}


# ---- cancel, deadline, queue, closing --------------------------------------------------------------------------------


def test_cancel_frees_the_slot_while_the_call_still_runs(engine, monkeypatch):
    gate = Gate(engine, monkeypatch)
    job = engine.submit("x", seed=1)
    assert gate.reached.wait(10)
    job.cancel()
    wait_until(lambda: engine.metrics()["requests"]["running"] == 0)
    assert engine.metrics()["parts_in_flight"] == 2, "the call has not ended, the slot is free"
    gate.opened.set()
    wait_until(lambda: engine.metrics()["parts_in_flight"] == 0)
    assert gate.rows == 2


def test_embedding_prompts_holds_up_neither_a_cancel_nor_its_own(engine, monkeypatch):
    """It happens in a lane: others come, go and end meanwhile, and a job that is cancelled during it ends at once."""
    begun, go_on = threading.Event(), threading.Event()
    embed = type(engine._pipeline).embed

    def slow(pipeline, plan):
        if plan.request.prompt == "slow":
            begun.set()
            assert go_on.wait(30)
        return embed(pipeline, plan)

    monkeypatch.setattr(type(engine._pipeline), "embed", slow)
    job = engine.submit("slow", seed=1)
    assert begun.wait(30)
    other = engine.submit("another", seed=1, num_inference_steps=50)
    assert other.cancel()
    assert engine.generate("x", seed=2) is not None, "the other lane computes"
    assert job.cancel()
    until = time.monotonic() + 10
    while engine.metrics()["requests"]["running"] and time.monotonic() < until:
        time.sleep(0.005)
    assert engine.metrics()["requests"]["running"] == 0 and not go_on.is_set()
    go_on.set()
    assert engine.generate("slow", seed=3) is not None


def test_an_error_while_embedding_ends_its_own_request(engine, monkeypatch):
    embed = type(engine._pipeline).embed

    def failing(pipeline, plan):
        if plan.request.prompt == "fails":
            raise OSError("no such tokenizer")
        return embed(pipeline, plan)

    monkeypatch.setattr(type(engine._pipeline), "embed", failing)
    good, bad = engine.submit("x", seed=1), engine.submit("fails", seed=1)
    with pytest.raises(OSError, match="no such tokenizer"):
        bad.result(60)
    good.result(60)


def test_cancel_while_a_call_waits_for_its_input(engine):
    """The call has been chosen and not sent; its buffers go with the clip."""
    release, errors = threading.Event(), []

    def frames():
        for index in range(11):
            if index == 2:
                release.wait(30)
            yield np.zeros((16, 16, 3), np.uint8)

    def read():
        try:
            engine.upscale(frames(), num_frames=11).collect()
        except Cancelled as error:
            errors.append(error)

    reader = threading.Thread(target=read)
    reader.start()
    scheduler = engine._scheduler
    wait_until(lambda: any(b.call is not None and not b.call.is_sent for b in list(scheduler._buckets.values())))
    with scheduler.lock:
        (work,) = scheduler._running
    work.job.cancel()
    wait_until(lambda: engine.metrics()["call_shapes"] == 0)
    release.set()
    reader.join(30)
    assert len(errors) == 1
    assert engine.submit("x", seed=1, num_frames=2).result(30).frames.shape[0] == 2


def test_deadline_of_a_running_and_of_a_waiting_request(folder, monkeypatch):
    with Engine.load(folder, precision="fp32", max_running=1) as engine:
        gate = Gate(engine, monkeypatch)
        running = engine.submit("x", seed=1, timeout=0.2)
        waiting = engine.submit("x", seed=2, timeout=0.1)
        later = engine.submit("x", seed=3)
        for job in (waiting, running):
            with pytest.raises(DeadlineExceeded, match=r"not done in its 0\.[12] s"):
                job.result(10)
            assert job.status == "failed"
        gate.opened.set()
        assert later.result(30).frames.shape == (8, 32, 32, 3)
    for wrong in (0, -1, float("nan"), "1"):
        with pytest.raises(InvalidRequest, match="timeout="):
            engine.submit("x", timeout=wrong)


def test_the_queue_has_an_end(folder, monkeypatch):
    with Engine.load(folder, precision="fp32", max_running=1, max_queue=2) as engine:
        gate = Gate(engine, monkeypatch)
        first = engine.submit("x", seed=0)
        assert gate.reached.wait(10)
        others = [engine.submit("x", seed=seed) for seed in (1, 2)]
        assert [job.status for job in (first, *others)] == ["running", "queued", "queued"]
        with pytest.raises(QueueFull, match="2 requests wait already, and max_queue=2"):
            engine.submit("x", seed=3)
        others[0].cancel()
        wait_until(lambda: engine.metrics()["requests"]["queued"] == 1)
        engine.submit("x", seed=4).cancel()
        gate.opened.set()
        others[1].result(30)


@pytest.mark.parametrize("field", ["max_batch", "max_running", "max_queue"])
def test_wrong_limits_are_named(folder, field):
    with pytest.raises(InvalidRequest, match=f"{field}=-1 should be an integer"):
        Engine.load(folder, **{field: -1})


def test_draining(folder):
    engine = Engine.load(folder, precision="fp32", max_running=1)
    jobs = [engine.submit("x", seed=seed) for seed in range(3)]
    engine.close(drain=True)
    assert [job.status for job in jobs] == ["completed"] * 3
    with pytest.raises(RuntimeError, match="closed"):
        engine.submit("x")


def test_draining_with_an_end(folder):
    engine = Engine.load(folder, precision="fp32")
    job = engine.submit("x", seed=1, num_inference_steps=1000)
    begun = time.monotonic()
    engine.close(drain=True, timeout=0.2)
    assert job.status == "cancelled" and time.monotonic() - begun < 10


def test_a_fault_in_the_scheduler_leaves_nobody_waiting(engine, monkeypatch):
    dispatch, faults = engine._scheduler._dispatch, [ZeroDivisionError("a fault")]

    def faulty():
        if faults:
            raise faults.pop()
        dispatch()

    monkeypatch.setattr(engine._scheduler, "_dispatch", faulty)
    with pytest.raises(ZeroDivisionError):
        engine.submit("x", seed=1).result(10)
    assert engine.submit("x", seed=1).result(30).frames.shape == (8, 32, 32, 3)


def test_storm(engine):
    """Threads that submit, follow, cancel and leave; in the end nothing is left."""
    rng, errors = random.Random(0), []

    def client(number):
        try:
            for _ in range(3):
                fields = dict(seed=number, num_inference_steps=rng.randint(1, 3), num_frames=rng.choice([2, 4, 8]))
                way = rng.randrange(4)
                if way == 0:
                    assert len(engine.generate("x", **fields).frames) == fields["num_frames"]
                elif way == 1:
                    with engine.stream("x", **fields) as stream:
                        next(stream)
                elif way == 2:
                    engine.submit("x", **fields).cancel()
                else:
                    assert len(engine.submit("x", buffer_frames=2, **fields).result(60).frames) == fields["num_frames"]
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=client, args=(number,)) for number in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not errors
    wait_until(lambda: engine.metrics()["requests"]["running"] == 0 and engine.metrics()["parts_in_flight"] == 0)
    counts = engine.metrics()["requests"]
    assert counts["completed"] + counts["cancelled"] == 36 and counts["failed"] == 0


# ---- warm-up ---------------------------------------------------------------------------------------------------------

WARM_TEST = """
import ctypes, sys, threading, time
import torch
torch.set_num_threads(2)
from pylumiere.engine import Engine

def mark(text):
    ctypes.CDLL(None).fflush(None)
    print("==", text, flush=True)

with Engine.load(sys.argv[1], precision=sys.argv[2]) as engine:
    engine.warm_up([{}, {"num_frames": 4, "guidance_scale": 1.0}, {"num_frames": 20}])
    mark("warm")
    threads, buckets = set(threading.enumerate()), dict(engine._scheduler._buckets)
    jobs = [engine.submit("x", seed=seed, **fields) for seed in range(2)
            for fields in ({}, {"num_frames": 4, "guidance_scale": 1.0})]
    for job in jobs:
        job.result(60)
    assert set(threading.enumerate()) <= threads, "no thread was started"
    low = torch.zeros(11, 16, 16, 3, dtype=torch.uint8).numpy()
    for _ in range(2):  # a clip in both stages at once, and super-resolution alone: with calls of their own
        engine.generate("x", seed=1, num_frames=20)
        list(engine.upscale(low))
        stream = engine.upscale(low)
        next(stream)
        stream.close()
    deadline = time.monotonic() + 10
    while engine._scheduler._buckets != buckets and time.monotonic() < deadline:
        time.sleep(0.01)
    assert engine._scheduler._buckets == buckets and len(buckets) == 4, "no buffers were made"
    mark("new")
    engine.generate("x", seed=1, num_frames=6)
    mark("end")
"""


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_after_the_warm_up_nothing_is_prepared_any_more(folder, precision):
    """oneDNN tells of every primitive that it has to generate; a shape that was not warmed up shows that it does."""
    out = subprocess.run(
        [sys.executable, "-P", "-c", WARM_TEST, str(folder), precision], capture_output=True, text=True, timeout=200,
        env={**os.environ, "ONEDNN_VERBOSE": "profile_create"}, check=False,
    )  # fmt: skip
    assert out.returncode == 0, out.stderr
    generated, part = {"before": 0, "warm": 0, "new": 0, "end": 0}, "before"
    for line in out.stdout.splitlines():
        part = line[3:] if line.startswith("== ") else part
        generated[part] += "create:cache_miss" in line
    assert generated["before"] > 0 and generated["new"] > 0, "the test would see what it looks for"
    assert generated["warm"] == 0


def test_a_warm_up_that_fails_leaves_nothing(engine, monkeypatch):
    monkeypatch.setattr(engine._backend, "predict", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        engine.warm_up()
    assert engine.metrics()["call_shapes"] == 0 and not engine._scheduler.budget.warm
    monkeypatch.undo()
    assert engine.warm_up() > 0 and engine.metrics()["call_shapes"] == 2


# ---- budget ----------------------------------------------------------------------------------------------------------


def test_budget_adds_what_is_shared_once():
    calls = {"a": CallBytes(10, 100)}
    budget = Budget(1000, {"weights": 500})
    one, two = Need(50, calls), Need(60, calls)
    assert budget.total([]) == 500 and budget.total([one]) == 500 + 50 + 10 + 100
    assert budget.total([one, two]) == 500 + 110 + 10 + 100
    assert budget.total([one, Need(1, {"b": CallBytes(20, 300)})]) == 500 + 51 + 30 + 300
    assert budget.fits([one, two], Need(200, calls)) and not budget.fits([one, two], Need(281, calls))
    budget.warm["w"] = CallBytes(7, 0)
    assert budget.total([one]) == 667
    with pytest.raises(BudgetExceeded, match=r"=1000 bytes: 1517 are needed \(weights 500, request 1000, "):
        budget.check(Need(1000, {"x": CallBytes(10, 0)}))


@pytest.mark.parametrize(
    ("text", "count"),
    [("4GiB", 4 * 2**30), ("512 mib", 512 * 2**20), ("1.5GB", 1_500_000_000), ("7", 7), (9, 9), (None, None)],
)
def test_sizes_as_text(text, count):
    assert parse_bytes(text) == count


def test_requests_wait_until_the_budget_has_room(engine):
    engine.memory_budget = 2**40  # needs are counted where there is a budget
    request = GenerationRequest(prompt="x", seed=1, num_inference_steps=20)
    need = engine._need(engine._ordered(request)[0], request, None)
    budget = engine._scheduler.budget = Budget(2**40, {"weights": 1000})
    budget.limit = budget.total([need] * 2) + need.own // 2
    jobs, most = [engine.submit(request) for _ in range(6)], 0
    while not all(job.done for job in jobs):
        now = engine.metrics()
        most = max(most, now["requests"]["running"])
        assert now["memory"]["planned"] <= budget.limit
        time.sleep(0.001)
    assert most == 2 and engine.metrics()["requests"]["completed"] == 6
    with pytest.raises(BudgetExceeded, match="are needed"):
        engine.submit("x", height=128, width=128)


@pytest.mark.parametrize(("frames", "at_once"), [(16, 4), (80, 1)])
def test_resident_memory_stays_under_what_was_planned(frames, at_once):
    """The shipped model, in a process that has done nothing before."""
    command = [sys.executable, "benchmarks/bench_engine.py", "--memory-of", str(frames), str(at_once), "--steps", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}
    out = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert out.returncode == 0, out.stderr
    row = json.loads(out.stdout)
    assert row["loaded"] < row["peak"] < row["planned"], {name: f"{row[name] / 2**20:.0f} MiB" for name in row if
                                                         name in ("loaded", "peak", "planned")}  # fmt: skip
