"""The Triton backend: a small STUNet through the kernels equals the plain one; whole networks as recordings."""

from pathlib import Path

import pytest
import torch
from pylumiere.kernels import launching
from support.testing import assert_close, random_weights, rel_rms

from pylumiere.backends import Choice
from pylumiere.backends.torch import TorchBackend
from pylumiere.backends.triton import TritonBackend, TritonOps, record_network, set_backend
from pylumiere.checkpoints.native import Checkpoint
from pylumiere.config import LevelConfig, ModelConfig, StageConfig, STUNetConfig
from pylumiere.errors import UnsupportedDevice
from pylumiere.networks.ops import PlainOps
from pylumiere.networks.stunet import STUNet
from pylumiere.networks.stunet.presets import stage_preset

DEVICE = "cpu" if launching.interpreted() else "cuda"

# Every kind of block: shift, spatial, cross and temporal attention, resampling in space and time.
BASE = STUNetConfig(
    levels=(
        LevelConfig(16, temporal_factor=2, shift=True),
        LevelConfig(32, temporal_conv=False, temporal_attention=1, spatial_attention=True, cross_attention=True),
    ),
    num_groups=4, head_dim=16, text_dim=8, num_frames=4, height=8, width=8,
)  # fmt: skip
SSR = STUNetConfig(
    levels=(LevelConfig(16), LevelConfig(24, temporal_conv=False, shift=True)), in_channels=6, patch_size=2,
    num_groups=4, head_dim=8, text_dim=0, noise_level=True, frame_embedding=False, skip_input=3, num_frames=3, height=8,
    width=8, shift_pad="circular", shift_direction="causal",
)  # fmt: skip
CONFIGS = {"base": BASE, "ssr": SSR}


def network(config: STUNetConfig, dtype=torch.float32) -> STUNet:
    """Random weights everywhere: the zero-initialised ends of each branch would hide it."""
    model = STUNet(config).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.copy_(0.5 * noise * parameter[0].numel() ** -0.5 if parameter.dim() > 1 else parameter + 0.1 * noise)
    return model.to(dtype)


def inputs(config: STUNetConfig, batch: int = 1, device: str = "cpu") -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    sizes = (batch, config.num_frames, config.height, config.width, config.in_channels)
    values = {"sample": torch.randn(sizes, generator=generator)}
    values["timesteps"] = 900 * torch.rand(batch, generator=generator)
    if config.text_dim:
        values["text"] = torch.randn(batch, 5, config.text_dim, generator=generator)
        values["text_mask"] = torch.arange(5)[None].repeat(batch, 1) < 4
    if config.noise_level:
        values["noise_level"] = torch.rand(batch, generator=generator)
    return {name: value.to(device) for name, value in values.items()}


def record(config: STUNetConfig, arch: int, dtype=torch.float32) -> launching.Recording:
    return record_network(config, arch, dtype, text_tokens=5)


@pytest.fixture(scope="module", params=CONFIGS)
def case(request):
    """Config, weights, inputs, and the output in float64."""
    config = CONFIGS[request.param]
    model, values = network(config), inputs(config)
    with torch.inference_mode():
        wide = {name: v.double() if v.is_floating_point() else v for name, v in values.items()}
        expected = network(config, torch.float64)(**wide)
    return config, model, values, expected


def test_the_network_equals_the_plain_one(case):
    _, model, values, expected = case
    with torch.inference_mode():
        plain = set_backend(model, "torch")(**values)
        assert isinstance(model.ops, PlainOps) and model.ops.name == "torch"
        set_backend(model.to(DEVICE), "triton")
        actual = model(**{name: value.to(DEVICE) for name, value in values.items()}).cpu()
    assert model.ops.name == "triton"
    assert_close(actual, expected, kind="matmul", plain=plain)


def test_a_recording_replays_to_the_output(case):
    config, model, values, expected = case
    recording = record(config, arch=0)
    output = recording.replay(values | dict(model.named_parameters()))
    with torch.inference_mode():
        plain = set_backend(model, "torch")(**values)
    assert_close(output, expected, kind="matmul", plain=plain)


