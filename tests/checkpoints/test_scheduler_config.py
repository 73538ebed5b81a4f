"""scheduler_config.json of public folders, and those that diffusers writes: what is read, and what is refused."""

from __future__ import annotations

import dataclasses
import inspect
import json
import math
import subprocess
import sys

import diffusers
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.schedulers import CLASSES as SCHEDULERS
from support.schedulers import FOLDERS, in_double, our_loop, rel_rms, their_loop

from pylumiere.checkpoints.scheduler_config import CLASSES, schedule_from_diffusers
from pylumiere.config import ScheduleConfig
from pylumiere.diffusion.samplers import table_for
from pylumiere.errors import BundleError

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers on numpy 2

LATENT = ScheduleConfig(
    "scaled_linear", "epsilon", beta_start=0.00085, beta_end=0.012, timestep_spacing="leading", steps_offset=1,
    final_alpha="first", ddim_target="stride", initial_noise="one", clip=None,
)  # fmt: skip
DDPM, EULER, SOLVER = (
    {"_class_name": name} for name in ("DDPMScheduler", "EulerDiscreteScheduler", "DPMSolverMultistepScheduler")
)
EXACT = ("DDIMScheduler", "DDPMScheduler", "EulerDiscreteScheduler", "DPMSolverMultistepScheduler")
# Keys of the exact classes that are not read, and why they change nothing.
WITHOUT_EFFECT = {
    "dynamic_thresholding_ratio", "sample_max_value",  # with thresholding
    "sigma_min", "sigma_max",  # with Karras sigmas and the like
    "lower_order_final", "euler_at_final",  # a last step to sigma 0 is of first order, one before it of second
    "flow_shift", "use_dynamic_shifting", "time_shift_type",  # with flow sigmas
}  # fmt: skip


def written_by_diffusers(tmp_path, class_name, **options) -> dict:
    """The file of a scheduler, as JSON."""
    getattr(diffusers, class_name)(**options).save_pretrained(tmp_path)
    return json.loads((tmp_path / "scheduler_config.json").read_text())


def distance(monkeypatch, schedule: ScheduleConfig, sampler: str, theirs, steps: int) -> float:
    """How far our end is from theirs, after the same timesteps and from the same noises."""
    noises = np.random.default_rng(steps).normal(size=(steps + 1, 1, 40))
    noises[-1] = 0  # of DDPM's last, diffusers never takes less than 1e-10
    expected, timesteps = their_loop(monkeypatch, theirs, steps, noises)
    table = table_for(schedule, sampler, steps)
    np.testing.assert_array_equal(table.timesteps, timesteps.astype(np.float32))
    return rel_rms(our_loop(table, noises, schedule.clip), expected)


@pytest.mark.parametrize(
    "folder, schedule, sampler",
    [
        ("sd-1.5", LATENT, "dpmpp_2m"),
        ("sd-2.1", dataclasses.replace(LATENT, prediction_type="v_prediction"), "ddim"),
        ("modelscope", LATENT, "ddim"),
        ("animatediff", dataclasses.replace(LATENT, name="linear", timestep_spacing="linspace"), "ddim"),
    ],
)
def test_public_folders_are_read(folder, schedule, sampler):
    assert schedule_from_diffusers(FOLDERS[folder]) == (schedule, sampler)


@pytest.mark.parametrize("sampler", ["ddim", "dpmpp_2m"])
@pytest.mark.parametrize("steps", [2, 20, 30, 50])
@pytest.mark.parametrize("folder", FOLDERS)
def test_public_folders_give_what_diffusers_gives(monkeypatch, folder, steps, sampler):
    """diffusers makes its classes from any folder, too; the spacing is kept here, and there unless it was a default."""
    config = FOLDERS[folder]
    schedule, _ = schedule_from_diffusers(config)
    theirs = in_double(monkeypatch, SCHEDULERS[sampler]).from_config(config, timestep_spacing=schedule.timestep_spacing)
    assert distance(monkeypatch, schedule, sampler, theirs, steps) < 1e-12


