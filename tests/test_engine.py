"""The engine: one result however it is asked for, prompt cancelling, and errors that reach the caller."""

from __future__ import annotations

import asyncio
import dataclasses
import gc
import itertools
import json
import subprocess
import sys
import threading
import time
import weakref

import numpy as np
import pytest
import torch
from PIL import Image
from support.testing import write_random_model

import pylumiere
from pylumiere.backends.choice import bf16_units, choose
from pylumiere.diffusion.windows import NonFiniteOutput
from pylumiere.engine import Engine
from pylumiere.errors import BudgetExceeded, BundleError, Cancelled, InvalidRequest, UnsupportedDevice
from pylumiere.networks.stunet.presets import model_preset
from pylumiere.request import GenerationRequest
from pylumiere.scheduling.memory import LIBRARY_BYTES, resident_bytes

CONFIG = model_preset("tiny")
BASE_ROWS = 4 * 2  # rows of a default clip that the networks compute: base steps, with the prompt and without
TASKS = BASE_ROWS + 3 * 2  # and windows (at 0, 3 and 4) x SSR steps


@pytest.fixture(scope="module", autouse=True)
def two_threads():
    """Two lanes, also where the environment allows one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_random_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def engine(folder):
    with Engine.load(folder, precision="fp32") as engine:
        yield engine


@pytest.fixture
def video(engine):
    return engine.generate("a red circle", seed=7)


class Calls:
    """Stands between an engine and its backend: counts the rows that are computed, and acts at one of them."""

    def __init__(self, engine, monkeypatch):
        self.count, self.actions, self.lock = 0, {}, threading.Lock()
        self.inner = engine._backend.predict
        monkeypatch.setattr(engine._backend, "predict", self.predict)

    def predict(self, *args, **kwargs):
        with self.lock:
            self.count += len(args[1])
            count = self.count
        out = self.inner(*args, **kwargs)
        action = self.actions.get(count)
        return out if action is None else action(out)


@pytest.fixture
def calls(engine, monkeypatch):
    return Calls(engine, monkeypatch)


def no_threads_left():
    return not [t for t in threading.enumerate() if t.name.startswith("pylumiere-producer")]


# ---- generate and stream --------------------------------------------------------------------------------------------


def test_generate(video):
    assert video.frames.shape == (8, 32, 32, 3) and video.frames.dtype == np.uint8 and video.fps == 16
    assert video.frames.std() > 10
    facts = json.loads(json.dumps(video.metadata))
    assert facts["seed"] == 7 and facts["prompt"] == "a red circle" and facts["sampler"] == "dpmpp_2m"
    assert facts["num_inference_steps"] == 4 and facts["guidance_scale"] == 2.0 and facts["backend"] == "torch"
    assert facts["seconds"].keys() == {"text", "base", "ssr", "total"} and facts["first_frame_seconds"] > 0


def test_same_seed_same_bytes_in_every_way(engine, folder, video):
    assert engine.generate(GenerationRequest(prompt="a red circle", seed=7)).frames.tobytes() == video.frames.tobytes()
    streamed = list(engine.stream("a red circle", seed=7))
    assert [c.start for c in streamed] == np.cumsum([0] + [len(c.frames) for c in streamed[:-1]]).tolist()
    assert np.concatenate([c.frames for c in streamed]).tobytes() == video.frames.tobytes()
    assert engine.submit("a red circle", seed=7).result(60).frames.tobytes() == video.frames.tobytes()
    again = Engine.load(folder, precision="fp32")
    assert again.generate("a red circle", seed=7).frames.tobytes() == video.frames.tobytes()


def test_everything_asked_for_matters(engine, video):
    for fields in ({"seed": 8}, {"prompt": "a blue square"}, {"negative_prompt": "x"}, {"guidance_scale": 1.5},
                   {"num_inference_steps": 3}, {"sampler": "ddim"}, {"window_overlap": 2},
                   {"image": np.full((16, 16, 3), 200, np.uint8)}):  # fmt: skip
        other = engine.generate(**{"prompt": "a red circle", "seed": 7, **fields})
        assert not np.array_equal(other.frames, video.frames), fields


def test_float_output_is_the_same_picture(engine, video):
    frames = engine.generate("a red circle", seed=7, output_type="float").frames
    assert frames.dtype == np.float32 and frames.min() >= 0 and frames.max() <= 1
    assert np.abs(frames * 255 - video.frames).max() <= 0.5001


def test_a_request_can_be_changed_by_fields(engine):
    request = GenerationRequest(prompt="a red circle", seed=7, num_frames=4)
    changed = engine.stream(request, num_frames=6)
    assert changed.num_frames == 6 and changed.seed == 7
    with pytest.raises(InvalidRequest, match="height=30"):
        engine.stream(request, height=30)


def test_threads_share_an_engine(engine, video):
    results = {}

    def work(seed):
        results[seed] = engine.generate("a red circle", seed=seed).frames

    threads = [threading.Thread(target=work, args=(seed,)) for seed in (7, 8, 9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results[7].tobytes() == video.frames.tobytes()
    assert results[8].tobytes() == engine.generate("a red circle", seed=8).frames.tobytes()


def test_frames_come_before_the_work_is_done(engine, calls):
    stream = engine.stream("a red circle", seed=7)
    assert calls.count == 0, "nothing runs before frames are asked for"
    chunk = next(stream)
    assert chunk.start == 0 and calls.count > BASE_ROWS
    time.sleep(0.2)
    assert calls.count < TASKS, "the work waits for its reader"
    stream.close()
    done = calls.count
    time.sleep(0.05)
    assert list(stream) == [] and calls.count == done


def test_leaving_a_stream_stops_it(engine, calls):
    with engine.stream("a red circle", seed=7) as stream:
        for _ in stream:
            break
    time.sleep(0.1)
    done = calls.count
    assert done < TASKS
    time.sleep(0.1)
    assert calls.count == done and no_threads_left()


def test_callback_sees_every_call_in_this_thread(engine):
    seen = []
    engine.generate("x", seed=1, callback_on_step_end=lambda p: seen.append((p, threading.get_ident())))
    assert {ident for _, ident in seen} == {threading.get_ident()}
    progress = [p for p, _ in seen]
    assert [p.stage for p in progress[:4]] == ["base"] * 4 and {p.stage for p in progress[4:]} == {"ssr"}
    assert 3 <= len(progress[4:]) <= 6, "windows may share a call"
    assert [p.step for p in progress[:4]] == [1, 2, 3, 4] and progress[0].steps == 4
    assert progress[-1].frames_final == progress[-1].num_frames == 8


def test_progress_only_grows_and_ends_complete(engine):
    """20 frames: the base has several windows, so both stages run at once."""

    def calls():
        return sum(stage["calls"] for stage in engine.metrics()["stages"].values())

    for num_frames in (8, 20):
        seen, before = [], calls()
        job = engine.submit("x", seed=1, num_frames=num_frames, callback_on_step_end=lambda p, to=seen: to.append(p))
        assert job.progress is None or job.progress.step <= 4
        job.result(60)
        assert job.progress is seen[-1] and job.progress.stage == "ssr"
        assert len(seen) == calls() - before, "one report of each call"
        for stage, steps in (("base", 4), ("ssr", 2)):
            reports = [p for p in seen if p.stage == stage]
            assert {(p.steps, p.num_frames) for p in reports} == {(steps, num_frames)}
            for name in ("step", "frames_final"):
                values = [getattr(p, name) for p in reports]
                assert values == sorted(values), (stage, name)
            assert all(p.seconds_left > 0 for p in reports[:-1])
            last = reports[-1]
            assert (last.step, last.frames_final, last.seconds_left) == (steps, num_frames, 0)
        early = next(p for p in seen if p.stage == "ssr")
        assert early.frames_final < num_frames and early.step < early.steps


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
def test_what_a_callback_raises_ends_the_work(engine, calls, error):
    def callback(progress):
        if progress.stage == "ssr":
            raise error

    with pytest.raises(error):
        engine.generate("x", callback_on_step_end=callback)
    assert BASE_ROWS < calls.count <= BASE_ROWS + 2, "nothing goes on while the callback runs"


def test_nan_names_stage_step_and_window(engine, calls):
    calls.actions[3] = lambda out: torch.full_like(out, float("nan"))
    with pytest.raises(NonFiniteOutput, match="the base network gave NaN or infinity at step 2 of 4, window 0"):
        engine.generate("x", seed=1)


def test_nan_in_the_ssr_leaves_delivered_frames_delivered(engine, video, calls):
    calls.actions[TASKS - 1] = lambda out: torch.where(torch.arange(4).view(1, 4, 1, 1, 1) == 2, float("inf"), out)
    delivered = []
    with pytest.raises(NonFiniteOutput, match=r"the ssr network gave NaN or infinity at step 2 of 2, window [12]"):
        for chunk in engine.stream("a red circle", seed=7):
            delivered.append(chunk.frames)
    frames = np.concatenate(delivered)
    assert 0 < len(frames) < 8 and np.array_equal(frames, video.frames[: len(frames)])


# ---- jobs -----------------------------------------------------------------------------------------------------------


class Gate:
    """Holds the network at one of its calls until it is opened."""

    def __init__(self, calls, call):
        self.reached, self.opened = threading.Event(), threading.Event()
        calls.actions[call] = self

    def __call__(self, out):
        self.reached.set()
        assert self.opened.wait(30)
        return out


def test_job_cancel_stops_within_one_call(engine, calls):
    gate = Gate(calls, 5)
    job = engine.submit("a red circle", seed=7)
    assert gate.reached.wait(30) and not job.done and job.status == "running"
    assert job.progress.stage == "base" and job.progress.step == 2
    assert job.cancel()
    with pytest.raises(Cancelled, match="after 0 final frames"):
        job.result(0)
    gate.opened.set()
    engine.generate("b", seed=1, num_frames=2)
    assert calls.count == 6 + 4 * 2 + 2 and job.done and job.status == "cancelled" and not job.cancel()


def test_job_that_waits_is_cancelled_at_once(engine, calls):
    gate = Gate(calls, 1)
    running = engine.submit("a", seed=1)
    assert gate.reached.wait(30)
    waiting = engine.submit("b", seed=2)
    assert waiting.cancel() and waiting.done and waiting.progress is None
    with pytest.raises(Cancelled, match="before it started"):
        waiting.result(0)
    with pytest.raises(TimeoutError, match=r"not done after 0\.01 s"):
        running.result(0.01)
    gate.opened.set()
    assert running.result(30).frames.shape == (8, 32, 32, 3)
    assert calls.count == TASKS


def test_job_errors_reach_the_caller(engine, calls):
    with pytest.raises(InvalidRequest, match="height=30"):
        engine.submit("x", height=30)
    calls.actions[1] = lambda out: torch.full_like(out, float("nan"))
    with pytest.raises(NonFiniteOutput):
        engine.submit("x").result(30)
    job = engine.submit("x", callback_on_step_end=lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        job.result(30)
    assert engine.submit("x", seed=1).result(30).frames.shape == (8, 32, 32, 3), "the thread lives on"


def test_jobs_are_awaitable(engine, video):
    async def main():
        both = await asyncio.gather(engine.submit("a red circle", seed=7), engine.submit("b", seed=1))
        return both[0]

    assert asyncio.run(main()).frames.tobytes() == video.frames.tobytes()


def test_cancelling_the_task_cancels_the_job(engine, calls):
    gate = Gate(calls, 2)

    async def main():
        job = engine.submit("a", seed=1)
        task = asyncio.ensure_future(job._wait())
        await asyncio.to_thread(gate.reached.wait, 30)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return job

    job = asyncio.run(main())
    gate.opened.set()
    with pytest.raises(Cancelled):
        job.result(30)
    assert calls.count == 2


def test_closing_an_engine_cancels_its_jobs(folder, monkeypatch):
    engine = Engine.load(folder, precision="fp32")
    calls = Calls(engine, monkeypatch)
    gate = Gate(calls, 1)
    jobs = [engine.submit("a", seed=1), engine.submit("b", seed=2)]
    assert gate.reached.wait(30)
    threading.Timer(0.05, gate.opened.set).start()
    engine.close()
    for job in jobs:
        with pytest.raises(Cancelled):
            job.result(0)
    assert calls.count <= 2
    with pytest.raises(RuntimeError, match="closed"):
        engine.submit("c")


def test_an_engine_that_is_dropped_takes_its_thread_along(folder):
    before = set(threading.enumerate())
    engine = Engine.load(folder, precision="fp32")
    job = engine.submit("a", seed=1, num_frames=2)
    reference = weakref.ref(engine)
    del engine
    assert job.result(30).frames.shape[0] == 2, "a job keeps its engine"
    for _ in range(100):
        gc.collect()
        if reference() is None and set(threading.enumerate()) <= before:
            break
        time.sleep(0.05)
    assert reference() is None and set(threading.enumerate()) <= before


# ---- upscale --------------------------------------------------------------------------------------------------------

LOW = np.random.default_rng(0).integers(0, 256, (11, 16, 16, 3), dtype=np.uint8)


def test_upscale_gives_one_result_for_every_kind_of_input(engine):
    expected = engine.upscale(LOW, num_frames=11).collect()
    assert expected.frames.shape == (11, 32, 32, 3) and expected.metadata["num_frames"] == 11
    for frames in (iter(LOW), [LOW[:4], LOW[4:]], LOW.astype(np.float64) / 255):
        assert np.array_equal(engine.upscale(frames).collect().frames, expected.frames)
    assert not np.array_equal(engine.upscale(LOW, seed=1).collect().frames, expected.frames)
    assert not np.array_equal(engine.upscale(LOW, loop=True, num_frames=11).collect().frames, expected.frames)


def test_upscale_takes_tensors_and_pillow_images(engine):
    expected = engine.upscale(LOW[:5], num_frames=5).collect().frames
    for frames in (torch.from_numpy(LOW[:5]), [Image.fromarray(frame) for frame in LOW[:5]]):
        assert np.array_equal(engine.upscale(frames, num_frames=5).collect().frames, expected)
    shades = torch.linspace(0, 1, 5 * 16 * 16 * 3).reshape(5, 16, 16, 3).bfloat16()
    expected = engine.upscale(shades.float().numpy()).collect().frames
    assert np.array_equal(engine.upscale(shades.requires_grad_()).collect().frames, expected)


def test_upscale_gives_the_same_bytes_whatever_ran_before(folder):
    """Of torch's own operators, bilinear interpolation is rounded in another way by another number of threads."""
    frames, results = np.random.default_rng(1).random((4, 32, 48, 3)), []
    for first in (None, "a red circle"):
        torch.set_num_threads(2)  # what the last engine's lanes set is not in the way
        with Engine.load(folder, precision="fp32") as engine:
            if first:
                engine.generate(first, num_frames=2, num_inference_steps=1)
            results.append(engine.upscale(frames, output_type="float").collect().frames)
    assert np.array_equal(*results)


