"""The Triton backend: small networks through the kernels equal the plain ones; whole networks as recordings."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from pylumiere.kernels import launching
from support.testing import assert_close, random_weights, rel_rms

from pylumiere.backends import Choice
from pylumiere.backends.torch import TorchBackend
from pylumiere.backends.triton import TritonBackend, TritonOps, record_network, record_preset, set_backend
from pylumiere.checkpoints.native import Checkpoint
from pylumiere.config import (
    AutoencoderKLConfig,
    AutoencoderTinyConfig,
    LevelConfig,
    ModelConfig,
    NetworkConfig,
    StageConfig,
    STUNetConfig,
    TemporalShiftConfig,
    UNet2DConfig,
)
from pylumiere.errors import UnsupportedDevice
from pylumiere.networks.families import AnyConfig, family_of
from pylumiere.networks.ops import Norm, PlainOps
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

UNET = UNet2DConfig(
    block_out_channels=(24, 32), down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), layers_per_block=(1, 1), transformer_layers_per_block=(1, 1),
    num_heads=(2, 1), cross_attention_dim=12, norm_num_groups=8, num_frames=2, height=4, width=4,
)  # fmt: skip
SHIFT = TemporalShiftConfig(7)  # of 24 channels 3 and 3, of others up to 9 and 9: no multiples of a block
SHIFTED = replace(UNET, temporal_shift=SHIFT, use_linear_projection=True, upcast_attention=True)
KL = AutoencoderKLConfig((16, 24), norm_num_groups=4)
TINY = AutoencoderTinyConfig((8, 8), (16, 16), (1, 1), (1, 1))
CONFIGS = {
    "base": BASE, "ssr": SSR, "unet": UNET, "unet, shifted and with linear projections": SHIFTED, "kl decoder": KL,
    "tiny decoder": TINY,
}  # fmt: skip
LATENTS = {"T": 2, "H": 3, "W": 2}


def network(config: AnyConfig, dtype=torch.float32) -> torch.nn.Module:
    """Random weights everywhere: the zero-initialised ends of each branch would hide it."""
    model = family_of(config).build(config).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.copy_(0.5 * noise * parameter[0].numel() ** -0.5 if parameter.dim() > 1 else parameter + 0.1 * noise)
    return model.to(dtype)


def batch_of(config: AnyConfig) -> int:
    """Two clips where frames may be shifted: those of one must not reach into the other."""
    return 2 if config.family == "unet2d" else 1


def inputs(config: AnyConfig, device: str = "cpu") -> dict[str, torch.Tensor]:
    generator, batch = torch.Generator().manual_seed(1), batch_of(config)
    if not isinstance(config, NetworkConfig):
        shape = (batch, *LATENTS.values(), config.latent_channels)
        return {"latents": torch.randn(shape, generator=generator).to(device)}
    sizes = (batch, config.num_frames, config.height, config.width, config.in_channels)
    values = {"sample": torch.randn(sizes, generator=generator)}
    values["timesteps"] = 900 * torch.rand(batch, generator=generator)
    if config.text_dim:
        values["text"] = torch.randn(batch, 5, config.text_dim, generator=generator)
    if config.text_dim and config.masks_text:
        values["text_mask"] = torch.arange(5)[None].repeat(batch, 1) < 4
    if config.noise_level:
        values["noise_level"] = torch.rand(batch, generator=generator)
    return {name: value.to(device) for name, value in values.items()}


def record(config: AnyConfig, arch: int, dtype=torch.float32) -> launching.Recording:
    sizes = None if isinstance(config, NetworkConfig) else LATENTS
    return record_network(config, arch, dtype, batch=batch_of(config), text_tokens=5, sizes=sizes)


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


PUBLIC = {  # output, and calls of operators
    "sd-1.5": ((1, 16, 64, 64, 4), {"norm_affine": 61, "layer_norm": 48, "geglu": 16, "attention": 32}),
    "sd-2.1": ((1, 16, 96, 96, 4), {"norm_affine": 61, "layer_norm": 48, "geglu": 16, "attention": 32}),
    "sd-1.5-decoder": ((1, 1, 512, 512, 3), {"norm_affine": 29, "groupnorm_silu": 1, "attention": 1}),
}


@pytest.mark.parametrize("name", PUBLIC)
def test_public_networks_record_without_a_gpu(name):
    shape, counts = PUBLIC[name]
    recording = record_preset(name, 90)
    calls = Counter(call.name for call in recording.calls)
    assert tuple(recording.outputs.shape) == shape
    assert {operator: calls[operator] for operator in counts} == counts
    assert not {name for name in calls if "norm" in name or "gelu" in name} - {*counts, "channel_statistics"}


def test_a_decoder_is_recorded_at_given_sizes_only():
    with pytest.raises(ValueError, match="autoencoder_kl is made for no size: sizes must give T, H and W"):
        record_network(KL, 90)


def test_the_temporal_shift_costs_no_launch_and_moves_no_bytes():
    """The same kernels over the same memory; the first convolution of each block looks elsewhere in it."""

    def memory(recording):
        kernels = [[(one.kernel, one.grid, one.tensors()) for one in call.launches] for call in recording.calls]
        return [(call.name, call.outputs) for call in recording.calls], kernels, recording.peak_bytes()

    plain, shifted = record(UNET, 90), record(replace(UNET, temporal_shift=SHIFT), 90)
    assert memory(shifted) == memory(plain)
    moved = [launch for launch in shifted.launches if launch.constants.get("SHIFT")]
    assert [launch.args["fold_next"] for launch in moved] == [3, 3, 4, 4, 9, 8, 8, 6]
    assert not [launch for launch in plain.launches if launch.constants.get("SHIFT")]


WEIGHTS = {"spatial_conv": (6, 8, 3, 3), "temporal_conv": (6, 8, 3), "linear": (6, 8)}


@pytest.mark.parametrize("over_frames", [False, True], ids=["frame", "clip"])
@pytest.mark.parametrize("operation", [*WEIGHTS, "activate"])
def test_row_bias_and_norms_over_frames_are_those_of_the_definition(operation, over_frames):
    generator = torch.Generator().manual_seed(0)

    def normal(*sizes):
        return torch.randn(sizes, generator=generator)

    x, weight = normal(2, 3, 3, 4, 8) + 1, normal(*WEIGHTS.get(operation, ()))
    gamma, beta = normal(2, 8)
    scale, shift, rows = normal(2, 3, 24).chunk(3, -1)

    def run(ops, change, has_norm, modulation, silu, row_bias):
        scale, shift, row_bias = (None if t is None else change(t) for t in (*modulation, row_bias))
        norm = Norm(change(gamma), change(beta), 2, 1e-5, over_frames) if has_norm else None
        if operation == "activate":
            return ops.activate(change(x), norm, scale, shift, silu, row_bias=row_bias)
        options = dict(norm=norm, scale=scale, shift=shift, silu=silu, row_bias=row_bias)
        return getattr(ops, operation)(change(x), change(weight), None, **options)

    for case in (
        (True, (None, None), True, rows[:, :1]), (True, (scale, shift), False, rows),
        (True, (scale, shift), True, None), (False, (None, None), True, rows),
    ):  # fmt: skip
        expected = run(PlainOps(), torch.Tensor.double, *case)
        assert_close(run(TritonOps(), lambda t: t.to(DEVICE), *case).cpu(), expected, kind="matmul")


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
    config = ModelConfig("small", (StageConfig("base", BASE), StageConfig("ssr", SSR)), text_encoder="hash")
    weights = {"base": random_weights(BASE, 0), "ssr": random_weights(SSR, 1)}
    checkpoint = Checkpoint(Path("nowhere"), config, weights)
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