@pytest.mark.parametrize("options", [
    {}, {"timestep_spacing": "trailing"}, {"timestep_spacing": "leading", "steps_offset": 1},
    {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction"},
    {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction", "timestep_spacing": "trailing"},
    {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "prediction_type": "sample"},
], ids=lambda options: "-".join(options) or "defaults")  # fmt: skip
@pytest.mark.parametrize("class_name", EXACT)
def test_files_that_diffusers_writes_give_what_it_gives(monkeypatch, tmp_path, class_name, options):
    clip = {"clip_sample": False} if class_name == "DDIMScheduler" else {}  # see table_for
    config = written_by_diffusers(tmp_path, class_name, **options, **clip)
    theirs = in_double(monkeypatch, class_name).from_config(config)
    for steps in (7, 25):
        assert distance(monkeypatch, *schedule_from_diffusers(config), theirs, steps) < 1e-10


@pytest.mark.parametrize("class_name", EXACT)
def test_an_empty_file_has_the_defaults_of_its_class(monkeypatch, class_name):
    config = {"_class_name": class_name} | ({"clip_sample": False} if class_name == "DDIMScheduler" else {})
    theirs = in_double(monkeypatch, class_name).from_config(config)
    assert distance(monkeypatch, *schedule_from_diffusers(config), theirs, 20) < 1e-10


@pytest.mark.parametrize("class_name", CLASSES)
def test_defaults_are_those_of_diffusers_signatures(class_name):
    signature = inspect.signature(getattr(diffusers, class_name).__init__).parameters
    _, ours = CLASSES[class_name]
    assert ours == {key: signature[key].default for key in ours}
    if class_name in EXACT:
        assert set(signature) - {"self"} - set(ours) <= WITHOUT_EFFECT


@pytest.mark.parametrize(
    "config, clip",
    [
        (DDPM, 1.0),
        (DDPM | {"clip_sample_range": 3}, 3.0),
        (DDPM | {"clip_sample": False, "clip_sample_range": 3.0}, None),
        ({"_class_name": "PNDMScheduler", "clip_sample": True}, None),  # a key that it does not read
    ],
)
def test_clipping_is_read(config, clip):
    assert schedule_from_diffusers(config)[0].clip == clip


@pytest.mark.filterwarnings("ignore:__array_wrap__:DeprecationWarning")
@pytest.mark.parametrize("class_name", sorted(set(CLASSES) - {*EXACT, "EulerAncestralDiscreteScheduler"}))
def test_a_class_that_we_lack_gets_the_nearest_of_ours(monkeypatch, class_name):
    """On Gaussians of many widths, whose denoiser is known."""
    widths = np.linspace(0.1, 1.5, 40)
    acp = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)

    def denoise(x, timestep):
        power = np.interp(timestep, np.arange(1000), acp)
        return math.sqrt(1 - power) * x / (power * widths**2 + 1 - power)

    config = {
        "_class_name": class_name, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
        "skip_prk_steps": True, "lower_order_final": True,
    }  # fmt: skip
    schedule, sampler = schedule_from_diffusers(config)
    noises = np.zeros((60, 8, 40))  # Heun calls twice a step
    noises[0] = np.random.default_rng(1).normal(size=(8, 40))
    expected, _ = their_loop(monkeypatch, getattr(diffusers, class_name).from_config(config), 25, noises, denoise)
    distances = {
        ours: rel_rms(our_loop(table_for(schedule, ours, 25), noises, None, denoise), expected)
        for ours in ("ddim", "euler", "dpmpp_2m")
    }
    assert sampler == min(distances, key=distances.get), distances
    assert distances[sampler] < 0.05


@pytest.mark.parametrize(
    "config, message",
    [
        ({}, "scheduler _class_name=None is not one of DDIMScheduler, DDPMScheduler"),
        ({"_class_name": "LCMScheduler"}, "_class_name='LCMScheduler' is not one of"),
        ({"_class_name": ["DDIMScheduler"]}, "_class_name=['DDIMScheduler'] is not one of"),
        (["DDIMScheduler"], "_class_name=None is not one of"),
        ({"thresholding": True}, "DDIMScheduler: thresholding=True is not followed; allowed: False"),
        ({"thresholding": 0}, "thresholding=0 is not followed; allowed: False"),
        ({"trained_betas": [0.1] * 1000}, "trained_betas=[0.1, 0.1, 0.1,"),
        ({"beta_schedule": "sigmoid"}, "beta_schedule='sigmoid' is not followed; allowed: linear, scaled_linear"),
        ({"prediction_type": "flow_prediction"}, "allowed: epsilon, sample, v_prediction"),
        ({"timestep_spacing": None}, "timestep_spacing=None is not followed; allowed: leading, trailing, linspace"),
        ({"set_alpha_to_one": "false"}, "DDIMScheduler: set_alpha_to_one='false' is not true or false"),
        ({"steps_offset": 1.0}, "DDIMScheduler: steps_offset=1.0 is not an integer"),
        ({"num_train_timesteps": True}, "num_train_timesteps=True is not an integer"),
        ({"num_train_timesteps": 10**9}, "DDIMScheduler: num_train_timesteps=1000000000 is not in 1..100000"),
        ({"beta_start": "0.1"}, "beta_start='0.1' is not a number"),
        ({"beta_end": 10**400}, "is not a number"),
        ({"beta_end": float("nan")}, "beta_start=0.0001, beta_end=nan: allowed are"),
        ({"clip_sample_range": -1.0}, "DDIMScheduler: clip=-1.0 is neither in 0..1000 without 0 nor null"),
        (DDPM | {"variance_type": "learned_range"}, "variance_type='learned_range'"),
        (DDPM | {"variance_type": "fixed_large"}, "allowed: fixed_small, None"),
        (EULER | {"use_karras_sigmas": True}, "use_karras_sigmas=True is not followed"),
        (EULER | {"interpolation_type": "log_linear"}, "allowed: linear"),
        (EULER | {"timestep_type": "continuous"}, "allowed: discrete"),
        (EULER | {"final_sigmas_type": "sigma_min"}, "allowed: zero"),
        ({"_class_name": "LMSDiscreteScheduler", "use_beta_sigmas": True}, "use_beta_sigmas=True is not followed"),
        (SOLVER | {"algorithm_type": "sde-dpmsolver++"}, "allowed: dpmsolver++, deis"),
        (SOLVER | {"solver_order": 3}, "solver_order=3 is not followed; allowed: 2"),
        (SOLVER | {"solver_type": "heun"}, "solver_type='heun' is not followed"),
        (SOLVER | {"use_lu_lambdas": True}, "use_lu_lambdas=True is not followed"),
        (SOLVER | {"lambda_min_clipped": -5.1}, "allowed: -inf"),
        ({"_class_name": "UniPCMultistepScheduler", "use_flow_sigmas": True}, "use_flow_sigmas=True is not followed"),
    ],
)
def test_what_is_not_followed_is_named(config, message):
    if isinstance(config, dict) and config:
        config = {"_class_name": "DDIMScheduler"} | config
    with pytest.raises(BundleError) as error:
        schedule_from_diffusers(config)
    assert message in str(error.value) and "\n" not in str(error.value) and len(str(error.value)) < 500


def test_a_key_of_another_class_changes_nothing():
    """diffusers writes such keys when a scheduler was made from another's config."""
    plain = FOLDERS["sd-2.1"]
    assert schedule_from_diffusers(plain | {"use_karras_sigmas": True, "solver_order": 3, "new": {}}) == (
        schedule_from_diffusers(plain)
    )


@settings(deadline=None)
@given(st.data())
def test_any_json_gives_a_schedule_or_a_bundle_error(data):
    class_name = data.draw(st.sampled_from(list(CLASSES)))
    leaves = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
    values = leaves | st.lists(leaves, max_size=3) | st.dictionaries(st.text(max_size=3), leaves, max_size=3)
    keys = st.sampled_from(list(CLASSES[class_name][1]))
    config = {"_class_name": class_name} | data.draw(st.dictionaries(keys, values, max_size=3))
    try:
        schedule, _ = schedule_from_diffusers(config)
    except BundleError:
        return
    assert schedule.clip is None or 0 < schedule.clip < math.inf


def test_reading_needs_neither_torch_nor_numpy():
    code = (
        "import sys, pylumiere.checkpoints.scheduler_config; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-P", "-c", code], check=False).returncode == 0
