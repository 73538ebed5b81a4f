"""Whole runs of diffusers' pipelines against ours on the same folder: text, guidance, steps, latents and pixels."""

from __future__ import annotations

import functools
import shutil

import diffusers
import numpy as np
import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline
from diffusers.pipelines.stable_diffusion import pipeline_stable_diffusion_img2img
from support.testing import psnr, rel_rms

from pylumiere.backends.choice import Choice
from pylumiere.checkpoints.diffusers import read_diffusers_folder
from pylumiere.diffusion.noise import frame_noise
from pylumiere.engine import Engine

FOLDERS = {"sd1": {}, "sd2": {"sd2": True}, "sd1-tiny-decoder": {"decoder": "tiny"}}
# What the folders say of the schedule, for whatever class.
SETTINGS = {
    "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1,
    "timestep_spacing": "leading",
}  # fmt: skip
DDIM = {"clip_sample": False, "set_alpha_to_one": False}
CLASSES = {"ddim": "DDIMScheduler", "euler": "EulerDiscreteScheduler", "dpmpp_2m": "DPMSolverMultistepScheduler"}
PROMPT, NEGATIVE = "a dog and a cat", "a cat, dog"


def make_scheduler(sampler, prediction_type):
    own = DDIM if sampler == "ddim" else {}
    return getattr(diffusers, CLASSES[sampler])(**SETTINGS, **own, prediction_type=prediction_type)


def noise(count=1, height=8, width=8, seed=0):
    """Starting noise as our requests take it."""
    return np.random.default_rng(seed).standard_normal((count, height, width, 4), np.float32)


def planar(frames):
    """[T, h, w, C] as pictures [T, C, h, w] of torch."""
    return torch.from_numpy(np.ascontiguousarray(frames.transpose(0, 3, 1, 2)))


@torch.no_grad()
def theirs(pipeline, latents=None, **fields):
    """Latents and pixels that a pipeline makes, [T, h, w, C] and [T, H, W, 3]."""
    seen = []
    pictures = pipeline(
        latents=None if latents is None else planar(latents), output_type="np",
        callback_on_step_end=lambda pipe, step, time, tensors: seen.append(tensors["latents"]) or {}, **fields,
    ).images  # fmt: skip
    return seen[-1].permute(0, 2, 3, 1), torch.from_numpy(pictures)


def assert_the_same(engine, expected, **fields):
    """Latents within 1e-5, and pixels."""
    latents, pixels = expected
    made = engine.generate(output_type="latent", **fields).frames
    assert rel_rms(torch.from_numpy(made), latents) < 1e-5
    assert psnr(engine.generate(output_type="float", **fields).frames, pixels) > 90


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def load(tiny_sd):
    """`load(name)` gives a pipeline, and an engine of its folder."""
    engines = []

    @functools.cache
    def loaded(name):
        pipeline, folder = tiny_sd(**FOLDERS[name])
        engines.append(Engine.load(folder, precision="fp32"))
        return pipeline, engines[-1]

    yield loaded
    for engine in engines:
        engine.close()


@pytest.mark.parametrize("guidance", [1.0, 7.5], ids=["plain", "guided"])
@pytest.mark.parametrize("sampler", CLASSES)
@pytest.mark.parametrize("name", FOLDERS)
def test_a_run_is_that_of_the_pipeline(load, name, sampler, guidance):
    """The folders name PNDM (sd1, predicting noise) and DDIM (sd2, predicting v); the request names the sampler."""
    pipeline, engine = load(name)
    pipeline.scheduler = make_scheduler(sampler, "v_prediction" if name == "sd2" else "epsilon")
    fields = {"prompt": PROMPT, "negative_prompt": NEGATIVE, "guidance_scale": guidance, "num_inference_steps": 5,
              "latents": noise()}  # fmt: skip
    assert_the_same(engine, theirs(pipeline, **fields), sampler=sampler, **fields)


