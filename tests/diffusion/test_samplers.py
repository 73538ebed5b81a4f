"""Sampler tables against the papers' formulas in float64, against diffusers, and on data whose denoiser is known."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
)
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from support.schedulers import rel_rms

from pylumiere.config.sampling import PREDICTION_TYPES, SAMPLERS
from pylumiere.config.sampling import TIMESTEP_SPACINGS as SPACINGS
from pylumiere.diffusion.guidance import dynamic_threshold
from pylumiere.diffusion.samplers import apply_step, make_table, sample
from pylumiere.diffusion.schedules import make_schedule
from pylumiere.errors import InvalidRequest

COSINE, LINEAR, FLOW = (make_schedule(name) for name in ("cosine", "linear", "flow"))
SCHEDULES = {"cosine": COSINE, "linear": LINEAR, "flow": FLOW, "shifted": make_schedule("cosine", logsnr_shift=-4.0)}
DIFFUSERS_BETAS = {"cosine": "squaredcos_cap_v2", "linear": "linear"}


def levels(schedule, table):
    """alpha and sigma of every step and of the clean end, from the timesteps that the table names."""
    if schedule.is_flow:
        sigmas = np.append(table.timesteps.astype(np.float64) / schedule.num_train_timesteps, 0)
        return 1 - sigmas, sigmas
    index = table.timesteps.astype(int)
    return np.append(schedule.alphas[index], 1), np.append(schedule.sigmas[index], 0)


def output_of(prediction_type, x, x0, alpha, sigma):
    """What a network that sees x0 in x would answer."""
    noise = (x - alpha * x0) / sigma
    return {"epsilon": noise, "sample": x0, "v_prediction": alpha * noise - sigma * x0, "flow": noise - x0}[
        prediction_type
    ]


def run(table, outs, noises, x, clip=math.inf):
    """The states after each step."""
    x0, states = None, []
    for index in range(len(table)):
        x, x0 = apply_step(table, index, x, outs[index], x0, noises[index], clip)
        states.append(x)
    return states


# ---- against formulas in float64 -------------------------------------------------------------------------------------


def paper_x0(prediction_type, x, out, a, s):
    if prediction_type == "epsilon":
        return (x - s * out) / a
    if prediction_type == "sample":
        return out
    if prediction_type == "v_prediction":
        return (a * x - s * out) / (a * a + s * s)
    return (x - s * out) / (a + s)


def paper_ddpm(x, x0, z, a, s, a1, s1, large):
    """x' given x and x0, by conditioning a Gaussian: x = (a / a1) x' + step noise."""
    slope = a / a1
    joint = np.array([[s1 * s1, slope * s1 * s1], [slope * s1 * s1, s * s]])  # covariance of (x', x) given x0
    gain = joint[0, 1] / joint[1, 1]
    variance = joint[0, 0] - gain * joint[0, 1]
    if large:
        variance = s * s - slope * slope * s1 * s1
    return a1 * x0 + gain * (x - a * x0) + math.sqrt(max(variance, 0)) * z


def paper_ddim(x, x0, z, a, s, a1, s1, eta):
    """Song et al., equations 12 and 16."""
    deviation = eta * (s1 / s) * math.sqrt(max(0, s * s - (a / a1 * s1) ** 2))
    return a1 * x0 + math.sqrt(s1 * s1 - deviation * deviation) * (x - a * x0) / s + deviation * z


def paper_euler(x, x0, a, s, a1, s1):
    """Karras et al. 2022, algorithm 1, on x / a. On a flow: a straight line along the velocity noise - x0."""
    if a == 0:
        return x + (s1 - s) * (x - x0) / s
    y, z, z1 = x / a, s / a, s1 / a1
    return a1 * (y + (z1 - z) * (y - x0) / z)


def paper_dpmpp_2m(x, x0, previous, a, s, a1, s1, last):
    """Lu et al., algorithm 2. `previous` is (x0, log(alpha / sigma)) of the step before."""
    if last:
        return x0
    now = math.log(a / s) if a else -math.inf
    h = math.log(a1 / s1) - now
    mix = x0
    if previous is not None and math.isfinite(previous[1]):
        ratio = (now - previous[1]) / h
        mix = (1 + 1 / (2 * ratio)) * x0 - 1 / (2 * ratio) * previous[0]
    return s1 / s * x - a1 * math.expm1(-h) * mix


VARIANTS = [
    ("ddpm", {}), ("ddpm", {"variance": "fixed_large"}), ("ddim", {}), ("ddim", {"eta": 0.6}), ("ddim", {"eta": 1.0}),
    ("dpmpp_2m", {}), ("euler", {}),
]  # fmt: skip
# A flow starts at alpha = 0, where an epsilon prediction says nothing about x0.
CASES = [
    pytest.param(sampler, options, name, prediction_type, id="-".join([sampler, *options, name, prediction_type]))
    for sampler, options in VARIANTS
    for name in SCHEDULES
    for prediction_type in PREDICTION_TYPES
    if name != "flow" or prediction_type != "epsilon"
]


@pytest.mark.parametrize("sampler, options, name, prediction_type", CASES)
@pytest.mark.parametrize("clip", [1.0, math.inf])
def test_tables_are_the_papers_formulas(sampler, options, name, prediction_type, clip):
    schedule = SCHEDULES[name]
    table = make_table(sampler, schedule, prediction_type, 24, **options)
    alphas, sigmas = levels(schedule, table)
    if schedule.is_flow:  # without the rounding of the timesteps to float32
        sigmas = 1 - np.arange(25) / 24
        alphas = 1 - sigmas
    rng = np.random.default_rng(0)
    outs, noises, x = rng.normal(size=(24, 50)), rng.normal(size=(24, 50)), rng.normal(size=50)
    states = run(table, outs, noises, x, clip)
    previous = None
    for i in range(24):
        a, s, a1, s1 = alphas[i], sigmas[i], alphas[i + 1], sigmas[i + 1]
        x0 = np.clip(paper_x0(prediction_type, x, outs[i], a, s), -clip, clip)
        if i == 23:
            expected = x0
        elif sampler == "ddpm":
            expected = paper_ddpm(x, x0, noises[i], a, s, a1, s1, "variance" in options)
        elif sampler == "ddim":
            expected = paper_ddim(x, x0, noises[i], a, s, a1, s1, options.get("eta", 0))
        elif sampler == "euler":
            expected = paper_euler(x, x0, a, s, a1, s1)
        else:
            expected = paper_dpmpp_2m(x, x0, previous, a, s, a1, s1, last=False)
        previous = (x0, math.log(a / s) if a else -math.inf)
        assert rel_rms(states[i], expected) < 1e-11
        x = states[i]


def test_unclipped_euler_follows_the_networks_velocity():
    table = make_table("euler", FLOW, "flow", 10)
    rng = np.random.default_rng(1)
    outs, x = rng.normal(size=(10, 30)), rng.normal(size=30)
    expected = x.copy()
    for out in outs:
        expected = expected - 0.1 * out
    np.testing.assert_allclose(run(table, outs, [None] * 10, x)[-1], expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("prediction_type", ["flow", "v_prediction", "sample"])
def test_euler_is_ddim_on_a_flow(shift, prediction_type):
    schedule = make_schedule("flow", shift=shift)
    euler, ddim = (make_table(sampler, schedule, prediction_type, 12).coef for sampler in ("euler", "ddim"))
    np.testing.assert_array_equal(euler, ddim)


# ---- against diffusers -----------------------------------------------------------------------------------------------
# Random outputs and states, clipped where the scheduler can, whole trajectories. diffusers computes in float32 from a
# float32 product of alphas: its sigma^2 = 1 - alpha^2 is off by up to an eps of 1, near the clean end by 1e-3 of itself
# (beta is 1e-4 there, or 4e-5). Measured as shipped: up to 2.7e-5. Given our levels in float64: 1e-13.

TOLERANCE = 1e-4
PREDICTIONS_THERE = ("epsilon", "v_prediction", "sample")


class FixedNoise:
    """Gives diffusers our noise."""

    def __init__(self, monkeypatch, module, noises):
        self.noises = iter(noises)
        monkeypatch.setattr(f"diffusers.schedulers.{module}.randn_tensor", lambda *a, **k: next(self.noises))


def trajectory(dtype, steps, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(3, steps, 2, 3, 4, 5, dtype=dtype, generator=generator)


def with_our_levels(scheduler, schedule):
    scheduler.alphas_cumprod = torch.from_numpy(schedule.alphas**2)
    scheduler.one = scheduler.final_alpha_cumprod = torch.ones((), dtype=torch.float64)
    return scheduler


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, TOLERANCE), (torch.float64, 1e-12)], ids=["as is", "f64"])
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("prediction_type", PREDICTIONS_THERE)
@pytest.mark.parametrize("name", DIFFUSERS_BETAS)
@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
def test_ddpm_is_that_of_diffusers(monkeypatch, name, prediction_type, spacing, variance, dtype, tolerance):
    steps = 30
    theirs = DDPMScheduler(1000, beta_schedule=DIFFUSERS_BETAS[name], prediction_type=prediction_type,
                           timestep_spacing=spacing, variance_type=variance, clip_sample=True)  # fmt: skip
    if dtype == torch.float64:
        with_our_levels(theirs, SCHEDULES[name])
    theirs.set_timesteps(steps)
    table = make_table("ddpm", SCHEDULES[name], prediction_type, steps, timestep_spacing=spacing, variance=variance)
    np.testing.assert_array_equal(table.timesteps, theirs.timesteps.numpy())
    outs, noises, start = trajectory(dtype, steps)
    # Where the last timestep is not 0, diffusers adds noise to the clean sample; ours is x0.
    noises[-1] = 0
    FixedNoise(monkeypatch, "scheduling_ddpm", noises)
    states = run(table, outs, noises, start[0], 1.0)
    x = start[0]
    for i, t in enumerate(theirs.timesteps):
        x = theirs.step(outs[i], t, x).prev_sample
        assert rel_rms(states[i], x) < tolerance


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, TOLERANCE), (torch.float64, 1e-12)], ids=["as is", "f64"])
@pytest.mark.parametrize("spacing", ["trailing", "leading"])
@pytest.mark.parametrize("prediction_type", PREDICTIONS_THERE)
@pytest.mark.parametrize("name", DIFFUSERS_BETAS)
@pytest.mark.parametrize("eta", [0.0, 0.7])
def test_ddim_is_that_of_diffusers(name, prediction_type, spacing, eta, dtype, tolerance):
    """With steps that divide 1000: otherwise diffusers' DDIM steps to a timestep other than the next one's."""
    steps = 25
    theirs = DDIMScheduler(1000, beta_schedule=DIFFUSERS_BETAS[name], prediction_type=prediction_type,
                           timestep_spacing=spacing, clip_sample=True, set_alpha_to_one=True)  # fmt: skip
    if dtype == torch.float64:
        with_our_levels(theirs, SCHEDULES[name])
    theirs.set_timesteps(steps)
    table = make_table("ddim", SCHEDULES[name], prediction_type, steps, timestep_spacing=spacing, eta=eta)
    np.testing.assert_array_equal(table.timesteps, theirs.timesteps.numpy())
    outs, noises, start = trajectory(dtype, steps, seed=1)
    states = run(table, outs, noises, start[0], 1.0)
    x = start[0]
    for i, t in enumerate(theirs.timesteps):
        x = theirs.step(outs[i], t, x, eta=eta, use_clipped_model_output=True, variance_noise=noises[i]).prev_sample
        assert rel_rms(states[i], x) < tolerance


def test_ddim_on_zero_terminal_snr_is_that_of_diffusers():
    schedule = make_schedule("linear", zero_terminal_snr=True)
    theirs = DDIMScheduler(1000, beta_schedule="linear", prediction_type="v_prediction", timestep_spacing="trailing",
                           rescale_betas_zero_snr=True, clip_sample=False)  # fmt: skip
    theirs = with_our_levels(theirs, schedule)
    theirs.set_timesteps(20)
    table = make_table("ddim", schedule, "v_prediction", 20)
    outs, noises, start = trajectory(torch.float64, 20)
    states = run(table, outs, noises, start[0])
    x = start[0]
    for i, t in enumerate(theirs.timesteps):
        x = theirs.step(outs[i], t, x).prev_sample
        assert rel_rms(states[i], x) < 1e-11


@pytest.mark.parametrize("steps", [1, 2, 8, 30])
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("prediction_type", PREDICTIONS_THERE)
@pytest.mark.parametrize("name", DIFFUSERS_BETAS)
def test_dpmpp_2m_is_that_of_diffusers(name, prediction_type, spacing, steps):
    theirs = DPMSolverMultistepScheduler(
        1000, beta_schedule=DIFFUSERS_BETAS[name], prediction_type=prediction_type, timestep_spacing=spacing,
        solver_order=2, algorithm_type="dpmsolver++", solver_type="midpoint", final_sigmas_type="zero",
        thresholding=True, sample_max_value=1.0,
    )  # fmt: skip
    theirs.set_timesteps(steps)
    table = make_table("dpmpp_2m", SCHEDULES[name], prediction_type, steps, timestep_spacing=spacing)
    np.testing.assert_array_equal(table.timesteps, theirs.timesteps.numpy())
    outs, noises, start = trajectory(torch.float32, steps, seed=2)
    states = run(table, outs, noises, start[0], 1.0)
    x = start[0]
    for i, t in enumerate(theirs.timesteps):
        x = theirs.step(outs[i], t, x).prev_sample
        assert rel_rms(states[i], x) < TOLERANCE


@pytest.mark.parametrize("spacing", ["linspace", "trailing"])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_euler_is_that_of_diffusers(shift, spacing):
    steps = 28
    theirs = FlowMatchEulerDiscreteScheduler(1000, shift=shift)
    # diffusers' own grid is linspace; its Flux pipeline passes the trailing one.
    theirs.set_timesteps(steps, sigmas=None if spacing == "linspace" else np.linspace(1, 1 / steps, steps))
    table = make_table("euler", make_schedule("flow", shift=shift), "flow", steps, timestep_spacing=spacing)
    np.testing.assert_allclose(table.timesteps, theirs.timesteps.numpy(), rtol=5e-7)
    outs, noises, start = trajectory(torch.float32, steps, seed=3)
    states = run(table, outs, noises, start[0])
    x = start[0]
    for i, t in enumerate(theirs.timesteps):
        x = theirs.step(outs[i], t, x).prev_sample
        assert rel_rms(states[i], x) < 2e-6


def test_dpmpp_2m_on_a_flow_is_that_of_diffusers():
    """Their levels replaced by ours, since their grid leaves out pure noise."""
    theirs = DPMSolverMultistepScheduler(
        1000, prediction_type="flow_prediction", use_flow_sigmas=True, final_sigmas_type="zero"
    )
    table = make_table("dpmpp_2m", make_schedule("flow", shift=2.0), "flow", 20)
    theirs.set_timesteps(20)
    theirs.sigmas = torch.from_numpy(np.append(table.timesteps / 1000, 0).astype(np.float32))
    outs, noises, start = trajectory(torch.float32, 20)
    states = run(table, outs, noises, start[0])
    x = start[0]
    for i, t in enumerate(theirs.timesteps):
        x = theirs.step(outs[i], t, x).prev_sample
        assert rel_rms(states[i], x) < 1e-5


def test_dynamic_thresholding_is_that_of_diffusers():
    """diffusers takes its quantile over a batch element; an element is one frame here."""
    theirs = DDPMScheduler(1000, beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction",
                           timestep_spacing="trailing", thresholding=True, dynamic_thresholding_ratio=0.9,
                           sample_max_value=1.5)  # fmt: skip
    with_our_levels(theirs, COSINE).set_timesteps(1)
    x, out = torch.randn(2, 4, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    table = make_table("ddim", COSINE, "v_prediction", 1)
    clip = functools.partial(dynamic_threshold, percentile=0.9, ceiling=1.5)
    _, x0 = apply_step(table, 0, x, out, clip=clip)
    assert rel_rms(x0, theirs.step(out, 999, x).pred_original_sample) < 1e-12


# ---- order of convergence: data N(0, c^2), whose denoiser and whose ODE are known ------------------------------------


def gaussian_error(sampler, schedule, steps, c, start, stop):
    """Relative error at share `stop` of the schedule when the exact denoiser is run from share `start`.

    The ODE keeps x in units of its standard deviation sqrt(a^2 c^2 + s^2).
    """
    table = make_table(sampler, schedule, "sample", steps)
    alphas, sigmas = levels(schedule, table)
    spread = np.sqrt((alphas * c) ** 2 + sigmas**2)
    first, last = round(steps * start), round(steps * stop)
    x, x0 = np.array([1.0]), None
    for i in range(first, last):
        out = alphas[i] * c * c / spread[i] ** 2 * x
        if i == first and x0 is None:
            x0 = out  # start the multistep history with a first-order step: D1 = 0
        x, x0 = apply_step(table, i, x, out, x0)
    return abs(x[0] / (spread[last] / spread[first]) - 1)


@pytest.mark.parametrize("sampler, name, order", [
    ("ddim", "linear", 1), ("ddim", "cosine", 1), ("ddim", "flow", 1), ("euler", "flow", 1),
    ("dpmpp_2m", "linear", 2), ("dpmpp_2m", "cosine", 2), ("dpmpp_2m", "flow", 2),
])  # fmt: skip
@pytest.mark.parametrize("c", [0.5, 2.0])
def test_order_of_convergence(sampler, name, order, c):
    """Between 3/4 and 1/4 of the schedule: both ends of log-SNR are infinite, where no method has its order."""
    options = {"beta_start": 1e-4 / 64, "beta_end": 0.02 / 64} if name == "linear" else {}
    schedule = make_schedule(name, 64_000, **options)
    errors = [gaussian_error(sampler, schedule, steps, c, 0.25, 0.75) for steps in (40, 80, 160, 320)]
    assert errors[-1] > 1e-12
    rates = -np.diff(np.log2(errors))
    assert abs(rates[-1] - order) < 0.12, (errors, rates)


def test_second_order_is_worth_it_in_few_steps():
    def final(sampler, steps):
        table = make_table(sampler, COSINE, "sample", steps)
        alphas, sigmas = levels(COSINE, table)
        c = 0.5

        def denoise(x, timestep):
            i = table.timesteps.tolist().index(timestep)
            return alphas[i] * c * c / ((alphas[i] * c) ** 2 + sigmas[i] ** 2) * x

        result = sample(denoise, lambda step: np.ones(1), table)
        return abs(result[0] / c - 1)

    assert final("dpmpp_2m", 20) < final("ddim", 20) / 3


# ---- DDPM: moments ---------------------------------------------------------------------------------------------------


def gaussian_moments(table, alphas, sigmas, mean, variance):
    """Mean and variance of every state, when the exact denoiser of N(mean, variance) is used. Linear, so exact."""
    m, s2, rows = alphas[0] * mean, alphas[0] ** 2 * variance + sigmas[0] ** 2, []
    for i, (p, q, n) in enumerate(table.coef[:, [2, 3, 5]]):
        gain = alphas[i] * variance / (alphas[i] ** 2 * variance + sigmas[i] ** 2)
        offset = mean - gain * alphas[i] * mean
        m, s2 = p * m + q * (gain * m + offset), (p + q * gain) ** 2 * s2 + n * n
        rows.append((m, s2))
    return np.array(rows)


@pytest.mark.parametrize("steps", [3, 10, 100])
@pytest.mark.parametrize("sampler, options, variance, name", [
    *(("ddpm", {"variance": "fixed_small"}, 0.0, name) for name in SCHEDULES),
    *(("ddim", {"eta": 1.0}, 0.0, name) for name in SCHEDULES),
    # x keeps unit variance where powers sum to one: not on a flow.
    *(("ddpm", {"variance": "fixed_large"}, 1.0, name) for name in SCHEDULES if name != "flow"),
])  # fmt: skip
def test_ddpm_moments_are_exact_where_its_variance_is(sampler, options, variance, name, steps):
    """Small variance for a point, large for unit Gaussians: every state has the forward process's moments."""
    schedule = SCHEDULES[name]
    table = make_table(sampler, schedule, "sample", steps, **options)
    alphas, sigmas = levels(schedule, table)
    rows = gaussian_moments(table, alphas, sigmas, 0.7, variance)
    expected = np.stack([alphas[1:] * 0.7, alphas[1:] ** 2 * variance + sigmas[1:] ** 2], 1)
    if variance:
        expected[-1, 1] = rows[-1, 1]  # the last row returns the mean of x0, not a draw
    np.testing.assert_allclose(rows, expected, rtol=1e-6 if schedule.is_flow else 1e-10, atol=1e-15)


