"""What every test stands on: the installed package, Triton's interpreter where there is no GPU, no lucky memory."""

from __future__ import annotations

import functools
import importlib.util
import os
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent

# Tests see the installed package only. With the root on the path, our folder kernels/ would be taken for the optional
# package of that name which transformers and diffusers look for.
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != ROOT]

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    if "triton" in sys.modules:
        raise RuntimeError("triton was imported before tests/conftest.py could choose its interpreter")
    os.environ["TRITON_INTERPRET"] = "1"

_executed = {"kernels": 0}


def pytest_collection_modifyitems(items):
    if HAS_GPU:
        return
    skip = pytest.mark.skip(reason="needs a CUDA device; there is none")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def _uninitialised_memory_is_nan():
    """torch.empty gives NaN (or the largest integer): a kernel that leaves a part of its output unwritten fails."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def pytest_runtest_logreport(report):
    if report.when == "call" and report.outcome != "skipped" and report.nodeid.startswith("tests/kernels/"):
        _executed["kernels"] += 1


def pytest_terminal_summary(terminalreporter):
    terminalreporter.write_line(f"kernel tests executed: {_executed['kernels']}")


# ---- tiny Stable Diffusion folders, each saved once ------------------------------------------------------------------


@pytest.fixture(scope="session")
def tiny_sd(tmp_path_factory):
    """`tiny_sd(**options of write_tiny_sd)` gives the pipeline of diffusers and the folder; neither is to be changed,
    but for the pipeline's scheduler."""
    from support.tiny_diffusers import write_tiny_sd

    @functools.cache
    def saved(**options):
        folder = tmp_path_factory.mktemp("tiny-sd") / "model"
        return write_tiny_sd(folder, **options), folder

    return saved


# ---- one tiny model, exported once for all tests that look at a bundle -----------------------------------------------


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """A model folder with weights in which nothing is zero, so that every layer counts."""
    from pylumiere.checkpoints.native import save_checkpoint
    from pylumiere.networks.stunet import STUNet
    from pylumiere.networks.stunet.presets import model_preset

    def weights(network, seed):
        torch.manual_seed(seed)
        state = STUNet(network).state_dict()
        return {name: v if v.abs().sum() > 0 else torch.randn_like(v) * 0.05 for name, v in state.items()}

    folder = tmp_path_factory.mktemp("models") / "tiny"
    config = model_preset("tiny")
    networks = {name: weights(network, seed) for seed, (name, network) in enumerate(config.networks.items())}
    save_checkpoint(folder, config, networks, dtype=torch.bfloat16)
    return folder


@pytest.fixture(scope="session")
def cache_folder(tmp_path_factory):
    return tmp_path_factory.mktemp("cache") / "export"


@pytest.fixture(scope="session")
def exported(tiny_model, cache_folder, tmp_path_factory):
    """The tiny model as a bundle, with the report. A portable plan where TensorRT-RTX is installed."""
    from pylumiere.export.build import ExportOptions, export_bundle

    output = tmp_path_factory.mktemp("bundles") / "tiny.plm"
    has_rtx = importlib.util.find_spec("tensorrt_rtx") is not None
    options = ExportOptions(skus=("gb10",) if has_rtx else ())
    return output, export_bundle(str(tiny_model), output, options, cache_folder=cache_folder)


@pytest.fixture(scope="session")
def latent_model(tmp_path_factory):
    """A folder as diffusers saves it: a U-Net for pictures of latents, AutoencoderKL, CLIP; and a temporal shift."""
    from support.tiny_diffusers import write_tiny_sd

    folder = tmp_path_factory.mktemp("models") / "latent"
    write_tiny_sd(folder, sharded=True, unet_extra={"temporal_shift": {"div": 8}, "num_frames": 4})
    return folder


@pytest.fixture(scope="session")
def exported_latent(latent_model, cache_folder, tmp_path_factory):
    """The same as a bundle, with the report; see `exported`."""
    from pylumiere.export.build import ExportOptions, export_bundle

    output = tmp_path_factory.mktemp("bundles") / "latent.plm"
    has_rtx = importlib.util.find_spec("tensorrt_rtx") is not None
    options = ExportOptions(skus=("gb10",) if has_rtx else ())
    return output, export_bundle(str(latent_model), output, options, cache_folder=cache_folder)


@pytest.fixture(scope="session")
def picture_model(latent_model, tmp_path_factory):
    """The same U-Net in a model folder of our own, with AutoencoderTiny and a text encoder without files."""
    import dataclasses

    from support.testing import random_weights

    from pylumiere.checkpoints.diffusers import read_diffusers_folder
    from pylumiere.checkpoints.native import save_checkpoint
    from pylumiere.config import AutoencoderTinyConfig, DecoderConfig

    latent = read_diffusers_folder(latent_model)
    tiny = AutoencoderTinyConfig((16, 16), (16, 16), (1, 1), (1, 1))
    config = dataclasses.replace(latent.config, name="picture", decoder=DecoderConfig(tiny), text_encoder="hash")
    weights = {"unet": latent.weights()["unet"], "decoder": random_weights(tiny, 1)}
    folder = tmp_path_factory.mktemp("models") / "picture"
    save_checkpoint(folder, config, weights)
    return folder


@pytest.fixture(scope="session")
def exported_picture(picture_model, cache_folder, tmp_path_factory):
    """Its network of one frame, where nothing is shifted, as a bundle; with the report."""
    from pylumiere.export.build import ExportOptions, export_bundle

    output = tmp_path_factory.mktemp("bundles") / "picture.plm"
    options = ExportOptions(frames=(1,))
    return output, export_bundle(str(picture_model), output, options, cache_folder=cache_folder)