def test_upscale_reads_no_further_than_it_must(engine):
    read = []

    def endless():
        for index in itertools.count():
            read.append(index)
            yield LOW[index % 11]

    with engine.upscale(endless(), fps=24) as stream:
        assert stream.num_frames is None and stream.fps == 24
        ahead = []
        for chunk in itertools.islice(stream, 30):
            ahead.append(len(read) - chunk.start - len(chunk.frames))
    assert max(ahead[3:]) <= 16 and max(ahead[15:]) == max(ahead[5:15]), ahead


@pytest.mark.parametrize("size", [(15, 17), (1, 1), (3, 30)])
def test_upscale_takes_any_size(engine, size):
    frames = LOW[:5, : size[0], :1].repeat(size[1], 2)
    result = engine.upscale(frames, num_frames=5).collect()
    assert result.frames.shape == (5, 2 * size[0], 2 * size[1], 3)
    assert (result.metadata["height"], result.metadata["width"]) == result.frames.shape[1:3]


def test_upscale_of_short_clips(engine):
    for count in (1, 2, 4, 5):
        known = engine.upscale(LOW[:count], num_frames=count).collect().frames
        assert len(known) == count
        assert np.array_equal(engine.upscale(iter(LOW[:count])).collect().frames, known)


@pytest.mark.parametrize(
    ("frames", "options", "message"),
    [
        ([], {}, "the input holds no frames"),
        (LOW, {"num_frames": 12}, "the input ended after 11 of 12 frames"),
        (LOW, {"loop": True}, "loop=True needs num_frames"),
        (LOW, {"window_frames": 3, "window_overlap": 3}, "window_overlap=3 should be smaller"),
        (LOW, {"num_inference_steps": 0}, "num_inference_steps=0"),
        (LOW, {"fps": -1}, "fps=-1"),
        (LOW, {"seed": -1}, "seed=-1"),
        ([np.zeros((4, 4), np.uint8)], {}, r"frame 0 has shape \[4, 4\]"),
        ([np.zeros((4, 4, 3), np.int32)], {}, "frame 0 is int32"),
        ([np.full((4, 4, 3), 300.0)], {}, r"floats should lie in 0\.\.1; found 300"),
        ([np.zeros((5000, 1, 3), np.uint8)], {}, "5000 x 1 .* too large: at most 4096"),
    ],
)
def test_upscale_refuses(engine, frames, options, message):
    with pytest.raises(InvalidRequest, match=message):
        engine.upscale(frames, **options).collect()