@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large"])
@pytest.mark.parametrize("variance", [0.25, 4.0])
def test_ddpm_moments_converge_for_other_gaussians(variance_type, variance):
    errors = []
    for steps in (100, 200, 400, 800):
        schedule = make_schedule("linear", 8000, beta_start=1e-4 / 8, beta_end=0.02 / 8)
        table = make_table("ddpm", schedule, "sample", steps, variance=variance_type)
        alphas, sigmas = levels(schedule, table)
        middle = round(steps * 0.75)
        s2 = gaussian_moments(table, alphas, sigmas, 0.0, variance)[middle - 1, 1]
        errors.append(abs(s2 / (alphas[middle] ** 2 * variance + sigmas[middle] ** 2) - 1))
    assert all(1.7 < a / b < 2.3 for a, b in itertools.pairwise(errors)), errors


def test_ddpm_draws_have_the_computed_moments():
    """The table's noise, drawn: 40,000 samples of N(0.3, 1)."""
    table = make_table("ddpm", LINEAR, "epsilon", 20, variance="fixed_large")
    alphas, sigmas = levels(LINEAR, table)
    rng = np.random.default_rng(0)

    def denoise(x, timestep):
        i = table.timesteps.tolist().index(timestep)
        x0 = 0.3 + alphas[i] / (alphas[i] ** 2 + sigmas[i] ** 2) * (x - alphas[i] * 0.3)
        return output_of("epsilon", x, x0, alphas[i], sigmas[i])

    draws = sample(denoise, lambda step: rng.normal(size=40_000), table)
    expected = gaussian_moments(table, alphas, sigmas, 0.3, 1.0)[-1]
    # The start lacks alpha * 0.3, which is 0.002.
    assert abs(draws.mean() - expected[0]) < 0.03
    assert abs(draws.var() / expected[1] - 1) < 0.03


