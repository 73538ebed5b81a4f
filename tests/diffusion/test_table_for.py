"""Tables of configs: with the settings of public model folders, what diffusers' own schedulers compute, in float64."""

from __future__ import annotations

import dataclasses
import json

import diffusers
import numpy as np
import pytest
import torch
from support.schedulers import CLASSES, in_double, our_loop, rel_rms, their_loop, toy

from pylumiere.config.sampling import SAMPLERS, TIMESTEP_SPACINGS, ScheduleConfig
from pylumiere.diffusion.samplers import make_table, sample, table_for
from pylumiere.diffusion.schedules import make_schedule, schedule_of
from pylumiere.diffusion.windows import WindowPlan, frame_noise, sample_clip
from pylumiere.errors import InvalidRequest

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers on numpy 2

BETA_SCHEDULES = {"cosine": "squaredcos_cap_v2", "linear": "linear", "scaled_linear": "scaled_linear"}
# What the folders of Stable Diffusion 1.5 (and ModelScope, ZeroScope), 2.1 and AnimateDiff say.
LATENT = ScheduleConfig(
    "scaled_linear", "epsilon", beta_start=0.00085, beta_end=0.012, timestep_spacing="leading", steps_offset=1,
    final_alpha="first", ddim_target="stride", initial_noise="one", clip=None,
)  # fmt: skip
SETTINGS = {
    "sd-1.5": LATENT,
    "sd-2.1": dataclasses.replace(LATENT, prediction_type="v_prediction"),
    "animatediff": dataclasses.replace(LATENT, name="linear", timestep_spacing="linspace"),
}
# Not: one step of linspace, which starts at the cleanest timestep in diffusers, and DPM-Solver++ from timestep 1000 of
# 1000. Both are in test_samplers.py.
CASES = [
    (name, sampler, spacing, steps)
    for name in SETTINGS
    for sampler in SAMPLERS
    for spacing in TIMESTEP_SPACINGS
    for steps in (1, 2, 20, 25, 50, 999)
    if (sampler == "dpmpp_2m" or (spacing, steps) != ("linspace", 1))
    and (sampler, spacing, steps) != ("dpmpp_2m", "leading", 999)
]


def their_scheduler(monkeypatch, sampler, config, *, as_shipped=False):
    """diffusers' class of that name, with the settings of a ScheduleConfig."""
    scheduler = getattr(diffusers, CLASSES[sampler]) if as_shipped else in_double(monkeypatch, CLASSES[sampler])
    start, end = (None, None) if config.name == "cosine" else config.betas
    settings = {
        "num_train_timesteps": config.num_train_timesteps, "beta_start": start, "beta_end": end,
        "beta_schedule": BETA_SCHEDULES[config.name], "prediction_type": config.prediction_type,
        "timestep_spacing": config.timestep_spacing, "steps_offset": config.steps_offset,
        "rescale_betas_zero_snr": config.zero_terminal_snr,
    }  # fmt: skip
    if sampler in ("ddpm", "ddim"):
        settings |= {"clip_sample": config.clip is not None, "clip_sample_range": config.clip}
    if sampler == "ddim":
        settings["set_alpha_to_one"] = config.final_alpha == "one"
    return scheduler(**settings)


def agree(monkeypatch, sampler, config, steps, *, tolerance, as_shipped=False):
    """The same timesteps, and from the same noise through the same denoiser the same end."""
    if sampler == "euler":
        start = "one" if config.timestep_spacing == "leading" else "sigma"
        config = dataclasses.replace(config, initial_noise=start)
    noises = np.random.default_rng(steps).normal(size=(steps + 1, 1, 40))
    noises[-1] = 0  # DDPM's last: diffusers never takes less than 1e-10 of it
    theirs = their_scheduler(monkeypatch, sampler, config, as_shipped=as_shipped)
    expected, timesteps = their_loop(monkeypatch, theirs, steps, noises)
    table = table_for(config, sampler, steps)
    np.testing.assert_array_equal(table.timesteps, timesteps.astype(np.float32))
    assert rel_rms(our_loop(table, noises, config.clip), expected) < tolerance


@pytest.mark.parametrize("name, sampler, spacing, steps", CASES)
def test_public_settings_give_what_diffusers_gives(monkeypatch, name, sampler, spacing, steps):
    config = dataclasses.replace(SETTINGS[name], timestep_spacing=spacing)
    agree(monkeypatch, sampler, config, steps, tolerance=1e-12)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("name", SETTINGS)
def test_public_settings_agree_with_diffusers_as_shipped(monkeypatch, name, sampler):
    agree(monkeypatch, sampler, SETTINGS[name], 25, tolerance=1e-6, as_shipped=True)


