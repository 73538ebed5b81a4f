"""From a request to frames: values filled in and refused, conditioning, and both stages against a plain loop."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pylumiere.kernels.denoise_step import frame_noise
from support.testing import rel_rms, write_random_model

from pylumiere.backends.choice import choose
from pylumiere.backends.torch import TorchBackend
from pylumiere.checkpoints.native import build_network, load_checkpoint
from pylumiere.config import ModelConfig, SamplerConfig, ScheduleConfig, StageConfig
from pylumiere.diffusion.plan import Pipeline, from_calmest, plan_request, plan_ssr
from pylumiere.errors import InvalidRequest
from pylumiere.networks.stunet.presets import model_preset
from pylumiere.networks.text import HashEncoder
from pylumiere.request import GenerationRequest
from pylumiere.scheduling.batching import Bucket
from pylumiere.scheduling.scheduler import call_shape

CONFIG = dataclasses.replace(model_preset("tiny"), augmentation=0.15)
BASE, SSR = CONFIG.base.network, CONFIG.ssr.network


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return load_checkpoint(write_random_model(tmp_path_factory.mktemp("model"), CONFIG))


def make_pipeline(checkpoint):
    backend = TorchBackend(checkpoint, choose("torch", "cpu", "fp32"))
    return Pipeline(checkpoint.config, backend, HashEncoder(CONFIG.text_tokens, BASE.text_dim))


def pieces_of(pipeline, run, capacity=1):
    """Final frames of one stage, from a bucket that nobody shares."""
    network = pipeline.network(run.stage.name)
    bucket = Bucket(
        pipeline.backend, network, pipeline.config.text_tokens, call_shape(run.stage), capacity=capacity,
        fixed_batch=True,
    )  # fmt: skip
    handle, pieces = bucket.add(run), []
    while not bucket.sampler.is_finished(handle):
        bucket.extend(handle)
        call = bucket.begin()
        bucket.fill()
        bucket.compute(slice(0, call.rows), None)
        assert bucket.complete() == []
        final = bucket.sampler.take_final(handle)
        pieces += [] if final is None else [final]
    return pieces


def clip_of(pipeline, run, capacity=1):
    return np.concatenate([frames for _, frames in pieces_of(pipeline, run, capacity)])


@pytest.fixture(scope="module")
def pipeline(checkpoint):
    return make_pipeline(checkpoint)


def plan_of(**fields):
    return plan_request(GenerationRequest(**{"prompt": "a red circle", **fields}), CONFIG)


# ---- planning -------------------------------------------------------------------------------------------------------


def test_defaults_come_from_the_model():
    plan = plan_of()
    assert (plan.num_frames, plan.height, plan.width, plan.fps) == (8, 32, 32, 16.0)
    assert (plan.sampler, plan.num_inference_steps, plan.guidance_scale) == ("dpmpp_2m", 4, 2.0)
    assert (plan.base.height, plan.base.width, plan.base.windows.num_windows) == (16, 16, 1)
    assert (plan.ssr.windows.window, plan.ssr.windows.overlap, len(plan.ssr.table.timesteps)) == (4, 1, 2)
    assert not plan.ssr.is_guided and plan.base.is_guided


def test_a_drawn_seed_is_reported_and_differs():
    seeds = {plan_of().seed for _ in range(8)}
    assert len(seeds) == 8 and all(0 <= seed < 2**64 for seed in seeds)
    assert plan_of(seed=0).seed == 0


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"height": 30}, "height=30: this model makes multiples of 8 up to 128"),
        ({"width": 8192}, "width=8192: this model makes multiples of 8 up to 128"),
        ({"window_frames": 1, "window_overlap": 1}, "window_overlap=1 should be smaller"),
        ({"window_overlap": 4}, "window_overlap=4 should be smaller than window_frames=4"),
        ({"keyframes": {8: np.zeros((4, 4, 3), np.uint8)}}, "keyframes: frame 8 is outside the clip"),
        ({"video": np.zeros((8, 4, 4, 3), np.uint8), "strength": 0.5, "num_frames": 6}, "num_frames=6: video has 8"),
        (
            {"image": np.zeros((4, 4, 3), np.uint8), "mask": np.eye(4, dtype=bool)[None].repeat(6, 0)},
            "num_frames=8: mask has 6 frames",
        ),
    ],
)
def test_what_the_model_does_not_take_is_named(fields, message):
    with pytest.raises(InvalidRequest, match=message):
        plan_of(**fields)


def test_window_smaller_than_the_models_overlap():
    assert plan_of(window_frames=1).ssr.windows.overlap == 0


@pytest.mark.parametrize(
    ("num_frames", "loop", "window", "overlap", "num_windows"),
    [(8, False, 8, 0, 1), (5, False, 5, 0, 1), (1, False, 1, 0, 1), (9, False, 8, 4, 2), (20, False, 8, 4, 4),
     (8, True, 8, 4, 2), (6, True, 6, 3, 2), (21, True, 8, 4, 6)],
)  # fmt: skip
def test_windows_of_the_base(num_frames, loop, window, overlap, num_windows):
    """Any length: the network's multiple is filled up by repeating the last frame, which is then dropped."""
    windows = plan_of(num_frames=num_frames, loop=loop).base.windows
    assert (windows.window, windows.overlap, windows.num_windows) == (window, overlap, num_windows)
    assert windows.call_frames % BASE.temporal_factor == 0 and windows.loop == loop