def test_the_launches_alone_replay_to_the_output():
    """Grids, argument layouts and constants of a recording are all that is needed to run it."""
    values, model = inputs(SSR), network(SSR)
    recording = record(SSR, arch=0)
    by_launches = recording.replay(values | dict(model.named_parameters()), use="launches", device=DEVICE).cpu()
    by_references = recording.replay(values | dict(model.named_parameters()))
    assert rel_rms(by_launches, by_references) < 1e-5
    assert len(recording.launches) > 30


@pytest.mark.parametrize("name", ["demo-base", "demo-ssr", "stunet-b", "ssr-b", "stunet-l", "ssr-l"])
def test_every_preset_records_without_a_gpu(name):
    config = stage_preset(name).network
    recording = record(config, 90, torch.bfloat16)
    assert tuple(recording.outputs.shape) == (1, config.num_frames, config.height, config.width, config.out_channels)
    kernels = {launch.kernel.rpartition(":")[2] for launch in recording.launches}
    assert {"implicit_gemm_kernel", "_affine_kernel"} <= kernels
    assert 0 < recording.peak_bytes() < sum(buffer.bytes for buffer in recording.buffers)


def test_weights_keep_their_values_when_laid_out():
    model = network(SSR)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    set_backend(model, "triton")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.conv_in.weight.stride(1) == 1
    model.load_state_dict(before)
    assert model.conv_in.weight.stride(1) == 1


def test_statistics_travel_from_epilogue_to_norm():
    """A norm right after a convolution reads no tensor: the recording has no statistics pass there."""
    recording = record(BASE, arch=90)
    names = [call.name for call in recording.calls]
    assert names.count("norm_affine") > names.count("channel_statistics")


def test_the_backend_of_the_engine_predicts_what_the_plain_one_does():
    config = ModelConfig("small", StageConfig(BASE), StageConfig(SSR), text_encoder="hash")
    checkpoint = Checkpoint(Path("nowhere"), config, random_weights(BASE, 0), random_weights(SSR, 1))
    generator = torch.Generator().manual_seed(0)
    sample, level = torch.randn(2, 1, 8, 8, 6, generator=generator), torch.rand(2, generator=generator)
    predictions = []
    for name, backend in (("torch", TorchBackend), ("triton", TritonBackend)):
        ready = backend(checkpoint, Choice(name, torch.device(DEVICE), "fp32", "for the test"))
        operands = (value.to(DEVICE) for value in (sample, torch.tensor([10.0, 700.0])))
        predictions.append(ready.predict("ssr", *operands, noise_level=level.to(DEVICE)).cpu())
        assert ready.name == name
    assert rel_rms(predictions[1], predictions[0]) < 1e-5


@pytest.mark.gpu
def test_cuda_graph_replay_equals_the_first_run():
    model = set_backend(network(BASE, torch.bfloat16).to("cuda"), "triton")
    values = inputs(BASE, device="cuda")
    with torch.inference_mode():
        expected = model(**values)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output = model(**values)
        output.zero_()
        graph.replay()
    assert torch.equal(output, expected)


def test_unknown_choices_are_refused():
    model = STUNet(SSR)
    with pytest.raises(ValueError, match="backend='cuda'"):
        set_backend(model, "cuda")
    with pytest.raises(ValueError, match="precision='fp8'"):
        TritonOps("fp8")
    with pytest.raises(ValueError, match="scale and shift need a norm"):
        TritonOps().spatial_conv(torch.zeros(1, 1, 2, 2, 4), torch.zeros(4, 4, 1, 1), None, scale=torch.zeros(1, 1, 4))


def test_a_cpu_model_without_the_interpreter_is_refused(monkeypatch):
    monkeypatch.setattr(launching, "interpreted", lambda: False)
    with pytest.raises(UnsupportedDevice, match="needs a GPU, the model is on cpu"):
        set_backend(STUNet(SSR), "triton")
