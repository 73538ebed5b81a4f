"""A model of three networks: each stage gets the frames of the one before, whole or as they become final."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch
from support.testing import wait_until, with_stage, write_random_model
from support.toy import three_stages
from support.whole_clip import WholeClip, in_unit_range

from pylumiere.backends.choice import choose
from pylumiere.backends.torch import TorchBackend
from pylumiere.checkpoints.native import load_checkpoint
from pylumiere.config import WindowConfig
from pylumiere.diffusion.windows import NonFiniteOutput
from pylumiere.engine import Engine
from pylumiere.errors import BudgetExceeded, Cancelled, InvalidRequest
from pylumiere.media.video import Video, read_video
from pylumiere.request import GenerationRequest

CONFIG = three_stages()
PROMPT = "a red circle"
LOW = np.random.default_rng(0).integers(0, 256, (11, 16, 16, 3), dtype=np.uint8)


@pytest.fixture(scope="module", autouse=True)
def two_threads():
    """Two lanes, also where the environment allows one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_random_model(tmp_path_factory.mktemp("model"), CONFIG)


@pytest.fixture(scope="module")
def engine(folder):
    with Engine.load(folder, precision="fp32") as engine:
        yield engine


def oracle_of(folder, config=CONFIG, steps=None):
    checkpoint = dataclasses.replace(load_checkpoint(folder), config=config)
    return WholeClip(config, TorchBackend(checkpoint, choose("torch", "cpu", "fp32")), steps)


def is_idle(engine):
    now = engine.metrics()
    return now["requests"]["running"] == now["call_shapes"] == now["parts_in_flight"] == 0


def as_pixels(frames):
    """Pictures 0..255 as networks see them."""
    return frames.astype(np.float32) / np.float32(127.5) - np.float32(1)


# ---- the same clip as a plain loop makes -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields",
    [{}, {"num_frames": 20}, {"num_frames": 5}, {"num_frames": 1}, {"loop": True}, {"num_frames": 11, "loop": True},
     {"height": 64, "width": 96}],
    ids=["one window", "long", "short", "one frame", "loop", "long loop", "size"],
)  # fmt: skip
@torch.inference_mode()
def test_a_clip_is_that_of_a_plain_loop_to_the_bit(engine, folder, fields):
    expected = in_unit_range(oracle_of(folder).make(PROMPT, 7, **{"num_frames": 8, **fields}))
    result = engine.generate(PROMPT, seed=7, output_type="float", **fields)
    assert np.array_equal(result.frames, expected)
    streamed = np.concatenate([c.frames for c in engine.stream(PROMPT, seed=7, output_type="float", **fields)])
    assert np.array_equal(streamed, expected)


@pytest.mark.parametrize("guidance", [2.0, 1.0])
@torch.inference_mode()
def test_a_later_stage_is_guided_by_the_prompt_too(tmp_path, guidance):
    """Also where the first one is not."""
    config = three_stages(reads_text=True)
    folder = write_random_model(tmp_path, config)
    expected = oracle_of(folder, config).make(PROMPT, 7, 8, negative="blue", guidance=guidance)
    with Engine.load(folder, precision="fp32") as engine:
        result = engine.generate(PROMPT, seed=7, negative_prompt="blue", guidance_scale=guidance, output_type="float")
        assert np.array_equal(result.frames, in_unit_range(expected))
        other = engine.generate(PROMPT, seed=7, guidance_scale=guidance, output_type="float")
        assert not np.array_equal(other.frames, result.frames)
        with pytest.raises(InvalidRequest, match="its super-resolution stage needs a prompt"):
            engine.upscale(LOW)


@pytest.mark.parametrize(
    ("middle", "last"),
    [(WindowConfig(4, 2), WindowConfig(8, 4)), (WindowConfig(2, 1), WindowConfig(16, 8)), (WindowConfig(8, 0), None),
     (WindowConfig(4, 1, halo=2, weights="linear"), WindowConfig(2, 0))],
    ids=["both stream", "long after short", "the last one whole", "halo"],
)  # fmt: skip
@pytest.mark.parametrize("num_frames", [8, 30])
@torch.inference_mode()
def test_windows_of_every_kind_follow_each_other(folder, middle, last, num_frames):
    config = with_stage(with_stage(CONFIG, "middle", windows=middle), "last", windows=last)
    if last is None:
        network = dataclasses.replace(CONFIG.last.network, num_frames=32)
        config = with_stage(config, "last", network=network)
    expected = in_unit_range(oracle_of(folder, config).make(PROMPT, 7, num_frames))
    checkpoint = dataclasses.replace(load_checkpoint(folder), config=config)
    with Engine(checkpoint, choose("torch", "cpu", "fp32")) as engine:
        chunks = [c.frames for c in engine.stream(PROMPT, seed=7, num_frames=num_frames, output_type="float")]
        assert np.array_equal(np.concatenate(chunks), expected)
        wait_until(lambda: is_idle(engine))


# ---- super-resolution alone ------------------------------------------------------------------------------------------