@pytest.mark.parametrize("spacing", TIMESTEP_SPACINGS)
@pytest.mark.parametrize("prediction_type", ["v_prediction", "sample", "epsilon"])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_zero_terminal_snr_is_that_of_diffusers(monkeypatch, sampler, prediction_type, spacing):
    """Euler and DPM-Solver++ divide by alpha or take its logarithm; theirs is 2^-12 there, and so is ours."""
    config = dataclasses.replace(
        LATENT, zero_terminal_snr=True, prediction_type=prediction_type, timestep_spacing=spacing
    )
    if prediction_type == "epsilon" and sampler in ("ddpm", "ddim") and spacing != "leading":
        with pytest.raises(InvalidRequest, match="where alpha is 0"):
            table_for(config, sampler, 20)
    else:
        agree(monkeypatch, sampler, config, 20, tolerance=1e-11)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_cosine_settings_give_what_diffusers_gives(monkeypatch, sampler):
    config = ScheduleConfig("cosine", "v_prediction", ddim_target="stride", initial_noise="one", clip=None)
    agree(monkeypatch, sampler, config, 30, tolerance=1e-10)


def test_a_clip_bounds_x0_as_in_diffusers(monkeypatch):
    config = dataclasses.replace(LATENT, clip=0.7)
    agree(monkeypatch, "ddpm", config, 20, tolerance=1e-12)
    noises = np.random.default_rng(0).normal(size=(21, 1, 40))
    bounded, free = (our_loop(table_for(config, "ddpm", 20), noises, clip) for clip in (0.7, None))
    assert np.abs(bounded).max() <= 0.7 < np.abs(free).max()


def test_euler_ancestral_is_ddpm(monkeypatch):
    config = dataclasses.replace(LATENT, timestep_spacing="leading", final_alpha="one")
    noises = np.random.default_rng(0).normal(size=(21, 1, 40))
    theirs = in_double(monkeypatch, "EulerAncestralDiscreteScheduler")(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", timestep_spacing="leading", steps_offset=1
    )
    expected, _ = their_loop(monkeypatch, theirs, 20, noises)
    assert rel_rms(our_loop(table_for(config, "ddpm", 20), noises, None), expected) < 1e-12


# ---- configs ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("name", ["cosine", "linear", "flow"])
def test_a_config_of_four_fields_gives_the_table_that_it_gave(name, sampler):
    text = json.dumps({"name": name, "prediction_type": "sample", "logsnr_shift": -4.0, "num_train_timesteps": 1000})
    config = ScheduleConfig.from_dict(json.loads(text))
    for steps, strength in ((30, 1.0), (7, 0.5)):
        ours = table_for(config, sampler, steps, strength=strength)
        plain = make_table(sampler, make_schedule(name, 1000, -4.0), "sample", steps, strength=strength)
        for field in dataclasses.fields(ours):
            np.testing.assert_array_equal(getattr(ours, field.name), getattr(plain, field.name))
    assert config.clip == 1.0


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"name": "sigmoid"}, "schedule 'sigmoid' is not one of cosine, linear, flow, scaled_linear"),
        ({"timestep_spacing": "karras"}, "timestep_spacing 'karras' is not one of trailing, leading, linspace"),
        ({"final_alpha": "zero"}, "final_alpha 'zero' is not one of one, first"),
        ({"ddim_target": 1}, "ScheduleConfig.ddim_target: expected str, got 1"),
        ({"initial_noise": "two"}, "initial_noise 'two' is not one of sigma, one"),
        ({"beta_start": 1e-4}, "beta_start=0.0001: schedule 'cosine' has none; linear, scaled_linear have"),
        ({"name": "flow", "beta_end": 0.1}, "beta_end=0.1: schedule 'flow' has none"),
        ({"name": "linear", "beta_start": 0.0}, "beta_start=0.0, beta_end=0.02: allowed are 0 < beta_start"),
        ({"name": "linear", "beta_end": 1.0}, "beta_start=0.0001, beta_end=1.0: allowed are 0 < beta_start"),
        ({"name": "scaled_linear", "beta_start": 0.5}, "beta_start=0.5, beta_end=0.012: allowed are 0 < beta_start"),
        ({"name": "flow", "zero_terminal_snr": True}, "zero_terminal_snr=True: a flow takes False alone"),
        ({"name": "flow", "final_alpha": "first"}, "final_alpha='first': a flow takes 'one' alone"),
        ({"name": "flow", "ddim_target": "stride"}, "ddim_target='stride': a flow takes 'next' alone"),
        ({"zero_terminal_snr": True, "num_train_timesteps": 1}, "num_train_timesteps=1: needs at least 2"),
        ({"steps_offset": 1000}, "steps_offset=1000 is not in 0..999"),
        ({"steps_offset": -1}, "steps_offset=-1 is not in 0..999"),
        ({"clip": 0.0}, "clip=0.0 is neither in 0..1000 without 0 nor null"),
        ({"clip": float("nan")}, "ScheduleConfig.clip: nan is not finite"),
    ],
)
def test_a_config_names_what_it_refuses(fields, message):
    with pytest.raises(ValueError) as error:
        ScheduleConfig.from_dict(fields)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("config", [*SETTINGS.values(), ScheduleConfig("flow", "flow", steps_offset=3, clip=2.5)])