# ---- properties ------------------------------------------------------------------------------------------------------


@st.composite
def tables(draw, prediction_types=PREDICTION_TYPES, **fixed):
    name = draw(st.sampled_from(["cosine", "linear", "scaled_linear", "flow"]))
    sampler = fixed.get("sampler") or draw(st.sampled_from(SAMPLERS))
    options = {} if name == "flow" else {"zero_terminal_snr": draw(st.booleans())}
    count = draw(st.integers(2, 1000))
    schedule = make_schedule(name, count, draw(st.floats(-6, 6)), **options)
    spacing = draw(st.sampled_from(SPACINGS))
    # Euler's real timesteps are known to float32 only; diffusers' are the oracle there.
    assume(sampler != "euler" or spacing != "linspace" or name == "flow")
    steps = draw(st.integers(1, count))
    eta = draw(st.floats(0, 1)) if sampler == "ddim" and "eta" not in fixed else 0.0
    prediction_type = draw(st.sampled_from(prediction_types))
    try:
        table = make_table(
            sampler, schedule, prediction_type, steps, eta=eta, timestep_spacing=spacing,
            strength=draw(st.floats(0, 1, exclude_min=True)),
        )  # fmt: skip
    except InvalidRequest as error:
        # Timesteps that repeat, one step that is no step, and epsilon at alpha = 0: all told by name.
        assume("spacing" not in str(error) and "epsilon" not in str(error))
        raise
    if sampler in ("euler", "dpmpp_2m") and name != "flow" and schedule.alphas[-1] == 0:
        schedule = dataclasses.replace(
            schedule, alphas=np.append(schedule.alphas[:-1], 2.0**-12),
            sigmas=np.append(schedule.sigmas[:-1], math.sqrt(1 - 2.0**-24)),
        )  # fmt: skip
    return schedule, prediction_type, table