@torch.inference_mode()
def test_upscale_runs_both_later_stages_whether_the_length_is_known_or_not(engine, folder):
    expected = in_unit_range(oracle_of(folder).enlarge(as_pixels(LOW), 5))
    for frames, options in ((LOW, {"num_frames": 11}), (iter(LOW), {}), ([LOW[:4], LOW[4:]], {})):
        result = engine.upscale(frames, seed=5, output_type="float", **options).collect()
        assert result.frames.shape == (11, 64, 64, 3) and np.array_equal(result.frames, expected)
        assert result.metadata["seconds"].keys() >= {"last", "total"}
    steps = in_unit_range(oracle_of(folder, steps=1).enlarge(as_pixels(LOW), 5))
    one = engine.upscale(iter(LOW), seed=5, num_inference_steps=1, output_type="float").collect()
    assert np.array_equal(one.frames, steps) and not np.array_equal(steps, expected)
    looped = in_unit_range(oracle_of(folder).enlarge(as_pixels(LOW), 5, loop=True))
    loop = engine.upscale(LOW, seed=5, num_frames=11, loop=True, output_type="float").collect()
    assert np.array_equal(loop.frames, looped)


def test_upscale_of_short_clips(engine):
    for count in (1, 2, 4, 8, 9):
        known = engine.upscale(LOW[:count], num_frames=count).collect().frames
        assert len(known) == count
        assert np.array_equal(engine.upscale(iter(LOW[:count])).collect().frames, known)


def test_upscale_of_an_endless_video_reads_no_further_than_it_must(engine):
    read = []

    def endless():
        for index in itertools.count():
            read.append(index)
            yield LOW[index % 11]

    with engine.upscale(endless()) as stream:
        ahead = [len(read) - chunk.start - len(chunk.frames) for chunk in itertools.islice(stream, 160)]
    assert max(ahead[80:]) <= max(ahead[:80]) <= 80, ahead
    wait_until(lambda: is_idle(engine))


@pytest.mark.parametrize("size", [(15, 17), (1, 1), (3, 30)])
def test_upscale_takes_any_size(engine, size):
    frames = LOW[:5, : size[0], :1].repeat(size[1], 2)
    result = engine.upscale(frames, num_frames=5).collect()
    assert result.frames.shape == (5, 4 * size[0], 4 * size[1], 3)


def test_a_video_that_breaks_midway_keeps_what_was_delivered(engine):
    def frames():
        yield from LOW.repeat(4, 0)
        raise OSError("the disk is gone")

    whole = engine.upscale(iter(LOW.repeat(4, 0))).collect().frames
    delivered = []
    with pytest.raises(OSError, match="disk"):
        for chunk in engine.upscale(frames()):
            delivered.append(chunk.frames)
    kept = np.concatenate(delivered)
    assert 0 < len(kept) < 44 and np.array_equal(kept, whole[: len(kept)])
    wait_until(lambda: is_idle(engine))


def test_frames_that_are_too_large_for_all_stages_together(engine):
    with pytest.raises(InvalidRequest, match=r"2049 x 1 .* too large: at most 2048 a side"):
        engine.upscale([np.zeros((2049, 1, 3), np.uint8)]).collect()


# ---- while it runs ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_frames", [8, 60])
def test_each_stage_reports_and_ends_complete(engine, num_frames):
    seen = []
    job = engine.submit(PROMPT, seed=7, num_frames=num_frames, callback_on_step_end=seen.append)
    assert job.result(60).metadata["seconds"].keys() >= {"text", "base", "middle", "last", "total"}
    for stage, steps in (("base", 4), ("middle", 2), ("last", 2)):
        reports = [p for p in seen if p.stage == stage]
        assert {(p.steps, p.num_frames) for p in reports} == {(steps, num_frames)}
        for name in ("step", "frames_final"):
            values = [getattr(p, name) for p in reports]
            assert values == sorted(values), (stage, name)
        assert (reports[-1].step, reports[-1].frames_final, reports[-1].seconds_left) == (steps, num_frames, 0)
    order = list(dict.fromkeys(p.stage for p in seen))
    assert order == ["base", "middle", "last"]
    places = {stage: [i for i, p in enumerate(seen) if p.stage == stage] for stage in order}
    assert (places["last"][0] < places["base"][-1]) == (num_frames == 60), "a long clip is in all stages at once"


@pytest.mark.parametrize("stage", ["base", "middle", "last"])
@pytest.mark.parametrize("num_frames", [8, 40])
def test_cancel_in_every_stage_leaves_nothing(engine, monkeypatch, stage, num_frames):
    expected = engine.generate(PROMPT, seed=7).frames
    predict, reached, opened = engine._backend.predict, threading.Event(), threading.Event()

    def held(name, *arguments, **options):
        if name == stage and not reached.is_set():
            reached.set()
            assert opened.wait(30)
        return predict(name, *arguments, **options)

    monkeypatch.setattr(engine._backend, "predict", held)
    job = engine.submit(PROMPT, seed=7, num_frames=num_frames)
    assert reached.wait(30) and job.cancel()
    with pytest.raises(Cancelled):
        job.result(0)
    opened.set()
    wait_until(lambda: is_idle(engine))
    assert np.array_equal(engine.generate(PROMPT, seed=7).frames, expected)


