"""The eager backend gives what the plain networks give, in one layout, on a fixed number of threads."""

from __future__ import annotations

import threading

import pytest
import torch
from support.testing import rel_rms, write_random_model

from pylumiere.backends.choice import Choice
from pylumiere.backends.torch import TorchBackend
from pylumiere.checkpoints.native import load_checkpoint
from pylumiere.networks.families import build_network


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return load_checkpoint(write_random_model(tmp_path_factory.mktemp("model")))


def backend_of(checkpoint, precision="fp32"):
    return TorchBackend(checkpoint, Choice("torch", torch.device("cpu"), precision, "test"))


def inputs(stage, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    if stage == "ssr":
        return (normal(2, 4, 16, 24, 6), torch.tensor([900.0, 3.0]), None, None, torch.tensor([0.1, 0.0]))
    mask = torch.tensor([[True] * 8, [True] + [False] * 7])
    return (normal(2, 8, 16, 16, 7), torch.tensor([500.0, 500.0]), normal(2, 8, 32), mask, None)


@pytest.mark.parametrize(("precision", "bound"), [("fp32", 2e-6), ("bf16", 3e-2)])
@pytest.mark.parametrize("stage", ["base", "ssr"])
@torch.inference_mode()
def test_equals_the_plain_network_in_float64(checkpoint, stage, precision, bound):
    backend = backend_of(checkpoint, precision)
    config = checkpoint.config.stage(stage).network
    oracle = build_network(config, {n: t.double() for n, t in checkpoint.weights[stage].items()})
    sample, *rest = inputs(stage)
    result = backend.predict(stage, sample, *rest)
    assert result.dtype == torch.float32 and result.is_contiguous() and result.shape == (*sample.shape[:-1], 3)
    expected = oracle(sample.double(), *rest)
    assert rel_rms(result, expected) < bound


def test_weights_are_channels_last_and_counted(checkpoint):
    backend = backend_of(checkpoint, "bf16")
    network = backend._networks["base"]
    spatial = network.conv_in.weight
    assert spatial.is_contiguous(memory_format=torch.channels_last) and not spatial.is_contiguous()
    temporal = network.blocks["down0_time"].conv.weight
    assert temporal.stride(1) == 1 and temporal.shape[1:] == (32, 3)
    count = sum(t.numel() for weights in checkpoint.weights.values() for t in weights.values())
    assert backend.weight_bytes == 2 * count


def test_every_thread_computes_on_the_same_number_of_threads(checkpoint):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        backend = backend_of(checkpoint)
        torch.set_num_threads(1)
        seen = []

        def work():
            backend.predict("ssr", *inputs("ssr"))
            seen.append(torch.get_num_threads())

        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        assert backend.num_threads == 2 and seen == [2]
    finally:
        torch.set_num_threads(before)
