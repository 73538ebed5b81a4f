"""The operators in an exported graph: one node each, and the reference as their decomposition."""

import pytest
import torch
from pylumiere.kernels import (
    denoise_step,
    factorized_conv,
    geglu,
    groupnorm_silu,
    layer_norm,
    norm_affine,
    spatial_conv,
    temporal_attention,
    temporal_conv,
    temporal_shift,
)
from support.testing import rel_rms
from torch._subclasses.fake_tensor import FakeTensorMode

ops = torch.ops.pylumiere
REFERENCES = {
    ops.temporal_shift.default: temporal_shift.reference,
    ops.spatial_conv.default: spatial_conv.reference,
    ops.channel_statistics.default: norm_affine.statistics_reference,
    ops.norm_affine.default: norm_affine.reference,
    ops.temporal_conv.default: temporal_conv.reference,
    ops.factorized_conv.default: factorized_conv.reference,
    ops.groupnorm_silu.default: groupnorm_silu.reference,
    ops.layer_norm.default: layer_norm.reference,
    ops.geglu.default: geglu.reference,
    ops.temporal_attention.default: temporal_attention.reference,
    ops.denoise_step.default: denoise_step.reference,
}


class Net(torch.nn.Module):
    """Each operator once, with arguments left at their defaults."""

    def __init__(self):
        super().__init__()
        sizes = {"first": (8, 4, 3, 3), "second": (8, 8, 3), "gamma": (8,), "beta": (8,), "coef": (1, 10)}
        generator = torch.Generator().manual_seed(0)
        for name, size in sizes.items():
            self.register_buffer(name, torch.randn(size, generator=generator))
        self.register_buffer("key", torch.tensor([[7, 0, 3, 0, 0]]))

    def forward(self, x):
        h = temporal_shift.temporal_shift(x.flatten(2, 3), 4).view(x.shape)
        h, _ = spatial_conv.spatial_conv(h, self.first, upsample=2)
        statistics = norm_affine.channel_statistics(h.flatten(2, 3).flatten(0, 1))
        mul, add = norm_affine.norm_affine(statistics, h.shape[2] * h.shape[3], self.gamma, self.beta, 2)
        h, _ = temporal_conv.temporal_conv(h, self.second, None, mul, add, silu=True)
        h = factorized_conv.factorized_conv(h, self.second.new_ones(8, 8, 3, 3), None, self.second)
        h = groupnorm_silu.groupnorm_silu(h.flatten(2, 3), self.gamma, self.beta, 2)
        h = layer_norm.layer_norm(h, self.gamma, self.beta)
        h = geglu.geglu(torch.cat([h, h.neg()], -1))
        h = temporal_attention.temporal_attention(torch.cat([h, h, h], -1), 2)
        out = h.flatten(2)  # [1, T, P]: the network's output for each frame
        frames = torch.arange(x.shape[1])
        key = self.key + frames[:, None] * torch.tensor([0, 0, 0, 1, 0])
        weights = torch.ones(x.shape[1], 1)
        rows = frames.to(torch.int32)[:, None]
        coef = self.coef * (1 + weights)
        new, _ = denoise_step.denoise_step(out[0].neg(), None, out, rows, weights, coef, key)
        return new


@pytest.fixture(scope="module")
def exported():
    x = torch.randn(1, 4, 3, 5, 4, generator=torch.Generator().manual_seed(1))
    shapes = {"x": {1: torch.export.Dim("T", min=2, max=80)}}
    return torch.export.export(Net(), (x,), dynamic_shapes=shapes), x


def test_each_operator_is_one_node(exported):
    program, _ = exported
    nodes = [node.target for node in program.graph.nodes if "pylumiere" in str(node.target)]
    assert nodes == list(REFERENCES)


def test_export_decomposes_to_the_same_values(exported):
    program, x = exported
    plain = program.run_decompositions(REFERENCES)
    assert not [node for node in plain.graph.nodes if "pylumiere" in str(node.target)]
    for frames in (2, 4, 7):  # the number of frames is dynamic
        clip = x[:, :1].repeat(1, frames, 1, 1, 1) + torch.arange(frames)[:, None, None, None]
        assert rel_rms(plain.module()(clip), Net()(clip)) < 1e-6


def zeros(*sizes, device="cpu", dtype=torch.float32):
    return torch.zeros(sizes, device=device, dtype=dtype)


ELSEWHERE = {  # operator, with one tensor on another device than the first
    "spatial_conv: weight": lambda d: ops.spatial_conv(zeros(1, 2, 3, 4, 8), zeros(6, 8, 3, 3, device=d)),
    "temporal_conv: weight": lambda d: ops.temporal_conv(zeros(1, 2, 3, 4, 8), zeros(6, 8, 3, device=d)),
    "factorized_conv: weight": lambda d: ops.factorized_conv(
        zeros(1, 2, 3, 4, 8), zeros(6, 8, 3, 3), None, zeros(4, 6, 3, device=d)
    ),
    "norm_affine: gamma": lambda d: ops.norm_affine(zeros(2, 2, 8), 9, zeros(8, device=d), zeros(8), 2),
    "groupnorm_silu: bias": lambda d: ops.groupnorm_silu(zeros(1, 2, 3, 8), zeros(8), zeros(8, device=d), 2),
    "layer_norm: bias": lambda d: ops.layer_norm(zeros(2, 3, 8), zeros(8), zeros(8, device=d)),
    "temporal_attention: position": lambda d: ops.temporal_attention(zeros(1, 3, 4, 24), 2, zeros(2, 5, device=d)),
    "temporal_shift: before": lambda d: ops.temporal_shift(
        zeros(1, 2, 3, 8), 8, "both", "zero", zeros(1, 3, 8, device=d)
    ),
    "denoise_step: out": lambda d: ops.denoise_step(
        zeros(2, 6), None, zeros(1, 2, 6, device=d), zeros(2, 1, dtype=torch.int32), zeros(2, 1), zeros(2, 10),
        zeros(2, 5, dtype=torch.int64),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ELSEWHERE)
def test_tensors_on_two_devices_are_refused_by_op_and_fake(name):
    with pytest.raises(ValueError, match=f"{name} is on meta"):
        ELSEWHERE[name]("meta")
    with FakeTensorMode(), pytest.raises(ValueError, match=f"{name} is on cuda"):
        ELSEWHERE[name]("cuda")