@pytest.mark.parametrize("end", ["size", "error"])
def test_a_video_that_breaks_midway_keeps_what_was_delivered(engine, end):
    def frames():
        yield from LOW.repeat(2, 0)
        if end == "error":
            raise OSError("the disk is gone")
        yield LOW[0, :8]

    whole = engine.upscale(LOW.repeat(2, 0)).collect().frames
    delivered = []
    expected = (
        pytest.raises(OSError, match="disk")
        if end == "error"
        else pytest.raises(InvalidRequest, match="frame 22 is 8 x 16")
    )
    with expected:
        for chunk in engine.upscale(frames()):
            delivered.append(chunk.frames)
    kept = np.concatenate(delivered)
    assert 0 < len(kept) < 22 and np.array_equal(kept, whole[: len(kept)])


def test_model_without_ssr(tmp_path):
    config = dataclasses.replace(CONFIG, stages=CONFIG.stages[:1])
    engine = Engine.load(write_random_model(tmp_path, config))
    assert engine.scale == 1 and list(engine.info()["stages"]) == ["base"] and engine.info()["decoder"] is None
    assert engine.generate("x", seed=1).frames.shape == (8, 16, 16, 3)
    with pytest.raises(InvalidRequest, match="has no super-resolution stage"):
        engine.upscale(LOW)