@pytest.mark.parametrize("stage", ["base", "middle", "last"])
def test_nan_names_the_stage(engine, monkeypatch, stage):
    predict = engine._backend.predict

    def wrong(name, *arguments, **options):
        out = predict(name, *arguments, **options)
        return torch.full_like(out, torch.nan) if name == stage else out

    monkeypatch.setattr(engine._backend, "predict", wrong)
    with pytest.raises(NonFiniteOutput, match=f"the {stage} network gave NaN or infinity at step 1 of"):
        engine.generate(PROMPT, seed=7, num_frames=20)
    wait_until(lambda: is_idle(engine))


def test_many_at_once_get_their_own_bytes(engine):
    fields = [dict(seed=seed, num_frames=(8, 20, 3)[seed % 3]) for seed in range(6)]
    alone = [engine.generate(PROMPT, **f).frames for f in fields]
    jobs = [engine.submit(PROMPT, buffer_frames=(None, 2)[f["seed"] % 2], **f) for f in fields]
    for frames, job in zip(alone, jobs, strict=True):
        assert np.array_equal(job.result(60).frames, frames)
    wait_until(lambda: is_idle(engine))


def test_a_stream_that_waits_for_its_reader_stops_all_stages(engine, monkeypatch):
    calls, predict = [], engine._backend.predict
    monkeypatch.setattr(engine._backend, "predict", lambda *a, **o: (calls.append(a[0]), predict(*a, **o))[1])

    def rests():
        before = len(calls)
        time.sleep(0.5)
        return len(calls) == before and engine.metrics()["parts_in_flight"] == 0

    with engine.stream(PROMPT, seed=7, num_frames=400) as stream:
        next(stream)
        wait_until(rests, 60)
        assert {stage: calls.count(stage) > 0 for stage in ("base", "middle", "last")} == dict.fromkeys(
            ("base", "middle", "last"), True
        )
        assert calls.count("base") < 300 and calls.count("middle") < 60 and calls.count("last") < 20
    wait_until(lambda: is_idle(engine))


def test_a_warm_engine_makes_no_more_buffers(folder):
    with Engine.load(folder, precision="fp32") as engine:
        engine.warm_up([{}, {"num_frames": 20}])
        buckets = dict(engine._scheduler._buckets)
        owners = {stage: sorted(shape.owner for shape in buckets if shape.stage == stage) for stage in CONFIG.networks}
        assert owners == {"base": [0], "middle": [-1, 0], "last": [-1, 0]}
        for fields in ({}, {"num_frames": 20}, {}):
            engine.generate(PROMPT, seed=1, **fields)
        wait_until(lambda: engine._scheduler._buckets == buckets)


def test_the_budget_counts_every_stage_and_clips_that_are_handed_on(folder):
    frame = 4 * 3 * 16 * 16  # bytes, of the base
    with Engine.load(folder, precision="fp32", memory_budget=2**40) as engine:

        def need(**fields):
            request = GenerationRequest(prompt=PROMPT, seed=1, **fields)
            return engine._need(engine._ordered(request)[0], request, None)

        assert {shape.stage for shape in need().calls} == {"base", "middle", "last"}
        kept = 8 * 3 * 64 * 64
        assert need().own >= 2 * 8 * 4 * frame + kept, "the middle stage's clip goes on as a whole, in two copies"
        engine._scheduler.budget.limit = 10**6
        with pytest.raises(BudgetExceeded, match=r"base \d+, middle \d+, last \d+\)"):
            engine.generate(PROMPT)


# ---- from outside ----------------------------------------------------------------------------------------------------


def run(*arguments, folder):
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}
    command = [sys.executable, "-P", "-m", "pylumiere.cli", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, env=environment, timeout=200, check=False)


@pytest.mark.parametrize("num_frames", [8, 20])
def test_the_command_line_writes_the_same_frames(engine, folder, tmp_path, num_frames):
    expected = engine.generate(PROMPT, seed=7, num_frames=num_frames).frames
    common = ["generate", PROMPT, "--model", str(folder), "--precision", "fp32", "--seed", "7", "--frames",
              str(num_frames)]  # fmt: skip
    for name, more in (("whole", []), ("streamed", ["--stream"])):
        done = run(*common, *more, "-o", name, "--json", folder=tmp_path)
        assert done.returncode == 0 and done.stderr == b"", done.stderr
        assert json.loads(done.stdout)["seconds"]["middle"] >= 0
        assert np.array_equal(read_video(tmp_path / name).frames, expected)


def test_the_command_line_upscales_by_both_stages(engine, folder, tmp_path):
    Video(LOW, 16).save(tmp_path / "low")
    done = run(
        "upscale", "low", "--model", str(folder), "--precision", "fp32", "--seed", "5", "-o", "high", folder=tmp_path
    )
    assert done.returncode == 0, done.stderr
    expected = engine.upscale(LOW, seed=5).collect().frames
    assert np.array_equal(read_video(tmp_path / "high").frames, expected)
