from __future__ import annotations

import importlib.util

import pytest
import torch

from pylumiere.checkpoint import save_checkpoint
from pylumiere.config import model_preset
from pylumiere.model import STUNet

HAS_RTX = importlib.util.find_spec("tensorrt_rtx") is not None


def random_weights(network, seed):
    """Weights in which nothing is zero, so that every layer counts."""
    torch.manual_seed(seed)
    state = STUNet(network).state_dict()
    return {name: v if v.abs().sum() > 0 else torch.randn_like(v) * 0.05 for name, v in state.items()}


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "tiny"
    config = model_preset("tiny")
    weights = [random_weights(stage.network, i) for i, stage in enumerate((config.base, config.ssr))]
    save_checkpoint(folder, config, *weights, dtype=torch.bfloat16)
    return folder


@pytest.fixture(scope="session")
def cache_folder(tmp_path_factory):
    return tmp_path_factory.mktemp("cache") / "export"


@pytest.fixture(scope="session")
def exported(tiny_model, cache_folder, tmp_path_factory):
    """The tiny model as a bundle, with the report. A portable plan where TensorRT-RTX is installed."""
    from pylumiere.export.build import ExportOptions, export_bundle

    output = tmp_path_factory.mktemp("bundles") / "tiny.plm"
    options = ExportOptions(skus=("gb10",) if HAS_RTX else ())
    return output, export_bundle(str(tiny_model), output, options, cache_folder=cache_folder)
