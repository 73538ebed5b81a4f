"""A model whose stage makes latents: the decoder is a stage like others, however a clip is asked for."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from support.testing import wait_until, write_random_model
from support.toy import latent_model
from support.whole_clip import WholeClip, decoded, in_unit_range

from pylumiere.backends.choice import choose
from pylumiere.backends.torch import TorchBackend
from pylumiere.checkpoints.native import load_checkpoint
from pylumiere.cli import main
from pylumiere.diffusion.windows import NonFiniteOutput
from pylumiere.engine import Engine
from pylumiere.errors import BudgetExceeded, BundleError, Cancelled, DeadlineExceeded, InvalidRequest
from pylumiere.media.video import Video, read_video
from pylumiere.request import GenerationRequest
from pylumiere.scheduling.memory import Budget

CONFIG = latent_model()
STEPS = 4  # of a default clip, in one window of 8 frames
SHAPE = (8, 32, 32, 3)
PROMPT = "a red circle"


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


@pytest.fixture(scope="module")
def checkpoint(folder):
    return load_checkpoint(folder)


@pytest.fixture(scope="module")
def frames(engine):
    """Of the default clip with seed 7."""
    return engine.generate(PROMPT, seed=7).frames


class Calls:
    """Stands between an engine and its backend: counts the frames that are decoded, and acts at one of them."""

    def __init__(self, engine, monkeypatch):
        self.count, self.actions, self.lock = 0, {}, threading.Lock()
        self.inner = engine._backend.decode
        monkeypatch.setattr(engine._backend, "decode", self.decode)

    def decode(self, latents, **options):
        with self.lock:
            self.count += latents.shape[1]
            count = self.count
        out = self.inner(latents, **options)
        return self.actions.get(count, lambda out: out)(out)


class Gate:
    """Holds the decoder at one of its frames until it is opened."""

    def __init__(self, calls, frame):
        self.reached, self.opened = threading.Event(), threading.Event()
        calls.actions[frame] = self

    def __call__(self, out):
        self.reached.set()
        assert self.opened.wait(30)
        return out


@pytest.fixture
def calls(engine, monkeypatch):
    return Calls(engine, monkeypatch)


def is_idle(engine):
    now = engine.metrics()
    return now["requests"]["running"] == now["call_shapes"] == now["parts_in_flight"] == 0


# ---- the same clip as a plain loop makes -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields",
    [{}, {"guidance_scale": 1.0}, {"num_frames": 20}, {"num_frames": 7}, {"num_frames": 1}, {"loop": True},
     {"num_frames": 13, "loop": True}, {"height": 48, "width": 64}],
    ids=["guided", "unguided", "long", "odd", "one frame", "loop", "long loop", "size"],
)  # fmt: skip
@torch.inference_mode()
def test_latents_and_frames_are_those_of_a_plain_loop(engine, checkpoint, fields):
    """Latents to the bit; the decoder's tanh and product are computed in another way."""
    oracle = WholeClip(CONFIG, TorchBackend(checkpoint, choose("torch", "cpu", "fp32")))
    how = {"num_frames": 8, "guidance": fields.get("guidance_scale"), **fields}
    how.pop("guidance_scale", None)
    latents = oracle.make(PROMPT, 7, **how)
    assert 0.1 < latents.std() < 3, "the decoder is not saturated"
    clip = engine.generate(PROMPT, seed=7, output_type="latent", **fields)
    assert clip.is_latent and clip.frames.dtype == np.float32
    assert np.array_equal(clip.frames, latents)
    expected = in_unit_range(decoded(checkpoint.weights["decoder"]["mix"], latents, 2))
    result = engine.generate(PROMPT, seed=7, output_type="float", **fields).frames
    assert result.shape == expected.shape and np.abs(result - expected).max() < 1e-6