def test_a_config_round_trips_through_json(config):
    assert ScheduleConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_what_is_ddims_alone_changes_no_other_sampler():
    plain = dataclasses.replace(LATENT, final_alpha="one", ddim_target="next")
    for sampler in ("ddpm", "euler", "dpmpp_2m"):
        np.testing.assert_array_equal(table_for(LATENT, sampler, 30).coef, table_for(plain, sampler, 30).coef)
    assert (table_for(LATENT, "ddim", 30).coef[-1] != table_for(plain, "ddim", 30).coef[-1]).any()


def test_strides_differ_from_next_where_steps_are_uneven():
    even, uneven = (dataclasses.replace(LATENT, timestep_spacing=spacing) for spacing in ("leading", "linspace"))
    for config, equal in ((even, True), (uneven, False)):
        coef, next_coef = (
            table_for(dataclasses.replace(config, ddim_target=target), "ddim", 25).coef for target in ("stride", "next")
        )
        assert np.array_equal(coef, next_coef) == equal


def test_noise_of_size_one_is_for_a_start_from_noise():
    schedule = schedule_of(LATENT)
    whole, part = (table_for(LATENT, "ddim", 20, strength=strength) for strength in (1.0, 0.5))
    assert whole.init_sigma == 1.0
    t = int(part.timesteps[0])
    assert (part.init_alpha, part.init_sigma) == (schedule.alphas[t], schedule.sigmas[t])
    one_step = table_for(dataclasses.replace(LATENT, timestep_spacing="trailing"), "ddim", 1, strength=0.5)
    assert one_step.init_sigma == schedule.sigmas[-1]  # one step is the fewest, and it starts from a clip


@pytest.mark.parametrize("strength", [0.3, 0.75])
def test_strength_is_a_diffusers_pipelines(monkeypatch, strength):
    """Image to image: the clip is noised to the first timestep that is run; DDIM's strides stay those of all steps."""
    config, steps = dataclasses.replace(SETTINGS["animatediff"]), 20
    theirs = their_scheduler(monkeypatch, "ddim", config)
    theirs.set_timesteps(steps)
    clean, noise = np.random.default_rng(0).normal(size=(2, 1, 40))
    run_them = theirs.timesteps[steps - int(steps * strength) :]
    x = theirs.add_noise(torch.from_numpy(clean), torch.from_numpy(noise), run_them[:1])
    for timestep in run_them:
        x = theirs.step(torch.from_numpy(toy(x.numpy(), float(timestep))), timestep, x).prev_sample
    table = table_for(config, "ddim", steps, strength=strength)
    assert rel_rms(sample(toy, lambda step: noise, table, clean=clean), x) < 1e-12


@pytest.mark.parametrize("name", ["sd-1.5", "animatediff"])
def test_a_clip_in_windows_may_end_at_timestep_0(monkeypatch, name):
    """The streamed sampler runs the last row like any other: with windows of 4 frames, what diffusers makes of each."""
    config, frame_shape, frames = SETTINGS[name], (2, 3, 4), 10
    table = table_for(config, "ddim", 12)
    assert table.coef[-1, 2] != 0
    plan = WindowPlan(frames, 4, 2)

    def denoise(x, timesteps, windows, indices):
        rows = [[toy(frame, t) for frame in window] for window, t in zip(x.astype(np.float64), timesteps, strict=True)]
        return np.asarray(rows, np.float32)[None]

    chunks = sample_clip(denoise, num_frames=frames, frame_shape=frame_shape, table=table, plan=plan, seed=7, stage=0,
                         clip=config.clip)  # fmt: skip
    clip = np.concatenate([chunk for _, chunk in chunks])
    theirs = their_scheduler(monkeypatch, "ddim", config)
    for index, frame in enumerate(clip):
        noises = np.zeros((13, *frame_shape))
        noises[0] = frame_noise(7, 0, -1, [index], frame_shape)[0]
        expected, _ = their_loop(monkeypatch, theirs, 12, noises)
        assert rel_rms(frame, expected) < 1e-5
