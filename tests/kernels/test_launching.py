"""The launch function and recordings: checks, lifetimes, replays with references and with the launches themselves."""

import importlib.util
import json
from pathlib import Path

import pylumiere.kernels
import pytest
import torch
import triton
from pylumiere.kernels import launching, norm_affine, spatial_conv, temporal_conv
from pylumiere.kernels.implicit_gemm import implicit_gemm_kernel, pack_weight
from support.testing import assert_close
from torch._subclasses.fake_tensor import FakeTensorMode

DEVICE = "cpu" if launching.interpreted() else "cuda"


def block(x, first, second, gamma, beta):
    """Two convolutions with a GroupNorm between, and a PyTorch operator at the end."""
    x = x.view(1, 2, 4, 4, 16)
    h, statistics = spatial_conv.launch(x, first, statistics=True)
    mul, add = norm_affine.launch(statistics, 16, gamma, beta, 4)
    y, _ = temporal_conv.launch(h, second, None, mul, add, silu=True)
    return y.flatten(0, 1) * 2 + 1


def operands(device="cpu"):
    generator = torch.Generator().manual_seed(0)
    sizes = {"x": (2, 16, 16), "first": (24, 16, 3, 3), "second": (8, 24, 3), "gamma": (24,), "beta": (24,)}
    tensors = {name: torch.randn(size, generator=generator) for name, size in sizes.items()}
    tensors |= {name: pack_weight(tensors[name]) for name in ("first", "second")}
    return {name: value.to(device) for name, value in tensors.items()}


def recorded_block(tensors, arch=0):
    with launching.record(arch) as recording:
        recording.name_tensors({"x": tensors["x"]}, "input")
        recording.name_tensors({name: value for name, value in tensors.items() if name != "x"}, "weight")
        recording.mark_outputs(block(**tensors))
    return recording


def expected():
    wide = {name: value.double() for name, value in operands().items()}
    x = wide["x"].view(1, 2, 4, 4, 16)
    h, statistics = spatial_conv.reference(x, wide["first"], statistics=True)
    mul, add = norm_affine.reference(statistics, 16, wide["gamma"], wide["beta"], 4)
    return temporal_conv.reference(h, wide["second"], None, mul, add, silu=True)[0].flatten(0, 1) * 2 + 1


def test_recording_needs_no_data_and_lists_every_call():
    recording = recorded_block(operands("meta"))
    assert [call.name for call in recording.calls] == [
        "spatial_conv", "norm_affine", "temporal_conv", "aten.mul.Tensor", "aten.add.Tensor",
    ]  # fmt: skip
    kernels = [launch.kernel.rpartition(":")[2] for launch in recording.launches]
    assert kernels == ["implicit_gemm_kernel", "_affine_kernel", "implicit_gemm_kernel"]
    first = recording.launches[0]
    assert first.grid == (2,) and first.args["C"] == 16 and first.constants["KS"] == 3
    assert first.args["x_ptr"].shape == (1, 2, 4, 4, 16) and first.args["weight_ptr"].stride == (144, 1, 48, 16)


def test_recording_on_fake_tensors_equals_recording_on_meta_tensors():
    with FakeTensorMode() as mode:
        tensors = {name: mode.from_tensor(value) for name, value in operands().items()}
        fake = recorded_block(tensors)
    meta = recorded_block(operands("meta"))
    assert [launch.key() for launch in fake.launches] == [launch.key() for launch in meta.launches]


@pytest.mark.parametrize("use", ["references", "launches"])
def test_replay_gives_the_output(use):
    recording = recorded_block(operands("meta"))
    assert_close(recording.replay(operands(), use=use, device=DEVICE).cpu(), expected(), kind="matmul")


def test_recording_of_real_tensors_also_runs():
    tensors = operands(DEVICE)
    with launching.record(0) as recording:
        y = block(**tensors)
    assert_close(y.cpu(), expected(), kind="matmul")
    assert len(recording.launches) == 3


def test_questions_about_dtypes_are_no_calls():
    with launching.record(0) as recording:
        x = torch.empty(3, dtype=torch.float16, device="meta")
        x.to(torch.promote_types(x.dtype, torch.float32))
    assert [call.name for call in recording.calls] == ["aten._to_copy.default"]


def test_lifetimes_span_first_write_to_last_read():
    recording = recorded_block(operands("meta"))
    h = recording.buffers[recording.launches[0].args["y_ptr"].buffer]
    assert (h.kind, h.first, h.last) == ("temporary", 0, 2)
    assert h.bytes == 2 * 16 * 24 * 4
    output = recording.buffers[recording.outputs.buffer]
    assert (output.kind, output.last) == ("output", len(recording.calls))
    assert {b.name for b in recording.buffers if b.kind == "weight"} == {"first", "second", "gamma", "beta"}
    total = sum(b.bytes for b in recording.buffers if b.kind in ("temporary", "output"))
    assert h.bytes < recording.peak_bytes() < total