def test_every_channel_of_the_latents_reaches_the_pixels(engine, checkpoint, frames):
    weights = {name: dict(network) for name, network in checkpoint.weights.items()}
    for channel in range(4):
        mix = checkpoint.weights["decoder"]["mix"].clone()
        mix[channel] = 0
        weights["decoder"]["mix"] = mix
        with Engine(dataclasses.replace(checkpoint, weights=weights), choose("torch", "cpu", "fp32")) as other:
            assert not np.array_equal(other.generate(PROMPT, seed=7).frames, frames)


# ---- one result in every way -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("fields", [{}, {"num_frames": 20}, {"num_frames": 7, "guidance_scale": 1.0}, {"loop": True}])
def test_same_bytes_generated_streamed_submitted_and_in_company(engine, folder, fields):
    expected = engine.generate(PROMPT, seed=7, **fields)
    assert expected.frames.dtype == np.uint8 and expected.frames.std() > 10
    chunks = list(engine.stream(PROMPT, seed=7, **fields))
    assert [c.start for c in chunks] == np.cumsum([0] + [len(c.frames) for c in chunks[:-1]]).tolist()
    assert np.array_equal(np.concatenate([c.frames for c in chunks]), expected.frames)
    others = [engine.submit(PROMPT, seed=seed, num_frames=8 + seed % 3) for seed in range(4)]
    jobs = [engine.submit(PROMPT, seed=7, buffer_frames=buffer, **fields) for buffer in (None, 1, 3)]
    for job in jobs:
        assert np.array_equal(job.result(60).frames, expected.frames)
    for seed, job in enumerate(others):
        assert len(job.result(60).frames) == 8 + seed % 3
    with Engine.load(folder, precision="fp32", max_batch=3) as again:
        assert np.array_equal(again.generate(PROMPT, seed=7, **fields).frames, expected.frames)
    wait_until(lambda: is_idle(engine))


@pytest.mark.parametrize("group_frames", [1, 3, 64])
@pytest.mark.parametrize("reproducible", [True, False])
def test_frames_do_not_depend_on_their_group(folder, frames, checkpoint, group_frames, reproducible):
    """Without `reproducible` a lane takes as many frames at once as there are in a group for it."""
    config = latent_model(group_frames)
    with Engine(
        dataclasses.replace(checkpoint, config=config), choose("torch", "cpu", "fp32"), None, reproducible
    ) as e:
        assert np.abs(e.generate(PROMPT, seed=7).frames.astype(int) - frames).max() <= (0 if reproducible else 1)


def test_bf16_is_close_to_fp32(folder, frames):
    with Engine.load(folder, precision="bf16") as engine:
        coarse = engine.generate(PROMPT, seed=7).frames
    assert np.abs(coarse.astype(int) - frames).mean() < 12 and not np.array_equal(coarse, frames)


def test_large_frames_are_decoded_in_tiles_without_a_trace(checkpoint, frames):
    """This decoder looks at one latent at a time, so tiles change nothing but the blending's rounding."""
    config = dataclasses.replace(CONFIG, decoder=dataclasses.replace(CONFIG.decoder, tile=8, tile_overlap=3))
    with Engine(dataclasses.replace(checkpoint, config=config), choose("torch", "cpu", "fp32")) as engine:
        tiled = engine.generate(PROMPT, seed=7)
    assert np.abs(tiled.frames.astype(int) - frames).max() <= 1


# ---- while it runs ---------------------------------------------------------------------------------------------------


def test_the_decoder_reports_its_frames(engine):
    seen = []
    job = engine.submit(PROMPT, seed=7, callback_on_step_end=seen.append)
    facts = job.result(60).metadata
    stages, decoder = seen[:STEPS], seen[STEPS:]
    assert [p.stage for p in stages] == ["latents"] * STEPS and {p.stage for p in decoder} == {"decoder"}
    assert [p.step for p in stages] == [1, 2, 3, 4] and [p.step for p in decoder] == [0, 0, 0, 1]
    assert [p.frames_final for p in decoder] == [2, 4, 6, 8] and {p.num_frames for p in seen} == {8}
    assert decoder[-1].seconds_left == 0 and all(p.seconds_left > 0 for p in decoder[:-1])
    assert facts["seconds"].keys() == {"text", "latents", "decoder", "total"} and facts["first_frame_seconds"] > 0
    json.dumps(facts)


