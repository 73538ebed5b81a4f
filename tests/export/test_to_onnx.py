"""The comparison must be able to fail: every way in which a graph can be wrong is shown to it."""

from __future__ import annotations

import types

import numpy as np
import pytest
import torch
from pylumiere.export.spec import network_specs
from pylumiere.export.to_onnx import ExportOps, compare

from pylumiere.errors import BundleError
from pylumiere.networks.ops import PlainOps
from pylumiere.networks.stunet.presets import model_preset

SPEC = network_specs(model_preset("tiny"))["ssr"]
SIZES = {"B": 1, "T": 2, "H": 8, "W": 8}


def _eager(inputs):
    return inputs["sample"][..., :3] * 2


class _Session:
    """Answers as ONNX Runtime does, with what `_eager` gives after `change`."""

    def __init__(self, change, names=None):
        self.change, self.names = change, names or [port.name for port in SPEC.inputs]

    def get_inputs(self):
        return [types.SimpleNamespace(name=name) for name in self.names]

    def run(self, outputs, feed):
        return [self.change(feed["sample"][..., :3] * 2)]


def test_equal_outputs_pass_and_all_values_are_counted():
    found = compare(_Session(lambda y: y), _eager, SPEC, SIZES, 1e-6)
    assert found["values"] == 1 * 2 * 8 * 8 * 3
    assert found["rel_rms"] == found["max_abs"] == 0
    assert found["shapes"]["sample"] == [1, 2, 8, 8, 6]


def _one(value):
    def change(y):
        y = y.copy()
        y.flat[7] = value
        return y

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda y: y * 1.01, "relative RMS error 0.01 is more than"),
        (_one(1e4), "relative RMS error"),
        (_one(np.nan), "not finite"),
        (_one(np.inf), "not finite"),
        (lambda y: y[:, :1], "shape"),
        (lambda y: y[:0], "shape"),
        (lambda y: y[..., None], "shape"),
    ],
)
def test_a_wrong_or_partial_output_is_refused(change, message):
    with pytest.raises(BundleError, match=message):
        compare(_Session(change), _eager, SPEC, SIZES, 1e-5)


def test_an_empty_comparison_is_refused():
    with pytest.raises(BundleError, match="compares nothing"):
        compare(_Session(lambda y: y * 0), lambda inputs: _eager(inputs) * 0, SPEC, SIZES, 1e-5)


def test_a_graph_with_other_inputs_is_refused():
    with pytest.raises(BundleError, match="takes sample"):
        compare(_Session(lambda y: y, ["sample"]), _eager, SPEC, SIZES, 1e-5)


@pytest.mark.parametrize("has_mask", [False, True])
def test_attention_in_a_graph_is_that_of_the_model(has_mask):
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 5, 32).double(), torch.randn(3, 7, 32).double(), torch.randn(3, 7, 32).double()
    mask = (torch.arange(7) < torch.tensor([[1], [4], [7]])) if has_mask else None
    with torch.inference_mode():
        expected = PlainOps().attention(q, k, v, 4, mask)
        found = ExportOps().attention(q, k, v, 4, mask)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