@settings(deadline=None)
@given(tables())
def test_tables_are_finite_and_end_in_x0(made):
    schedule, _, table = made
    assert np.isfinite(table.coef).all() and np.isfinite(table.coef.astype(np.float32)).all()
    np.testing.assert_array_equal(table.coef[-1, 2:], [0, 1, 0, 0])
    assert table.coef[0, 4] == 0 and (table.coef[:, 5] >= 0).all()
    assert (np.diff(table.timesteps) < 0).all() and table.timesteps[-1] >= 0
    assert table.timesteps.dtype == np.float32 and table.coef.dtype == np.float64
    assert table.uses_previous == table.coef[:, 4].any() and table.stochastic == table.coef[:, 5].any()
    assert table.init_sigma > 0 and table.init_alpha >= 0


@settings(deadline=None)
@given(tables())
def test_coefficients_keep_the_signal(made):
    """With the true x0 at each step, the mean of x' is a' x0 + p * (noise part): p a + q + r = a'."""
    schedule, _, table = made
    alphas, _ = levels(schedule, table)
    if schedule.is_flow:
        alphas = 1 - np.append(table.timesteps.astype(np.float64) / schedule.num_train_timesteps, 0)
    p, q, r = table.coef[:, 2], table.coef[:, 3], table.coef[:, 4]
    np.testing.assert_allclose(p * alphas[:-1] + q + r, alphas[1:], rtol=0, atol=3e-7 if schedule.is_flow else 1e-12)