def test_what_a_callback_raises_at_the_decoder_ends_the_work(engine, calls):
    def callback(progress):
        if progress.stage == "decoder":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        engine.generate(PROMPT, callback_on_step_end=callback)
    assert 0 < calls.count <= 4, "nothing goes on while the callback runs"


def test_frames_leave_while_later_ones_are_decoded(engine, calls):
    gate = Gate(calls, 5)
    job = engine.submit(PROMPT, seed=7)
    assert gate.reached.wait(30)
    chunks, early = job.frames(), 0
    while early < 4:
        early += len(next(chunks).frames)
    assert early == 4 and not job.done
    gate.opened.set()
    assert sum(len(chunk.frames) for chunk in chunks) == 4


def test_a_long_clip_is_decoded_window_by_window(engine, calls, monkeypatch):
    """80 frames in windows of 8: the first are decoded long before the last window is sampled."""
    sampled, predict = [], engine._backend.predict

    def counted(stage, *arguments, **options):
        sampled.append(stage)
        return predict(stage, *arguments, **options)

    monkeypatch.setattr(engine._backend, "predict", counted)
    with engine.stream(PROMPT, seed=7, num_frames=80) as stream:
        next(stream)
        early = len(sampled)
        for _ in stream:
            pass
    assert early < len(sampled) / 2 and calls.count == 80


def test_a_stream_that_waits_for_its_reader_samples_no_further(engine, calls, monkeypatch):
    sampled, predict = [], engine._backend.predict
    monkeypatch.setattr(engine._backend, "predict", lambda *a, **o: (sampled.append(a[0]), predict(*a, **o))[1])

    def rests():
        before = len(sampled)
        time.sleep(0.5)
        return len(sampled) == before and engine.metrics()["parts_in_flight"] == 0

    with engine.stream(PROMPT, seed=7, num_frames=400) as stream:
        next(stream)
        wait_until(rests, 60)
        assert len(sampled) < 200, "of 792 rows"
        assert calls.count <= 6, "a group that was taken, one that waits, one more"
        feeds = [work.feed.backlog for work in engine._scheduler._running if work.feed is not None]
        assert feeds and max(feeds) <= 4 * 8 + 8, "of a few windows"
    wait_until(lambda: is_idle(engine))


# ---- cancel, deadline ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_frames", [8, 40])
@pytest.mark.parametrize("frame", [1, 2, 5, 8])
def test_cancel_while_the_decoder_computes(engine, calls, frames, num_frames, frame):
    gate = Gate(calls, frame)
    job = engine.submit(PROMPT, seed=7, num_frames=num_frames)
    assert gate.reached.wait(30) and job.cancel() and job.done
    with pytest.raises(Cancelled, match=r"after [0-8] final frames"):
        job.result(0)
    gate.opened.set()
    wait_until(lambda: is_idle(engine))
    assert calls.count <= frame + 2, "the call that ran, and no other"
    assert np.array_equal(engine.generate(PROMPT, seed=7).frames, frames)


def test_cancel_at_any_moment_leaves_nothing(engine, frames):
    rng = np.random.default_rng(0)
    jobs = []
    for delay in rng.uniform(0, 0.4, 12):
        jobs.append(engine.submit(PROMPT, seed=7, num_frames=int(rng.choice([2, 8, 24]))))
        threading.Timer(delay, jobs[-1].cancel).start()
    for job in jobs:
        try:
            job.result(60)
        except Cancelled:
            assert job.status == "cancelled"
    wait_until(lambda: is_idle(engine))
    assert np.array_equal(engine.generate(PROMPT, seed=7).frames, frames)