def test_recording_is_plain_data():
    data = json.loads(json.dumps(recorded_block(operands("meta")).to_json()))
    layout = data["calls"][0]["launches"][0]["args"]["x_ptr"]
    assert (layout["buffer"], layout["offset"], layout["dtype"]) == (0, 0, "float32")
    assert (layout["shape"], layout["stride"]) == ([1, 2, 4, 4, 16], [512, 256, 64, 16, 1])


def test_replay_names_what_is_missing_or_does_not_fit():
    recording = recorded_block(operands("meta"))
    values = operands()
    with pytest.raises(ValueError, match="needs 'gamma'"):
        recording.replay({name: value for name, value in values.items() if name != "gamma"})
    with pytest.raises(ValueError, match="'x': got"):
        recording.replay(values | {"x": values["x"][:1]})
    with pytest.raises(ValueError, match="use='kernels'"):
        recording.replay(values, use="kernels")


def test_replay_refuses_memory_that_nothing_wrote():
    with launching.record(0) as recording:
        recording.mark_outputs(torch.empty(3, device="meta") + 1)
    with pytest.raises(ValueError, match="read before it is written"):
        recording.replay({})


def test_named_tensors_must_own_their_memory():
    with launching.record(0) as recording, pytest.raises(ValueError, match="'half' must be alone in its memory"):
        recording.name_tensors({"half": torch.empty(4, device="meta")[2:]}, "input")


def test_recordings_do_not_nest():
    with launching.record(), pytest.raises(RuntimeError, match="already active"), launching.record():
        pass


def test_launches_outside_an_operator_are_refused():
    tensors = operands("meta")
    args = merge_arguments() | {"partial_ptr": tensors["x"]}
    with launching.record(), pytest.raises(RuntimeError, match="outside an operator"):
        launching.launch(norm_affine._merge_kernel, (1,), args, {"MERGE": 64, "BLOCK_C": 16})


def merge_arguments():
    return dict(partial_ptr=torch.zeros(1, 2, 2, 4), merged_ptr=torch.zeros(1, 1, 2, 4), S=2, C=4, tiles=2, span=1)


def test_launch_checks_names_grid_and_device():
    constants = {"MERGE": 64, "BLOCK_C": 16}
    kernel = norm_affine._merge_kernel
    with pytest.raises(ValueError, match=r"_merge_kernel: arguments do not match its parameters: \['span'\]"):
        args = merge_arguments()
        del args["span"]
        launching.launch(kernel, (1,), args, constants)
    with pytest.raises(ValueError, match=r"grid=\(1, 70000\) is beyond the limits"):
        launching.launch(kernel, (1, 70000), merge_arguments(), constants)
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET=1"):
        launching.launch(triton.JITFunction(kernel.fn), (1,), merge_arguments(), constants)
    with pytest.raises(RuntimeError, match="only be launched while recording"):
        args = merge_arguments()
        launching.launch(kernel, (1,), args | {"partial_ptr": args["partial_ptr"].to("meta")}, constants)


def test_empty_grid_does_nothing():
    args = merge_arguments()
    launching.launch(norm_affine._merge_kernel, (0,), args, {"MERGE": 64, "BLOCK_C": 16})
    assert not args["merged_ptr"].any()


def test_specialisation_sees_types_alignment_and_constants_but_not_sizes():
    def key(size, offset=0):
        with launching.record(90) as recording:
            x = torch.empty(1, 1, size, size, 40, dtype=torch.bfloat16, device="meta")[..., offset : offset + 32]
            spatial_conv.launch(x, pack_weight(torch.empty(32, 32, 3, 3, dtype=torch.bfloat16, device="meta")))
        return recording.launches[0]

    assert key(100).key() == key(102).key()
    assert key(100, offset=0).key() != key(100, offset=2).key()  # 4 bytes off: no 16-byte loads
    facts = key(100).specialisation()
    assert facts["signature"]["x_ptr"] == "*bf16" and facts["signature"]["C"] == "i32"
    assert facts["constants"]["bias_ptr"] is None and facts["signature"]["bias_ptr"] == "constexpr"


def test_kernels_are_found_again_by_name():
    assert launching.find_kernel(launching.kernel_name(implicit_gemm_kernel)) is implicit_gemm_kernel


def test_the_folder_refuses_to_be_imported_under_another_name():
    path = Path(pylumiere.kernels.__file__)
    spec = importlib.util.spec_from_file_location("kernels", path)
    with pytest.raises(ImportError, match="pip install"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