def test_strength_runs_fewer_steps():
    assert len(plan_of(video=CLIP, strength=0.5).base.table.timesteps) == 2


CLIP = np.random.default_rng(0).random((8, 16, 16, 3)).astype(np.float32)  # at the base's own size: no scaling
REGION = np.zeros((16, 16), bool)
REGION[4:10, 6:] = True


def given_of(plan):
    return plan.task.given(np.arange(plan.num_frames))


# ---- the two stages against a loop over the whole clip ---------------------------------------------------------------


def step_by_step(predict, table, shape, seed, stage, guidance, initial=None, given=None):
    """The sampler on the whole clip, float64 between the network's calls; given pixels are held."""
    num_frames, positions = shape[0], int(np.prod(shape[1:]))

    def noise(step):
        return frame_noise(seed, stage, step, list(range(num_frames)), positions).view(shape).double()

    x = table.init_sigma * noise(-1)
    if initial is not None:
        x = x + table.init_alpha * torch.as_tensor(initial).double()
    previous = torch.zeros(shape, dtype=torch.float64)
    for step, (time, (u, v, p, q, r, n)) in enumerate(zip(table.timesteps, table.coef, strict=True)):
        conditional, unconditional = predict(x.float(), float(time))
        out = unconditional + guidance * (conditional - unconditional)
        clean = (u * x + v * out.double()).clamp(-1, 1)
        if given is not None:
            clean = torch.where(given[..., 3:] > 0, given[..., :3].double(), clean)
        x = p * x + q * clean + r * previous + (n * noise(step) if n else 0)
        previous = clean
    return x


def windows_of(num_frames, loop):
    """Frames of each window of the base and their weights: a triangle over the window, normalised per frame."""
    size = min(num_frames, BASE.num_frames)
    if num_frames == size and not loop:
        return [(np.arange(size), np.ones(size))]
    stride = size - size // 2
    starts = range(0, num_frames, stride) if loop else [*range(0, num_frames - size, stride), num_frames - size]
    triangle = np.minimum(np.arange(size) + 1, size - np.arange(size))
    windows = [((start + np.arange(size)) % num_frames, triangle) for start in starts]
    total = np.zeros(num_frames)
    for frames, weights in windows:
        total[frames] += weights
    return [(frames, weights / total[frames]) for frames, weights in windows]


def base_oracle(checkpoint, plan, encoder):
    network, given = build_network(BASE, checkpoint.base), given_of(plan)

    def predict(x, time):
        outs = []
        for prompt in (plan.request.prompt, plan.request.negative_prompt):
            text, mask = encoder.encode([prompt])
            out = torch.zeros(x.shape, dtype=torch.float64)
            for frames, weights in windows_of(plan.num_frames, plan.request.loop):
                fill = len(frames) + -len(frames) % BASE.temporal_factor
                reads = frames[np.minimum(np.arange(fill), len(frames) - 1)]
                sample = torch.cat([x, given], -1)[reads][None]
                part = network(sample, torch.tensor([time]), text, mask)[0, : len(frames)]
                out[frames] += torch.from_numpy(weights)[:, None, None, None] * part
            outs.append(out)
        return outs

    return step_by_step(
        predict, plan.base.table, (plan.num_frames, 16, 16, 3), plan.seed, 0, plan.guidance_scale, plan.task.initial,
        given,
    )  # fmt: skip