def test_a_deadline_that_passes_in_the_decoder(engine, calls):
    gate = Gate(calls, 3)
    job = engine.submit(PROMPT, seed=7, timeout=5)
    assert gate.reached.wait(4)
    with pytest.raises(DeadlineExceeded, match="not done in its 5 s"):
        job.result(20)
    gate.opened.set()
    wait_until(lambda: is_idle(engine))


def test_a_closed_engine_cancels_what_is_decoded(folder, monkeypatch):
    engine = Engine.load(folder, precision="fp32")
    gate = Gate(Calls(engine, monkeypatch), 1)
    job = engine.submit(PROMPT, seed=7)
    assert gate.reached.wait(30)
    threading.Timer(0.05, gate.opened.set).start()
    engine.close()
    with pytest.raises(Cancelled):
        job.result(0)


# ---- one request's trouble is its own --------------------------------------------------------------------------------


@pytest.mark.parametrize("num_frames", [8, 24])
def test_nan_from_the_decoder_is_named_with_its_frames(engine, calls, num_frames):
    whole = engine.generate(PROMPT, seed=7, num_frames=num_frames).frames
    calls.count = 0
    calls.actions[5] = lambda out: torch.where(torch.arange(32).view(32, 1, 1) == 9, float("nan"), out)
    delivered = []
    with pytest.raises(NonFiniteOutput, match="the decoder gave NaN or infinity in frames 4 to 5$") as caught:
        for chunk in engine.stream(PROMPT, seed=7, num_frames=num_frames):
            delivered.append(chunk.frames)
    assert caught.value.window == 2
    assert np.array_equal(np.concatenate(delivered), whole[:4]), "what was final stays delivered"
    wait_until(lambda: is_idle(engine))


def test_an_error_in_the_decoder_ends_its_own_request(engine, calls, frames, monkeypatch):
    def decode(latents, **options):
        if latents.shape[2] == 24:
            raise MemoryError("no room for this one")
        return calls.decode(latents, **options)

    monkeypatch.setattr(engine._backend, "decode", decode)
    good, bad = engine.submit(PROMPT, seed=7), engine.submit(PROMPT, seed=7, height=48, width=48)
    with pytest.raises(MemoryError, match="no room"):
        bad.result(60)
    assert np.array_equal(good.result(60).frames, frames)
    wait_until(lambda: is_idle(engine))


# ---- metrics, warm-up ------------------------------------------------------------------------------------------------


def test_metrics_count_the_decoder(folder):
    with Engine.load(folder, precision="fp32") as engine:
        engine.generate(PROMPT, seed=7, num_frames=7)
        engine.generate(PROMPT, seed=7, num_frames=7, output_type="latent")
        wait_until(lambda: is_idle(engine))
        now = json.loads(json.dumps(engine.metrics()))
    assert now["stages"]["latents"]["clips"] == 2 and now["stages"]["decoder"]["clips"] == 1
    assert now["stages"]["decoder"]["calls"] == 4 and now["stages"]["decoder"]["rows"] == 7, "2, 2, 2 and 1 frames"
    assert now["stages"]["decoder"]["lane_seconds"] > 0 and now["frames"] == 14


def test_info_names_the_decoder(engine, checkpoint):
    info = json.loads(json.dumps(engine.info()))
    assert info["decoder"] == "toy_decoder" and list(info["stages"]) == ["latents"]
    assert info["defaults"] == {"num_frames": 8, "fps": 16, "height": 32, "width": 32}
    values = sum(tensor.numel() for network in checkpoint.weights.values() for tensor in network.values())
    assert info["parameters"] == values and info["weight_bytes"] == 4 * values


def test_a_warm_engine_makes_no_more_buffers(folder):
    with Engine.load(folder, precision="fp32") as engine:
        engine.warm_up([{}, {"num_frames": 20}])
        buckets = dict(engine._scheduler._buckets)
        assert sorted((shape.stage, shape.owner) for shape in buckets) == [
            ("decoder", -1), ("decoder", 0), ("latents", 0),
        ]  # fmt: skip
        for fields in ({}, {"num_frames": 20}, {"num_frames": 20}, {}):
            engine.generate(PROMPT, seed=1, **fields)
        wait_until(lambda: engine._scheduler._buckets == buckets)