@settings(deadline=None)
@given(tables(), st.integers(0, 2**32 - 1))
def test_u_and_v_invert_every_prediction(made, seed):
    schedule, prediction_type, table = made
    alphas, sigmas = levels(schedule, table)
    x0, noise = np.random.default_rng(seed).normal(size=(2, 8))
    for i, (u, v) in enumerate(table.coef[:, :2]):
        a, s = alphas[i], sigmas[i]
        x = a * x0 + s * noise
        out = {"epsilon": noise, "sample": x0, "v_prediction": a * noise - s * x0, "flow": noise - x0}[prediction_type]
        rounding = 1e-6 if schedule.is_flow else 1e-13
        assert np.abs(u * x + v * out - x0).max() < rounding * (1 + abs(u) + abs(v)) * 10


@settings(deadline=None)
@given(tables(), st.integers(0, 2**32 - 1))
def test_a_network_that_knows_the_clip_gives_it_back(made, seed):
    schedule, prediction_type, table = made
    assume(not schedule.is_flow or prediction_type == "sample")  # a flow's levels are known to float32 only
    alphas, sigmas = levels(schedule, table)
    known = np.random.default_rng(seed).uniform(-1, 1, 6)
    step = iter(range(len(table)))

    def denoise(x, timestep):
        i = next(step)
        return output_of(prediction_type, x, known, alphas[i], sigmas[i])

    rng = np.random.default_rng(seed + 1)
    result = sample(denoise, lambda step: rng.normal(size=6), table, clean=known)
    largest = 1 + np.abs(table.coef[-1, :2]).max() / min(1, sigmas[-2])
    np.testing.assert_allclose(result, known, rtol=0, atol=1e-12 * largest)


