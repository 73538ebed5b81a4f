"""The convolution operators in an exported graph: one node each, and the reference as their decomposition."""

import pytest
import torch
from pylumiere.kernels import factorized_conv, norm_affine, spatial_conv, temporal_conv

from pylumiere.testing import rel_rms


class Net(torch.nn.Module):
    """Each operator once, with arguments left at their defaults."""

    def __init__(self):
        super().__init__()
        sizes = {"first": (8, 4, 3, 3), "second": (8, 8, 3), "gamma": (8,), "beta": (8,)}
        generator = torch.Generator().manual_seed(0)
        for name, size in sizes.items():
            self.register_buffer(name, torch.randn(size, generator=generator))

    def forward(self, x):
        h, _ = spatial_conv.spatial_conv(x, self.first, upsample=2)
        statistics = norm_affine.channel_statistics(h.flatten(2, 3).flatten(0, 1))
        mul, add = norm_affine.norm_affine(statistics, h.shape[2] * h.shape[3], self.gamma, self.beta, 2)
        h, _ = temporal_conv.temporal_conv(h, self.second, None, mul, add, silu=True)
        return factorized_conv.factorized_conv(h, self.second.new_ones(8, 8, 3, 3), None, self.second)


@pytest.fixture(scope="module")
def exported():
    x = torch.randn(1, 4, 3, 5, 4)
    shapes = {"x": {1: torch.export.Dim("T", min=2, max=80)}}
    return torch.export.export(Net(), (x,), dynamic_shapes=shapes), x


def test_each_operator_is_one_node(exported):
    program, _ = exported
    names = [str(node.target).split(".")[1] for node in program.graph.nodes if "pylumiere" in str(node.target)]
    assert names == ["spatial_conv", "channel_statistics", "norm_affine", "temporal_conv", "factorized_conv"]


def test_export_decomposes_to_the_same_values(exported):
    program, x = exported
    ops = torch.ops.pylumiere
    plain = program.run_decompositions(
        {
            ops.spatial_conv.default: spatial_conv.reference,
            ops.channel_statistics.default: norm_affine.statistics_reference,
            ops.norm_affine.default: norm_affine.reference,
            ops.temporal_conv.default: temporal_conv.reference,
            ops.factorized_conv.default: factorized_conv.reference,
        }
    )
    assert not [node for node in plain.graph.nodes if "pylumiere" in str(node.target)]
    for frames in (2, 4, 7):  # the number of frames is dynamic
        clip = x[:, :1].repeat(1, frames, 1, 1, 1) + torch.arange(frames)[:, None, None, None]
        assert rel_rms(plain.module()(clip), Net()(clip)) < 1e-6