def test_a_warm_up_of_a_decoder_that_fails_leaves_nothing(folder, monkeypatch):
    with Engine.load(folder, precision="fp32") as engine:
        monkeypatch.setattr(engine._backend, "decode", lambda *args, **kwargs: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            engine.warm_up()
        assert engine.metrics()["call_shapes"] == 0 and not engine._scheduler.budget.warm


# ---- budget ----------------------------------------------------------------------------------------------------------


def needed(engine, **fields):
    request = GenerationRequest(prompt=PROMPT, seed=1, **fields)
    return engine._need(engine._ordered(request)[0], request, None)


def test_a_budget_that_is_too_small_names_the_decoder(folder):
    with Engine.load(folder, precision="fp32", memory_budget=2**40) as engine:
        budget = engine._scheduler.budget = Budget(2**40, {"weights": 1000})
        need = needed(engine)
        assert {shape.stage for shape in need.calls} == {"latents", "decoder"}
        budget.limit = budget.total([need])
        assert engine.generate(PROMPT, seed=1).frames.shape == SHAPE
        budget.limit = 10**6
        for way in (engine.generate, engine.submit, engine.stream):
            with pytest.raises(BudgetExceeded, match=r"\(weights 1000, request \d+, latents \d+, decoder \d+\)"):
                way(PROMPT, seed=1)


def test_groups_become_smaller_where_a_whole_one_does_not_fit(folder, frames):
    with Engine.load(folder, precision="fp32", memory_budget=2**40) as engine:
        whole, _ = engine._ordered(GenerationRequest(prompt=PROMPT, seed=7))
        budget = engine._scheduler.budget
        budget.limit = budget.total([needed(engine)]) - 1
        smaller, _ = engine._ordered(GenerationRequest(prompt=PROMPT, seed=7))
        assert (whole.last.windows.window, smaller.last.windows.window) == (2, 1)
        assert np.array_equal(engine.generate(PROMPT, seed=7).frames, frames)


def test_what_the_decoder_takes_is_counted(folder):
    """At the least what can be counted by hand: two frames at once, in two lanes."""
    latent, frame = 4 * 16 * 16 * 4, 4 * 32 * 32 * 3  # bytes
    with Engine.load(folder, precision="fp32", memory_budget=2**40) as engine:
        need = needed(engine)
        (call,) = [size for shape, size in need.calls.items() if shape.stage == "decoder"]
        assert call.buffers == 2 * (latent + frame) and call.activations >= 2 * frame
        whole_clip, kept, waiting = 2 * 8 * latent, 8 * frame // 4, 2 * (latent + frame)
        assert need.own >= whole_clip + kept + waiting


MEMORY_TEST = """
import json, sys, threading
sys.path.insert(0, sys.argv[2])
import support.toy
from pylumiere.engine import Engine
from pylumiere.scheduling.memory import peak_resident_bytes

engine = Engine.load(sys.argv[1], memory_budget=2**40)
loaded, planned, ended = engine.metrics()["memory"]["resident"], [], threading.Event()

def watch():
    while not ended.wait(0.005):
        planned.append(engine.metrics()["memory"]["planned"])

watcher = threading.Thread(target=watch)
watcher.start()
jobs = [engine.submit("x", seed=seed, num_frames=20) for seed in range(3)]
for job in jobs:
    job.result()
ended.set()
watcher.join()
print(json.dumps({"loaded": loaded, "planned": max(planned), "peak": peak_resident_bytes()}))
"""


def test_resident_memory_stays_under_what_was_planned(tmp_path):
    """Frames of 1024 x 1024 from latents of 16 x 16: nearly all of the memory is the decoder's."""
    config = latent_model(8)
    decoder = dataclasses.replace(config.decoder, network=dataclasses.replace(config.decoder.network, scale=64))
    folder = write_random_model(tmp_path / "model", dataclasses.replace(config, decoder=decoder))
    out = subprocess.run(
        [sys.executable, "-P", "-c", MEMORY_TEST, str(folder), str(Path(__file__).parent)],
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert out.returncode == 0, out.stderr
    row = json.loads(out.stdout)
    assert row["loaded"] + 2**26 < row["peak"] < row["planned"], row


# ---- what such a model does not take ---------------------------------------------------------------------------------

PICTURE = np.zeros((32, 32, 3), np.uint8)
HALF = np.arange(32)[:, None].repeat(32, 1) < 16
GIVEN = [
    ({"image": PICTURE}, "image to video"),
    ({"keyframes": {-1: PICTURE}}, "keyframes"),
    ({"image": PICTURE, "mask": HALF}, "cinemagraph"),
    ({"video": PICTURE[None].repeat(8, 0), "mask": HALF}, "inpainting"),
    ({"video": PICTURE[None].repeat(8, 0), "expand": {"left": 8}}, "outpainting"),
]


@pytest.mark.parametrize(("fields", "application"), GIVEN, ids=[name for _, name in GIVEN])
def test_pictures_are_refused_where_the_network_takes_none(engine, fields, application):
    for way in (engine.generate, engine.submit, engine.stream):
        with pytest.raises(InvalidRequest, match=f"{application}: the networks of model 'latent' take no pictures"):
            way(PROMPT, **fields)
    assert is_idle(engine)


def test_a_clip_to_start_from_is_refused_where_nothing_encodes_it(engine):
    for way in (engine.generate, engine.submit, engine.stream):
        with pytest.raises(InvalidRequest, match="decoder has no encoder beside it"):
            way(PROMPT, video=PICTURE[None].repeat(8, 0), strength=0.5)


def test_super_resolution_alone_is_refused(engine):
    with pytest.raises(InvalidRequest, match="model 'latent' has no super-resolution stage"):
        engine.upscale(PICTURE[None])


def test_latents_are_refused_where_there_is_no_decoder(tmp_path):
    with Engine.load(write_random_model(tmp_path)) as engine:  # noqa: SIM117
        with pytest.raises(InvalidRequest, match="output_type='latent': model 'tiny' has no decoder"):
            engine.generate(PROMPT, output_type="latent")


def test_a_folder_without_the_decoders_weights(tmp_path):
    folder = write_random_model(tmp_path, CONFIG)
    (folder / "decoder.safetensors").unlink()
    with pytest.raises(BundleError, match=r"decoder\.safetensors cannot be read: No such file"):
        Engine.load(folder)


# ---- the command line ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fields", [{}, {"num_frames": 20}, {"loop": True}])
def test_the_command_line_writes_the_same_frames(folder, engine, tmp_path, capsys, fields):
    arguments = ["generate", PROMPT, "--model", str(folder), "--precision", "fp32", "--seed", "7"]
    arguments += ["--frames", str(fields["num_frames"])] if "num_frames" in fields else []
    arguments += ["--loop"] if "loop" in fields else []
    expected = engine.generate(PROMPT, seed=7, **fields).frames
    for name, more in (("whole", []), ("streamed", ["--stream"])):
        assert main([*arguments, *more, "-o", str(tmp_path / name), "--json"]) == 0
        report = json.loads(capsys.readouterr().out)
        assert report["seconds"]["decoder"] >= 0 and report["seed"] == 7
        assert np.array_equal(read_video(tmp_path / name).frames, expected)


def test_the_command_line_refuses_in_one_line(folder, tmp_path, capsys):
    Video(PICTURE[None], 16).save(tmp_path / "picture")
    picture = str(next((tmp_path / "picture").iterdir()))
    assert main(["generate", PROMPT, "--model", str(folder), "--image", picture, "-o", str(tmp_path / "a.mp4")]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and "take no pictures" in err and "Traceback" not in err
    assert not (tmp_path / "a.mp4").exists()