def ssr_oracle(checkpoint, stage, low, seed):
    network = build_network(SSR, checkpoint.ssr)
    num_frames = len(low)
    noise = frame_noise(seed, 2, -1, list(range(num_frames)), low[0].size).view(num_frames, *low.shape[1:])
    noisy = torch.as_tensor(low) + CONFIG.augmentation * noise
    size = (stage.height, stage.width)
    given = F.interpolate(noisy.permute(0, 3, 1, 2), size, mode="bilinear").permute(0, 2, 3, 1)
    window, stride = stage.windows.window, stage.windows.stride

    def predict(x, time):
        total, count = torch.zeros(x.shape), torch.zeros(num_frames, 1, 1, 1)
        start = 0
        while True:
            start = min(start, num_frames - window)
            frames = slice(start, start + window)
            sample = torch.cat([x[frames], given[frames]], -1)[None]
            total[frames] += network(sample, torch.tensor([time]), noise_level=torch.tensor([CONFIG.augmentation]))[0]
            count[frames] += 1
            if start + window == num_frames:
                return total / count, total / count
            start += stride

    return step_by_step(predict, stage.table, (num_frames, *size, 3), seed, 1, 1.0)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"guidance_scale": 1.0},
        {"sampler": "ddpm", "negative_prompt": "blue"},
        {"sampler": "ddim", "image": CLIP[0]},
        {"video": CLIP, "strength": 0.5},
        {"video": CLIP, "mask": REGION, "strength": 0.7},
        {"image": CLIP[0], "mask": REGION, "keyframes": None},
        {"num_frames": 7},
        {"num_frames": 19, "keyframes": {0: CLIP[0], -1: CLIP[1]}},
        {"num_frames": 12, "loop": True},
        {"loop": True, "image": CLIP[0]},
        {"num_frames": 4, "height": 48},
    ],
    ids=["guided", "unguided", "stochastic", "image", "strength", "inpainting", "cinemagraph", "odd", "long", "loop",
         "short loop", "size"],
)
@torch.inference_mode()
def test_base_equals_a_plain_loop(checkpoint, pipeline, fields):
    plan = plan_of(seed=2**64 - 3, **fields)
    result = clip_of(pipeline, pipeline.base(plan, pipeline.embed(plan)))
    if plan.height == 32:
        expected = base_oracle(checkpoint, plan, pipeline.encoder)
        assert rel_rms(torch.as_tensor(result), expected) < 2e-4
    assert result.shape == (plan.num_frames, plan.base.height, plan.base.width, 3)
    assert np.abs(result).max() <= 1


@pytest.mark.parametrize(
    ("num_frames", "window", "overlap", "sampler", "steps"),
    [
        (8, 4, 1, "dpmpp_2m", 2),
        (9, 4, 3, "dpmpp_2m", 4),
        (9, 4, 2, "ddpm", 3),
        (7, 2, 1, "ddim", 3),
        (5, 5, 0, "ddpm", 2),
        (4, 4, 2, "dpmpp_2m", 3),
    ],
)
@torch.inference_mode()
def test_ssr_equals_a_plain_loop_over_windows(checkpoint, num_frames, window, overlap, sampler, steps):
    sampling = dataclasses.replace(CONFIG.ssr.sampling, sampler=sampler)
    config = dataclasses.replace(CONFIG, ssr=dataclasses.replace(CONFIG.ssr, sampling=sampling))
    pipeline = make_pipeline(dataclasses.replace(checkpoint, config=config))
    low = np.random.default_rng(1).uniform(-1, 1, (num_frames, 8, 8, 3)).astype(np.float32)
    stage = plan_ssr(config, 16, 16, num_frames=num_frames, window=window, overlap=overlap, num_inference_steps=steps)
    pieces = pieces_of(pipeline, pipeline.ssr(stage, low, seed=2**63 + 5))
    starts = [start for start, _ in pieces]
    assert starts == np.cumsum([0] + [len(frames) for _, frames in pieces[:-1]]).tolist()
    result = np.concatenate([frames for _, frames in pieces])
    assert rel_rms(torch.as_tensor(result), ssr_oracle(checkpoint, stage, low, 2**63 + 5)) < 2e-4