# ---- loading --------------------------------------------------------------------------------------------------------


def test_public_names():
    assert pylumiere.Engine is Engine and pylumiere.GenerationRequest is GenerationRequest


def test_info_is_json_and_says_why(folder):
    engine = Engine.load(folder)
    info = json.loads(json.dumps(engine.info()))
    assert info["model"] == "tiny" and info["device"] == "cpu" and info["backend"] == "torch" and info["reproducible"]
    assert info["precision"] == ("bf16" if bf16_units() else "fp32")
    for word in ("device cpu: ", "backend torch: triton cannot be used (it needs an NVIDIA GPU)", "precision "):
        assert word in info["reason"]
    assert info["weight_bytes"] == info["parameters"] * (2 if info["precision"] == "bf16" else 4)
    assert info["versions"]["torch"] == torch.__version__


@pytest.mark.parametrize(
    ("wish", "message"),
    [
        ({"device": "cuda"}, "device 'cuda' cannot be used: .*; use device='cpu'"),
        ({"device": "tpu"}, "device 'tpu' is unknown; allowed: auto, cpu, cuda"),
        ({"device": "mps"}, "device 'mps' is unknown"),
        (
            {"backend": "triton", "device": "cpu"},
            "backend 'triton' cannot run: it needs an NVIDIA GPU; use backend='torch'",
        ),
        ({"backend": "tensorrt"}, "backend 'tensorrt' cannot run a model folder, only a bundle"),
        ({"backend": "jax"}, "backend 'jax' is not part of this version; allowed: auto, torch, triton"),
        (
            {"precision": "fp16", "device": "cpu"},
            "precision 'fp16' cannot run on the CPU; use precision='bf16' or 'fp32'",
        ),
        ({"precision": "int8"}, "precision 'int8' is unknown"),
    ],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="says what a machine without a GPU refuses")