@pytest.mark.parametrize("sampler, schedule", [("ddim", COSINE), ("euler", FLOW)])
def test_averaging_outputs_is_averaging_states_unless_clipped(sampler, schedule):
    """Two windows that overlap: one step of the mean output, or the mean of two steps."""
    table = make_table(sampler, schedule, "v_prediction", 10)
    x, one, two = np.random.default_rng(0).normal(size=(3, 200))
    for clip, equal in ((math.inf, True), (1.0, False)):
        together = apply_step(table, 4, x, 0.5 * (one + two), clip=clip)[0]
        apart = 0.5 * (apply_step(table, 4, x, one, clip=clip)[0] + apply_step(table, 4, x, two, clip=clip)[0])
        assert (np.abs(together - apart).max() < 1e-14) == equal


def test_eta_one_is_ddpm():
    for name in ("cosine", "linear", "flow"):
        ddim, ddpm = (make_table(s, SCHEDULES[name], "sample", 17, eta=e).coef for s, e in (("ddim", 1), ("ddpm", 0)))
        np.testing.assert_allclose(ddim, ddpm, rtol=1e-9, atol=1e-12)


def test_which_samplers_need_history_and_noise():
    facts = {s: make_table(s, FLOW, "flow", 5) for s in SAMPLERS}
    assert {s for s in SAMPLERS if facts[s].uses_previous} == {"dpmpp_2m"}
    assert {s for s in SAMPLERS if facts[s].stochastic} == {"ddpm"}
    assert make_table("ddim", COSINE, "sample", 5, eta=0.5).stochastic


