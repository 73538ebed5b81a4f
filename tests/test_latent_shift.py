"""Latent-Shift from a picture model's folder: clips against loops over diffusers' U-Net, its channels shifted."""

from __future__ import annotations

import contextlib
import functools
import shutil

import diffusers
import numpy as np
import pytest
import torch
from support.latent_shift import shifting
from support.testing import psnr, rel_rms
from support.tiny_diffusers import edit_json

from pylumiere.config import TemporalShiftConfig
from pylumiere.diffusion.noise import frame_noise
from pylumiere.engine import Engine
from pylumiere.errors import InvalidRequest

PROMPT, NEGATIVE = "a dog and a cat", "a cat, dog"
SHIFT = TemporalShiftConfig()
WINDOW = 16  # frames of the network, where no file says


def noise(count, height=8, width=8, seed=0):
    return np.random.default_rng(seed).standard_normal((count, height, width, 4), np.float32)


def planar(frames):
    return torch.from_numpy(np.ascontiguousarray(frames.transpose(0, 3, 1, 2)))


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def load(tiny_sd):
    """`load(shift, sd2)` gives an engine of a tiny folder; shift None is the picture model."""
    with contextlib.ExitStack() as engines:

        @functools.cache
        def loaded(shift=SHIFT, sd2=False):
            engine = Engine.load(tiny_sd(sd2=sd2)[1], precision="fp32", temporal_shift=shift)
            return engines.enter_context(engine)

        yield loaded


@pytest.fixture(scope="module")
def engine(load):
    return load()


# ---- the oracle ------------------------------------------------------------------------------------------------------