@pytest.mark.parametrize(
    ("name", "class_name", "settings"),
    [
        ("sd1", "DDIMScheduler", {**DDIM, "steps_offset": 1}),
        ("sd1", "DPMSolverMultistepScheduler", {}),
        ("sd1", "EulerDiscreteScheduler", {"prediction_type": "v_prediction"}),
        ("sd2", "EulerDiscreteScheduler", {"timestep_spacing": "trailing"}),
        ("sd2", "DPMSolverMultistepScheduler", {"prediction_type": "v_prediction", "timestep_spacing": "leading"}),
        ("sd2", "DDIMScheduler", {
            "clip_sample": False, "prediction_type": "v_prediction", "rescale_betas_zero_snr": True,
            "timestep_spacing": "trailing",
        }),
    ],
)  # fmt: skip
def test_the_scheduler_of_the_folder_is_followed(tiny_sd, tmp_path, name, class_name, settings):
    pipeline, plain = tiny_sd(**FOLDERS[name])
    betas = {key: value for key, value in SETTINGS.items() if key.startswith("beta")}
    pipeline.scheduler = getattr(diffusers, class_name)(**betas, **settings)
    folder = shutil.copytree(plain, tmp_path / "model")
    pipeline.scheduler.save_pretrained(folder / "scheduler")
    fields = {"prompt": PROMPT, "guidance_scale": 3.0, "num_inference_steps": 3, "latents": noise()}
    with Engine.load(folder, precision="fp32") as engine:
        assert_the_same(engine, theirs(pipeline, **fields), **fields)


def test_defaults_are_those_of_the_pipeline(load):
    """50 steps, a guidance of 7.5, the size of the U-Net; the noise is the seed's."""
    pipeline, engine = load("sd2")
    pipeline.scheduler = make_scheduler("ddim", "v_prediction")
    start = frame_noise(7, 0, -1, [0], (8, 8, 4))
    expected = theirs(pipeline, prompt=PROMPT, latents=start)
    assert rel_rms(torch.from_numpy(engine.generate(PROMPT, seed=7, output_type="latent").frames), expected[0]) < 1e-5
    picture = engine.generate(PROMPT, seed=7)
    assert (picture.metadata["num_inference_steps"], picture.metadata["guidance_scale"]) == (50, 7.5)
    assert np.abs(picture.frames - 255 * expected[1].numpy()).max() < 0.51


def test_another_size_and_several_pictures_at_once(load):
    """Without a shift each frame is a picture of its own."""
    pipeline, engine = load("sd1")
    pipeline.scheduler = make_scheduler("dpmpp_2m", "epsilon")
    fields = {"prompt": PROMPT, "num_inference_steps": 3, "height": 24, "width": 40}
    start = noise(3, 12, 20)
    expected = theirs(pipeline, latents=start, num_images_per_prompt=3, **fields)
    assert_the_same(engine, expected, latents=start, **fields)


@pytest.mark.parametrize(("name", "sampler"), [("sd1", "ddim"), ("sd1", "euler"), ("sd2", "dpmpp_2m")])
@pytest.mark.parametrize("strength", [0.3, 0.75])
def test_video_to_video_is_img2img_of_every_frame(load, monkeypatch, name, sampler, strength):
    """The means of the encoder, noised to the level of the strength; the noise is the seed's."""
    pipeline, engine = load(name)
    img2img = StableDiffusionImg2ImgPipeline(**pipeline.components, requires_safety_checker=False)
    img2img.set_progress_bar_config(disable=True)
    img2img.scheduler = make_scheduler(sampler, "v_prediction" if name == "sd2" else "epsilon")
    video = np.random.default_rng(1).integers(0, 256, (3, 16, 16, 3), np.uint8)
    start = planar(frame_noise(7, 0, -1, range(3), (8, 8, 4)))
    monkeypatch.setattr(pipeline_stable_diffusion_img2img, "randn_tensor", lambda *args, **kwargs: start)
    with torch.no_grad():
        means = pipeline.vae.encode(planar(video / np.float32(127.5) - 1)).latent_dist.mean
    expected = theirs(
        img2img, prompt=[PROMPT] * 3, image=means * pipeline.vae.config.scaling_factor, strength=strength,
        num_inference_steps=6,
    )  # fmt: skip
    assert_the_same(engine, expected, prompt=PROMPT, video=video, strength=strength, num_inference_steps=6, seed=7,
                    sampler=sampler)  # fmt: skip


@pytest.mark.slow
def test_the_kernels_make_the_frames_of_the_pipeline(load, tiny_sd):
    """The Triton backend, its kernels in the interpreter."""
    if torch.cuda.is_available():
        pytest.skip("the kernels are interpreted only where there is no GPU")
    pipeline, _ = load("sd1")
    pipeline.scheduler = make_scheduler("ddim", "epsilon")
    fields = {"prompt": PROMPT, "guidance_scale": 1.0, "num_inference_steps": 2, "latents": noise()}
    folder = read_diffusers_folder(tiny_sd(**FOLDERS["sd1"])[1])
    with Engine(folder, Choice("triton", torch.device("cpu"), "fp32", "interpreted")) as engine:
        made = engine.generate(sampler="ddim", output_type="float", **fields).frames
    assert psnr(made, theirs(pipeline, **fields)[1]) > 50