# ---- strength --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpmpp_2m"])
@pytest.mark.parametrize("steps, strength, rows", [(20, 0.5, 10), (100, 0.29, 29), (8, 0.01, 1), (7, 1.0, 7)])
def test_strength_leaves_out_the_noisiest_steps(sampler, steps, strength, rows):
    whole, part = (make_table(sampler, COSINE, "v_prediction", steps, strength=s) for s in (1.0, strength))
    assert len(part) == rows
    np.testing.assert_array_equal(part.timesteps, whole.timesteps[-rows:])
    t = int(part.timesteps[0])
    assert (part.init_alpha, part.init_sigma) == (COSINE.alphas[t], COSINE.sigmas[t])
    # The first row is of first order whatever came before it; with it the second, whose history is shorter.
    np.testing.assert_allclose(part.coef[1:], whole.coef[-rows:][1:], rtol=1e-14)


def test_strength_on_dpmpp_2m_is_diffusers_begin_index():
    theirs = DPMSolverMultistepScheduler(1000, prediction_type="v_prediction", timestep_spacing="trailing")
    theirs.set_timesteps(20)
    table = make_table("dpmpp_2m", LINEAR, "v_prediction", 20, strength=0.4)
    clean, noise = torch.randn(2, 40, generator=torch.Generator().manual_seed(0))
    outs = torch.randn(8, 40, generator=torch.Generator().manual_seed(1))
    x = theirs.add_noise(clean, noise, theirs.timesteps[12:13])
    theirs.set_begin_index(12)
    states = []

    def denoise(x, timestep):
        states.append(x)
        return outs[len(states) - 1]

    states.append(sample(denoise, lambda step: noise, table, clean=clean))
    for i, t in enumerate(theirs.timesteps[12:]):
        assert rel_rms(states[i], x) < 1e-5
        x = theirs.step(outs[i], t, x).prev_sample
    assert rel_rms(states[8], x) < TOLERANCE


# ---- the loop --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpmpp_2m"])
def test_loop_is_the_same_for_arrays_and_tensors_and_keeps_float32(sampler):
    table = make_table(sampler, COSINE, "v_prediction", 6)
    noises = np.random.default_rng(0).normal(size=(7, 2, 5)).astype(np.float32)
    seen = []

    def denoise(x, timestep):
        seen.append(timestep)
        return 0.5 * x

    arrays = sample(denoise, lambda step: noises[step + 1], table, clip=1.0)
    tensors = sample(denoise, lambda step: torch.from_numpy(noises[step + 1]), table, clip=1.0)
    assert arrays.dtype == np.float32 and tensors.dtype == torch.float32
    np.testing.assert_array_equal(arrays, tensors.numpy())
    assert seen == table.timesteps.tolist() * 2
    assert np.abs(arrays).max() <= 1