def test_ssr_bits_depend_neither_on_capacity_nor_on_how_the_length_is_known(checkpoint):
    """One fixed shape per capacity; rows at any place. The capacity itself changes the shape, so it is not compared."""
    low = np.random.default_rng(2).uniform(-1, 1, (11, 8, 8, 3)).astype(np.float32)
    pipeline = make_pipeline(checkpoint)
    results = []
    for num_frames in (11, None):
        stage = plan_ssr(CONFIG, 16, 16, num_frames=num_frames)
        results.append(clip_of(pipeline, pipeline.ssr(stage, iter(low), seed=3), capacity=3))
    np.testing.assert_array_equal(*results)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_rows_bits_do_not_depend_on_its_place_in_the_batch(checkpoint, precision):
    backend = TorchBackend(checkpoint, choose("torch", "cpu", precision))
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(4, 4, 16, 16, 6, generator=generator)
    times, level = torch.tensor([900.0, 500.0, 100.0, 3.0]), torch.full((4,), 0.1)
    first = backend.predict("ssr", rows, times, noise_level=level)
    for shift in (1, 2, 3):
        moved = backend.predict("ssr", rows.roll(shift, 0), times.roll(shift), noise_level=level)
        assert torch.equal(moved.roll(-shift, 0), first)


class Counting:
    """Passes on to another object; counts calls of one method."""

    def __init__(self, inner, method):
        self.inner, self.calls = inner, []
        function = getattr(inner, method)

        def counted(*args, **kwargs):
            self.calls.append((args, kwargs))
            return function(*args, **kwargs)

        setattr(self, method, counted)

    def __getattr__(self, name):
        return getattr(self.inner, name)


def test_order_of_channels_and_of_guidance(checkpoint, pipeline):
    """J | C | M; the rows with the prompt first."""
    backend = Counting(pipeline.backend, "predict")
    watched = dataclasses.replace(pipeline, backend=backend)
    plan = plan_of(seed=1, image=CLIP[0], num_inference_steps=1)
    clip_of(watched, watched.base(plan, watched.embed(plan)))
    (((stage, sample, times, text, mask, level), _),) = backend.calls
    assert stage == "base" and level is None and sample.shape == (2, 8, 16, 16, 7)
    first = frame_noise(1, 0, -1, list(range(8)), 16 * 16 * 3).view(8, 16, 16, 3) * plan.base.table.init_sigma
    torch.testing.assert_close(sample[0, ..., :3], first)
    assert torch.equal(sample[0], sample[1])
    assert torch.equal(sample[0, ..., 3:], given_of(plan))
    assert times.tolist() == [plan.base.table.timesteps[0]] * 2
    expected, expected_mask = pipeline.encoder.encode(["a red circle", ""])
    assert torch.equal(text, expected) and torch.equal(mask, expected_mask)


def test_without_guidance_the_network_is_called_with_one_row(pipeline):
    backend = Counting(pipeline.backend, "predict")
    watched = dataclasses.replace(pipeline, backend=backend)
    plan = plan_of(guidance_scale=1.0)
    clip_of(watched, watched.base(plan, watched.embed(plan)))
    assert [len(args[1]) for args, _ in backend.calls] == [1] * 4


def test_guided_ssr_without_text_is_refused(checkpoint):
    sampling = dataclasses.replace(CONFIG.ssr.sampling, guidance_scale=3.0)
    config = dataclasses.replace(CONFIG, ssr=dataclasses.replace(CONFIG.ssr, sampling=sampling))
    pipeline = make_pipeline(dataclasses.replace(checkpoint, config=config))
    with pytest.raises(InvalidRequest, match="guidance_scale=3.0: the ssr network takes no text"):
        pipeline.ssr(plan_ssr(config, 16, 16, num_frames=4), np.zeros((4, 8, 8, 3), np.float32), 0)


def test_flow_model_takes_euler(tmp_path):
    stage = StageConfig(BASE, ScheduleConfig("flow", "flow"), SamplerConfig("euler", 3, 1.0))
    config = ModelConfig("flow", stage, None, text_encoder="hash", text_tokens=8)
    pipeline = make_pipeline(load_checkpoint(write_random_model(tmp_path, config)))
    plan = plan_request(GenerationRequest(prompt="x", seed=1), config)
    assert plan.ssr is None and (plan.height, plan.width) == (16, 16)
    assert np.isfinite(clip_of(pipeline, pipeline.base(plan, pipeline.embed(plan)))).all()


def test_a_loop_begins_where_it_moves_least():
    """Turned, not changed: the same frames in the same circular order."""
    places = np.array([0.0, 3.0, 5.0, 9.0, 9.5, 4.0])  # steps: 4 (last to first), 3, 2, 4, 0.5, 5.5
    frames = np.broadcast_to(places[:, None, None, None], (6, 2, 2, 3)).astype(np.float32)
    turned = from_calmest(frames)
    assert turned[:, 0, 0, 0].tolist() == [9.5, 4.0, 0.0, 3.0, 5.0, 9.0]
