"""Schedules against diffusers, against exact fractions, and their refusals."""

from __future__ import annotations

import subprocess
import sys
from fractions import Fraction

import numpy as np
import pytest
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from hypothesis import given, settings
from hypothesis import strategies as st
from support.schedulers import in_double

from pylumiere.config import ScheduleConfig
from pylumiere.diffusion.schedules import make_schedule, schedule_of
from pylumiere.errors import InvalidRequest

DIFFUSERS = {"cosine": "squaredcos_cap_v2", "linear": "linear", "scaled_linear": "scaled_linear"}
BETAS = {"linear": (1e-4, 0.02), "scaled_linear": (0.00085, 0.012), "cosine": (1e-4, 0.02)}


def log_snr(schedule):
    return 2 * (np.log(schedule.alphas) - np.log(schedule.sigmas))


@pytest.mark.parametrize("name", DIFFUSERS)
@pytest.mark.parametrize("count", [1000, 50])
def test_alphas_are_those_of_diffusers(name, count):
    theirs = DDPMScheduler(count, *BETAS[name], DIFFUSERS[name]).alphas_cumprod.numpy()
    ours = make_schedule(name, count)
    # They multiply float32 factors 1 - beta: half an eps for each product, and for each factor half an eps of 1.
    betas = 1 - ours.alphas**2 / np.concatenate([[1], ours.alphas[:-1] ** 2])
    bound = np.cumsum(2.0**-24 * (1 + 1 / (1 - betas)))
    if name == "scaled_linear":  # and their betas are squares of float32 roots
        bound += np.cumsum(2.0**-22 * betas)
    assert (np.abs(theirs / ours.alphas**2 - 1) < bound).all()
    np.testing.assert_array_equal(ours.timesteps, np.arange(count))


@pytest.mark.parametrize("name, betas", [("linear", (0.00085, 0.012)), ("scaled_linear", (1e-4, 0.02))])
def test_betas_are_those_of_diffusers_in_float64(monkeypatch, name, betas):
    theirs = in_double(monkeypatch, "DDPMScheduler")(1000, *betas, name).alphas_cumprod.numpy()
    ours = schedule_of(ScheduleConfig(name, beta_start=betas[0], beta_end=betas[1]))
    np.testing.assert_allclose(ours.alphas**2, theirs, rtol=1e-12)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_sigmas_are_those_of_diffusers(shift):
    theirs = FlowMatchEulerDiscreteScheduler(1000, shift=shift)
    ours = make_schedule("flow", shift=shift)
    np.testing.assert_allclose(ours.sigmas[::-1], theirs.sigmas.numpy(), rtol=3e-7)
    np.testing.assert_allclose(ours.timesteps[::-1], theirs.timesteps.numpy(), rtol=3e-7)


@pytest.mark.parametrize("name", DIFFUSERS)
def test_zero_terminal_snr_is_that_of_diffusers(monkeypatch, name):
    ours = make_schedule(name, zero_terminal_snr=True)
    theirs = in_double(monkeypatch, "DDPMScheduler")(
        1000, *BETAS[name], DIFFUSERS[name], rescale_betas_zero_snr=True
    ).alphas_cumprod.numpy()
    np.testing.assert_allclose(ours.alphas, np.sqrt(theirs), rtol=1e-9)
    assert (ours.alphas[-1], ours.sigmas[-1]) == (0.0, 1.0)
    assert abs(ours.alphas[0] / make_schedule(name).alphas[0] - 1) < 1e-15


@pytest.mark.parametrize("name", DIFFUSERS)
@pytest.mark.parametrize("shift", [0.0, -4.0, 2.5])
def test_powers_sum_to_one_and_noise_grows(name, shift):
    schedule = make_schedule(name, logsnr_shift=shift)
    np.testing.assert_allclose(schedule.alphas**2 + schedule.sigmas**2, 1, rtol=4e-16)
    assert (np.diff(schedule.sigmas) >= 0).all() and (np.diff(schedule.alphas) < 0).all()
    assert schedule.alphas[-1] > 0 and schedule.sigmas[0] > 0


