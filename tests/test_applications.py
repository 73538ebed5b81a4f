"""Applications through the engine: what comes back, styles by request, long clips and loops, with random networks."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
from support.testing import random_weights, write_random_model

from pylumiere import Engine
from pylumiere.backends.choice import choose
from pylumiere.checkpoints.adapters import fingerprint, save_style
from pylumiere.checkpoints.native import Checkpoint, load_checkpoint
from pylumiere.errors import Cancelled, InvalidRequest
from pylumiere.networks.stunet.presets import model_preset

CONFIG = model_preset("tiny")  # 8 frames of 32 x 32, a base of 16 x 16
NETWORK = CONFIG.first.network
CLIP = np.random.default_rng(0).integers(0, 256, (8, 32, 32, 3), np.uint8)
REGION = np.zeros((32, 32), bool)
REGION[8:24, 8:24] = True


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = write_random_model(tmp_path_factory.mktemp("model"))
    model = fingerprint(load_checkpoint(folder).weights["base"])
    for name, seed in (("one", 5), ("two", 6)):
        tensors = {"conv_out.weight": random_weights(NETWORK, seed)["conv_out.weight"]}
        save_style(folder / "styles" / f"{name}.safetensors", tensors, NETWORK, model)
    return folder


@pytest.fixture(scope="module")
def engine(folder):
    with Engine.load(folder) as engine:
        yield engine


def make(engine, **fields):
    return engine.generate("x", seed=1, **fields).frames


@pytest.mark.parametrize(
    "fields",
    [{"video": CLIP}, {"image": CLIP[0]}, {"video": CLIP, "strength": 0.5}],
    ids=["inpainting", "cinemagraph", "inpainting from the clip"],
)
def test_outside_the_mask_not_one_byte_changes(engine, fields):
    result = make(engine, mask=REGION, **fields)
    mine = CLIP if "video" in fields else CLIP[:1]
    assert (result[:, ~REGION] == mine[:, ~REGION]).all()
    assert (result[:, REGION] != mine[:, REGION]).mean() > 0.9


def test_streamed_frames_are_composed_too(engine):
    fields = {"video": CLIP.repeat(2, 0), "mask": REGION, "window_frames": 2, "window_overlap": 0}
    chunks = list(engine.stream("x", seed=1, **fields))
    assert len(chunks) > 1 and np.array_equal(np.concatenate([c.frames for c in chunks]), make(engine, **fields))


def test_outpainting_and_bars(engine):
    result = make(engine, video=CLIP[:, :, 8:], expand={"left": 8})
    assert (result[:, :, 8:] == CLIP[:, :, 8:]).all()
    result = make(engine, video=CLIP[:, 8:24], fit="pad", strength=0.5)
    assert not result[:, :8].any() and not result[:, 24:].any() and result[:, 8:24].any()


def test_given_frames_are_exact_in_the_bases_clip(folder):
    """A model without super-resolution shows the base's frames: the given one is there to the rounding."""
    config, weights = dataclasses.replace(CONFIG, stages=CONFIG.stages[:1]), load_checkpoint(folder).weights
    alone = Checkpoint(folder, config, {"base": weights["base"]})
    with Engine(alone, choose("torch", "cpu", "fp32")) as engine:
        picture, last = CLIP[:2, :16, :16]
        result = engine.generate("x", seed=1, image=picture, keyframes={-1: last}).frames
    assert np.abs(result[[0, -1]].astype(int) - [picture, last]).max() <= 1
    assert (result[1:-1] != picture).mean() > 0.9


# ---- styles ---------------------------------------------------------------------------------------------------------


def test_styles_switch_by_request_and_batch_only_with_their_like(engine):
    assert engine.styles() == ["one", "two"]
    plain = make(engine)
    results = {(s, a): make(engine, style=s, style_strength=a) for s in ("one", "two") for a in (0.0, 0.5, 1.0)}
    for style in ("one", "two"):
        assert np.array_equal(results[style, 0.0], plain)
    kinds = [plain, *(results[key] for key in results if key[1])]
    assert all(not np.array_equal(a, b) for a, b in itertools.combinations(kinds, 2))
    # All at once, beside each other: the same bytes.
    jobs = {key: engine.submit("x", seed=1, style=key[0], style_strength=key[1]) for key in results}
    for key, job in jobs.items():
        assert np.array_equal(job.result(timeout=120).frames, results[key]), key
    assert np.array_equal(make(engine), plain)


def test_styled_networks_share_what_the_style_leaves_alone(engine):
    make(engine, style="one")
    backend = engine._backend
    plain = backend._networks["base"].state_dict()
    styled = next(reversed(backend._styled.values())).state_dict()
    differ = [name for name in plain if styled[name].data_ptr() != plain[name].data_ptr()]
    assert differ == ["conv_out.weight"]
    before = len(backend._styled)
    make(engine, style="one")
    assert len(backend._styled) == before  # made once
    for strength in np.linspace(0.1, 0.9, 6):
        make(engine, style="two", style_strength=float(strength), num_frames=2, num_inference_steps=1)
    assert len(backend._styled) <= 4


def test_wrong_styles_are_refused_before_any_work(engine):
    with pytest.raises(InvalidRequest, match="style='none': no such file, and .* it has: one, two"):
        engine.submit("x", style="none")


# ---- length ---------------------------------------------------------------------------------------------------------


class Counting:
    """Counts a backend's calls by stage."""

    def __init__(self, backend):
        self.backend, self.calls = backend, {"base": 0, "ssr": 0}

    def __call__(self, stage, *arguments, **options):
        self.calls[stage] += 1
        return type(self.backend).predict(self.backend, stage, *arguments, **options)


@pytest.mark.parametrize("num_frames", [1, 5, 9, 21, 40])
def test_any_length_streamed_or_not(engine, num_frames):
    chunks = list(engine.stream("x", seed=1, num_frames=num_frames))
    starts = np.cumsum([0, *(len(chunk.frames) for chunk in chunks)])
    assert [chunk.start for chunk in chunks] == starts[:-1].tolist() and starts[-1] == num_frames
    assert np.array_equal(np.concatenate([chunk.frames for chunk in chunks]), make(engine, num_frames=num_frames))


def test_first_frames_of_a_long_clip_come_before_the_base_has_ended(engine, monkeypatch):
    counting = Counting(engine._backend)
    monkeypatch.setattr(engine._backend, "predict", counting, raising=False)
    with engine.stream("x", seed=1, num_frames=160) as stream:
        next(stream)
        early = dict(counting.calls)
        for _ in stream:
            pass
    assert early["base"] < counting.calls["base"] / 2, (early, counting.calls)


def test_a_long_clip_is_cancelled_and_leaves_nothing(engine):
    job = engine.submit("x", seed=1, num_frames=400)
    next(job.frames())
    assert job.cancel()
    with pytest.raises(Cancelled):
        job.result(timeout=60)
    assert make(engine, num_frames=2).shape == (2, 32, 32, 3)
    assert engine.metrics()["requests"]["running"] == 0


def test_a_loop_is_made_as_a_ring(engine):
    """Noise differs by frame, so frames are not rotated copies; but the ends are neighbours for both networks."""
    loop, plain = make(engine, loop=True), make(engine)
    assert loop.shape == plain.shape and not np.array_equal(loop, plain)
    assert len(make(engine, loop=True, num_frames=20)) == 20