def test_noise_is_asked_for_only_where_it_is_used():
    for sampler, expected in (("ddim", [-1]), ("ddpm", [-1, 0, 1, 2])):
        asked = []

        def noise(step, asked=asked):
            asked.append(step)
            return np.ones(3)

        sample(lambda x, t: x, noise, make_table(sampler, COSINE, "v_prediction", 4))
        assert asked == expected


# ---- timesteps -------------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(st.integers(1, 1000), st.integers(1, 1000))
def test_trailing_starts_at_the_last_timestep_for_any_number_of_steps(count, steps):
    steps = min(count, steps)
    table = make_table("ddim", make_schedule("cosine", count), "sample", steps)
    assert len(table) == steps and table.timesteps[0] == count - 1


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "euler"])
def test_one_step_of_linspace_starts_at_noise(sampler):
    """diffusers starts it at timestep 0, where there is none."""
    assert make_table(sampler, COSINE, "sample", 1, timestep_spacing="linspace").timesteps.tolist() == [999]


def test_flow_times_are_real_numbers():
    np.testing.assert_allclose(make_table("euler", FLOW, "flow", 3).timesteps, [1000, 2000 / 3, 1000 / 3], rtol=1e-6)
    np.testing.assert_array_equal(
        make_table("euler", FLOW, "flow", 4, timestep_spacing="leading").timesteps, [751, 501, 251, 1]
    )


# ---- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change, message",
    [
        ({"sampler": "plms"}, "sampler='plms' is not one of ddpm, ddim, euler, dpmpp_2m"),
        ({"prediction_type": "x0"}, "prediction_type='x0' is not one of epsilon, v_prediction, sample, flow"),
        ({"timestep_spacing": "karras"}, "timestep_spacing='karras' is not one of trailing, leading, linspace"),
        ({"num_inference_steps": 0}, "num_inference_steps=0 is not an integer in 1..1000"),
        ({"num_inference_steps": 1001}, "num_inference_steps=1001 is not an integer in 1..1000"),
        ({"num_inference_steps": 10.5}, "num_inference_steps=10.5"),
        ({"num_inference_steps": True}, "num_inference_steps=True"),
        ({"eta": float("nan")}, "eta=nan is not in 0..1"),
        ({"eta": float("inf")}, "eta=inf is not in 0..1"),
        ({"eta": -0.1}, "eta=-0.1 is not in 0..1"),
        ({"sampler": "ddpm", "eta": 0.5}, "eta=0.5 is of ddim alone"),
        ({"variance": "fixed_large"}, "variance='fixed_large' is of ddpm alone"),
        ({"sampler": "ddpm", "variance": "learned"}, "variance='learned' is not one of fixed_small, fixed_large"),
        ({"strength": 0.0}, "strength=0.0 is not in 0..1"),
        ({"strength": 1.01}, "strength=1.01 is not in 0..1"),
        ({"strength": float("nan")}, "strength=nan is not in 0..1"),
        ({"final_alpha": "zero"}, "final_alpha='zero' is not one of one, first"),
        ({"ddim_target": "last"}, "ddim_target='last' is not one of next, stride"),
        ({"initial_noise": "two"}, "initial_noise='two' is not one of sigma, one"),
        ({"sampler": "euler", "final_alpha": "first"}, "final_alpha='first' is of ddim alone; sampler 'euler'"),
        ({"sampler": "ddpm", "ddim_target": "stride"}, "ddim_target='stride' is of ddim alone; sampler 'ddpm'"),
        ({"schedule": FLOW, "ddim_target": "stride"}, "ddim_target='stride' counts training timesteps"),
        ({"steps_offset": -1}, "steps_offset=-1 is not an integer in 0..999"),
        ({"steps_offset": 1.5}, "steps_offset=1.5 is not an integer in 0..999"),
        (
            {"sampler": "dpmpp_2m", "num_inference_steps": 999, "timestep_spacing": "leading", "steps_offset": 1},
            "'leading' spacing and steps_offset=1 starts at timestep 1000; the last is 999",
        ),
        ({"schedule": FLOW, "prediction_type": "epsilon"}, "allowed are v_prediction, sample, flow"),
        ({"sampler": "dpmpp_2m", "num_inference_steps": 1000, "timestep_spacing": "leading"}, "allowed are 1..999"),
        ({"num_inference_steps": 1, "timestep_spacing": "leading"}, "'leading' spacing with 1 step"),
    ],
)
def test_rejects(change, message):
    arguments = {"sampler": "ddim", "schedule": COSINE, "prediction_type": "sample", "num_inference_steps": 10} | change
    with pytest.raises(InvalidRequest) as error:
        make_table(**arguments)
    assert message in str(error.value) and "\n" not in str(error.value)