def test_sigma_keeps_its_digits_at_the_clean_end():
    """Against exact rational arithmetic on the same betas; 1 - acp in float64 loses four digits there."""
    betas = np.linspace(1e-4, 0.02, 1000)
    product, exact = Fraction(1), []
    for beta in betas[:100]:
        product *= 1 - Fraction(beta)
        exact.append(float(1 - product))
    np.testing.assert_allclose(make_schedule("linear").sigmas[:100] ** 2, exact, rtol=2e-15)


def test_cosine_follows_its_formula_in_extended_precision():
    angle = (np.arange(1001, dtype=np.longdouble) / 1000 + np.longdouble(8) / 1000) / (np.longdouble(1008) / 1000)
    square = np.cos(angle * np.arctan(np.longdouble(1)) * 2) ** 2
    noise = 1 - square[1:-1] / square[0]  # the cap takes the last beta alone
    np.testing.assert_allclose(make_schedule("cosine").sigmas[:-1] ** 2, noise.astype(float), rtol=1e-12)


@settings(deadline=None)
@given(st.sampled_from([*DIFFUSERS, "flow"]), st.integers(2, 300), st.floats(-12, 12))
def test_logsnr_shift_is_added_everywhere(name, count, shift):
    # A flow's last timestep is pure noise: its log-SNR is -infinity and stays.
    end = -1 if name == "flow" else None
    with np.errstate(divide="ignore"):
        moved, plain = log_snr(make_schedule(name, count, shift))[:end], log_snr(make_schedule(name, count))[:end]
    np.testing.assert_allclose(moved - plain, shift, atol=1e-10)


def test_flow_is_a_straight_line():
    for schedule in (make_schedule("flow"), make_schedule("flow", shift=3.0), make_schedule("flow", 20, -2.0)):
        np.testing.assert_allclose(schedule.alphas + schedule.sigmas, 1, rtol=4e-16)
        assert (schedule.alphas[-1], schedule.sigmas[-1]) == (0.0, 1.0)
        assert schedule.timesteps[-1] == schedule.num_train_timesteps


def test_one_training_timestep():
    assert make_schedule("cosine", 1).alphas[0] ** 2 == pytest.approx(0.001)
    assert make_schedule("linear", 1).sigmas[0] ** 2 == pytest.approx(1e-4)
    assert make_schedule("scaled_linear", 1).sigmas[0] ** 2 == pytest.approx(0.00085)
    assert make_schedule("flow", 1).sigmas[0] == 1


@pytest.mark.parametrize(
    "arguments, options, message",
    [
        (("sqrt",), {}, "'sqrt' is not one of cosine, linear, flow, scaled_linear"),
        (("cosine", 0), {}, "num_train_timesteps=0"),
        (("cosine", 10.5), {}, "num_train_timesteps=10.5"),
        (("cosine", 1000, float("nan")), {}, "logsnr_shift=nan"),
        (("cosine", 1000, 31.0), {}, "logsnr_shift=31.0 is not in -30..30"),
        (("cosine",), {"beta_end": 0.1}, "no option 'beta_end'; it has max_beta"),
        (("cosine",), {"max_beta": 1.0}, "max_beta=1.0"),
        (("linear",), {"beta_start": 0.5}, "beta_start=0.5"),
        (("linear",), {"beta_end": float("nan")}, "beta_end=nan"),
        (("scaled_linear",), {"beta_start": 0.5}, "beta_start=0.5, beta_end=0.012"),
        (("scaled_linear",), {"beta_start": -1.0}, "beta_start=-1.0"),
        (("flow",), {"shift": 0.0}, "shift=0.0"),
        (("flow",), {"shift": float("inf")}, "shift=inf"),
        (("linear", 1), {"zero_terminal_snr": True}, "num_train_timesteps=1: needs at least 2"),
    ],
)
def test_rejects(arguments, options, message):
    with pytest.raises(InvalidRequest) as error:
        make_schedule(*arguments, **options)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_tables_need_no_torch():
    code = "import sys, pylumiere.diffusion.schedules, pylumiere.diffusion.samplers; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