def test_what_cannot_run_is_refused_with_a_remedy(folder, wish, message):
    with pytest.raises(UnsupportedDevice, match=message):
        Engine.load(folder, **wish)


def test_long_names_of_precisions():
    assert choose("torch", "cpu", "bfloat16").precision == "bf16"


def test_bf16_is_close_to_fp32(folder, video):
    frames = Engine.load(folder, precision="bf16").generate("a red circle", seed=7).frames
    assert np.abs(frames.astype(int) - video.frames).mean() < 12 and not np.array_equal(frames, video.frames)


def test_sources_that_are_no_model(tmp_path):
    with pytest.raises(BundleError, match="does not exist"):
        Engine.load(tmp_path / "nothing")
    with pytest.raises(BundleError, match=r"config\.json cannot be read"):
        Engine.load(tmp_path)


def test_budget(folder):
    with pytest.raises(BudgetExceeded, match=r"memory_budget=1000 bytes: \d+ are needed \(weights \d+, process \d+\)"):
        Engine.load(folder, memory_budget=1000)
    engine = Engine.load(folder, precision="fp32", memory_budget=resident_bytes() + LIBRARY_BYTES + 80 * 2**20)
    engine.generate("x", num_frames=2)
    with pytest.raises(BudgetExceeded, match=r"weights \d+, process \d+, request \d+, base \d+, ssr \d+"):
        engine.stream("x", height=128, width=128)
    with pytest.raises(BudgetExceeded, match="ssr"):
        engine.submit("x", height=128, width=128)
    with pytest.raises(BudgetExceeded, match="ssr"):
        engine.upscale(np.zeros((4, 200, 200, 3), np.uint8)).collect()
    for wrong in (0, -5, True, "4 apples", "0"):
        with pytest.raises(InvalidRequest, match="memory_budget="):
            Engine.load(folder, memory_budget=wrong)


def test_a_cpu_engine_needs_no_triton(folder):
    """The CPU build of torch brings none, and `make demo` installs none."""
    code = (
        "import sys; from pylumiere.engine import Engine; "
        f"Engine.load({str(folder)!r}).generate('x', num_inference_steps=1); sys.exit('triton' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-P", "-c", code], check=False).returncode == 0