def windows_of(num_frames, loop):
    """Frames of windows that share half of theirs; the last one ends with the clip, or they lie on a ring."""
    length = min(num_frames, WINDOW)
    if loop:
        return [[(start + i) % num_frames for i in range(length)] for start in range(0, num_frames, length // 2)]
    starts = [0]
    while starts[-1] + length < num_frames:
        starts.append(min(starts[-1] + length // 2, num_frames - length))
    return [list(range(start, start + length)) for start in starts]


@torch.no_grad()
def denoised(pipeline, start, *, shift=SHIFT, steps=3, guidance=7.5, prompt=PROMPT, loop=False, skipped=0):
    """Latents [T, h, w, C]: DDIM of diffusers on the whole clip, its U-Net on one window after the other, their outputs
    averaged at every step with weights that fall to a window's ends.

    Args:
        start: noise, or noised latents at the first step that is not skipped.
    """
    scheduler = diffusers.DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1, clip_sample=False,
        set_alpha_to_one=False, prediction_type=pipeline.scheduler.config.prediction_type,
    )  # fmt: skip
    scheduler.set_timesteps(steps)
    text, blank = pipeline.encode_prompt(prompt, "cpu", 1, True, NEGATIVE)
    x, windows = planar(start), windows_of(len(start), loop)
    length = len(windows[0])
    weights = [min(i + 1, length - i) for i in range(length)]
    for time in scheduler.timesteps[skipped:]:
        total, share = torch.zeros_like(x), torch.zeros(len(x), 1, 1, 1)
        for frames in windows:
            both = torch.cat([x[frames], x[frames]])
            texts = torch.cat([text.expand(length, -1, -1), blank.expand(length, -1, -1)])
            with shifting(pipeline.unet, length, shift):
                with_text, without = pipeline.unet(both, time, texts).sample.chunk(2)
            out = without + guidance * (with_text - without)
            for i, frame in enumerate(frames):
                total[frame] += weights[i] * out[i]
                share[frame] += weights[i]
        x = scheduler.step(total / share, time, x).prev_sample
    return x.permute(0, 2, 3, 1)


@torch.no_grad()
def decoded(pipeline, latents):
    """Pixels in 0..1, a frame at a time."""
    frames = [pipeline.vae.decode(z[None] / pipeline.vae.config.scaling_factor).sample for z in
              latents.permute(0, 3, 1, 2)]  # fmt: skip
    return (torch.cat(frames).permute(0, 2, 3, 1) / 2 + 0.5).clamp(0, 1)


FIELDS = {"prompt": PROMPT, "negative_prompt": NEGATIVE, "num_inference_steps": 3, "sampler": "ddim"}


def latents_of(engine, **fields):
    return torch.from_numpy(engine.generate(output_type="latent", **{**FIELDS, **fields}).frames)


# ---- one window ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sd2", "shift"),
    [
        (False, SHIFT),
        (True, TemporalShiftConfig(4, "causal")),
        (True, TemporalShiftConfig(8, pad="circular")),
        (False, TemporalShiftConfig(4, pad="replicate")),
    ],
    ids=lambda value: f"{value.direction}-{value.pad}-{value.div}" if value not in (False, True) else f"sd{1 + value}",
)
def test_a_clip_is_that_of_diffusers_network_with_shifted_channels(load, tiny_sd, sd2, shift):
    pipeline, _ = tiny_sd(sd2=sd2)
    start = noise(5)
    latents = denoised(pipeline, start, shift=shift)
    assert rel_rms(latents_of(load(shift, sd2), latents=start), latents) < 1e-5
    pixels = load(shift, sd2).generate(output_type="float", latents=start, **FIELDS).frames
    assert psnr(pixels, decoded(pipeline, latents)) > 90
    assert rel_rms(latents_of(load(None, sd2), latents=start), latents) > 1e-2, "the shift counts"


def test_the_full_length_in_another_size_without_guidance(engine, tiny_sd):
    pipeline, _ = tiny_sd(sd2=False)
    start = noise(WINDOW, 12, 6)
    made = latents_of(engine, latents=start, height=24, width=12, guidance_scale=1.0)
    assert rel_rms(made, denoised(pipeline, start, guidance=1.0)) < 1e-5


def test_a_folder_that_carries_the_shift_needs_no_argument(tiny_sd, engine, tmp_path):
    folder = shutil.copytree(tiny_sd(sd2=False)[1], tmp_path / "model")
    edit_json(folder / "unet" / "config.json", temporal_shift={"div": 8}, num_frames=6)
    with Engine.load(folder, precision="fp32") as carrying:
        assert carrying.info()["defaults"]["num_frames"] == 6
        made = carrying.generate(seed=7, **FIELDS).frames
    assert made.tobytes() == engine.generate(seed=7, num_frames=6, **FIELDS).frames.tobytes()
    assert engine.info()["defaults"]["num_frames"] == WINDOW


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_one_frame_is_the_picture_models_bit_for_bit(tiny_sd, precision):
    _, folder = tiny_sd(sd2=False)
    pictures = []
    for shift in (None, 8, {"div": 4, "pad": "circular"}):
        with Engine.load(folder, precision=precision, temporal_shift=shift) as engine:
            pictures.append(engine.generate(seed=7, num_frames=1, **FIELDS).frames.tobytes())
    assert pictures[0] == pictures[1] == pictures[2]


def test_a_shift_of_no_channels_makes_each_frame_a_picture_bit_for_bit(load):
    start = noise(5)
    still, picture = load(TemporalShiftConfig(div=1000)), load(None)
    clip = latents_of(still, latents=start)
    for frame in range(5):
        assert torch.equal(clip[frame : frame + 1], latents_of(picture, latents=start[frame : frame + 1]))


# ---- one clip in every way -------------------------------------------------------------------------------------------


def test_streamed_alone_and_in_company_a_clip_has_the_same_bytes(load, tiny_sd):
    fields = {**FIELDS, "num_frames": 5, "seed": 7}
    alone = load().generate(**fields).frames
    streamed = list(load().stream(**fields))
    assert [chunk.start for chunk in streamed] == np.cumsum([0] + [len(c.frames) for c in streamed[:-1]]).tolist()
    assert np.concatenate([chunk.frames for chunk in streamed]).tobytes() == alone.tobytes()
    others = ({"seed": 8}, {"guidance_scale": 1.0}, {"num_inference_steps": 5}, {"num_frames": 20, "loop": True})
    torch.set_num_threads(2)  # two lanes
    engine = Engine.load(tiny_sd(sd2=False)[1], precision="fp32", temporal_shift=8, max_batch=3)
    torch.set_num_threads(1)
    with engine:
        jobs = [engine.submit(**{**fields, **other}) for other in ({}, *others, {"prompt": "a cat"}, {})]
        for job in (jobs[0], jobs[-1]):
            assert job.result(60).frames.tobytes() == alone.tobytes()
        assert jobs[1].result(60).frames.tobytes() == load().generate(**{**fields, "seed": 8}).frames.tobytes()


# ---- longer than the network -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_frames", [40, 21])
def test_a_long_clip_is_a_loop_over_windows(engine, tiny_sd, num_frames):
    start = noise(num_frames)
    latents = denoised(tiny_sd(sd2=False)[0], start)
    assert rel_rms(latents_of(engine, latents=start), latents) < 1e-5


def test_frames_of_a_long_clip_leave_in_order_while_later_ones_are_made(engine, tiny_sd):
    pipeline, _ = tiny_sd(sd2=False)
    start, reports = noise(40), []
    chunks = []
    fields = {**FIELDS, "latents": start, "output_type": "float", "callback_on_step_end": reports.append}
    for chunk in engine.stream(**fields):
        assert chunk.start == sum(len(frames) for frames in chunks)
        if not chunks:
            made = [report for report in reports if report.stage == "unet"][-1]
            assert made.step < made.steps and made.frames_final < 40, "the first frames do not wait for the last"
        chunks.append(chunk.frames)
    assert len(chunks) > 4
    pixels = decoded(pipeline, denoised(pipeline, start))
    assert psnr(np.concatenate(chunks), pixels) > 90


@pytest.mark.parametrize("num_frames", [WINDOW, 24])
def test_a_loop_is_a_loop_over_windows_on_a_ring(engine, tiny_sd, num_frames):
    pipeline, _ = tiny_sd(sd2=False)
    start = noise(num_frames)
    latents = denoised(pipeline, start, loop=True)
    # It begins where its frames differ least.
    latents = latents.roll(-int((latents - latents.roll(1, 0)).abs().mean((1, 2, 3)).argmin()), 0)
    assert rel_rms(latents_of(engine, latents=start, loop=True), latents) < 1e-5
    frames = engine.generate(latents=start, loop=True, output_type="float", **FIELDS).frames
    assert psnr(frames, decoded(pipeline, latents)) > 90


# ---- video to video --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("strength", "skipped"), [(0.5, 2), (0.8, 1)])
def test_video_to_video_starts_from_the_noised_means_of_the_encoder(engine, tiny_sd, strength, skipped):
    pipeline, _ = tiny_sd(sd2=False)
    video = np.random.default_rng(1).integers(0, 256, (20, 16, 16, 3), np.uint8)
    scheduler = diffusers.DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
                                        steps_offset=1)  # fmt: skip
    scheduler.set_timesteps(4)
    with torch.no_grad():
        means = pipeline.vae.encode(planar(video / np.float32(127.5) - 1)).latent_dist.mean
    fresh = planar(frame_noise(7, 0, -1, range(20), (8, 8, 4)))
    start = scheduler.add_noise(means * pipeline.vae.config.scaling_factor, fresh, scheduler.timesteps[skipped])
    expected = denoised(pipeline, start.permute(0, 2, 3, 1).numpy(), steps=4, skipped=skipped)
    made = latents_of(engine, video=video, strength=strength, seed=7, num_inference_steps=4)
    assert rel_rms(made, expected) < 1e-5


# ---- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shift", "message"),
    [
        (1, "^temporal_shift: div=1 is below 2"),
        (True, "should be a number such as 8"),
        ("8", "should be a number such as 8"),
        ({"div": 8, "pad": "mirror"}, "pad 'mirror' is not one of zero, circular, replicate"),
        ({"fold": 8}, "fold"),
    ],
)
def test_a_shift_that_is_none_is_refused(tiny_sd, shift, message):
    with pytest.raises(InvalidRequest, match=message) as caught:
        Engine.load(tiny_sd(sd2=False)[1], temporal_shift=shift)
    assert "\n" not in str(caught.value)


def test_a_model_that_is_no_picture_model_takes_no_shift():
    with pytest.raises(InvalidRequest, match=r"temporal_shift: model 'demo' is no folder with a model_index\.json"):
        Engine.load("demo", temporal_shift=8)
