"""The TensorRT backend against a stand-in for the library that is as strict as the real one about the order of calls.

The stand-in computes on the addresses that it is given, so a wrong address, shape or profile gives a wrong result. What
only a GPU can show (streams, real plans) is marked and skipped where there is none.
"""

from __future__ import annotations

import ctypes
import types

import numpy as np
import pytest
import torch

from pylumiere.backends.artefacts import Machine
from pylumiere.backends.choice import Choice
from pylumiere.backends.tensorrt import TensorRTBackend
from pylumiere.checkpoints.bundle import Artefact, FileEntry, Library, Receipt, ShapeRange, Target, TensorSpec
from pylumiere.errors import BundleError, InvalidRequest, UnsupportedDevice
from pylumiere.networks.stunet.presets import model_preset

CHOICE = Choice("tensorrt_rtx", torch.device("cpu"), "fp16", "test")
MACHINE = Machine(89, "rtx4090", "rtx4090", "linux-x86_64", {"tensorrt_rtx": "1.7.1"}, {})
PLAN = b"\x00plan of the tests"


class Engine:
    """Promises `sample * timesteps` on [B, T, 2, 2, 3] with two profiles: T of 4, and T of 6 to 8."""

    num_io_tensors, num_optimization_profiles = 3, 2
    profiles = {
        "sample": [[(1, 4, 2, 2, 3), (2, 4, 2, 2, 3), (2, 4, 2, 2, 3)],
                   [(1, 6, 2, 2, 3), (3, 8, 2, 2, 3), (3, 8, 2, 2, 3)]],
        "timesteps": [[(1,), (2,), (2,)], [(1,), (3,), (3,)]],
    }  # fmt: skip

    def get_tensor_name(self, index):
        return ["sample", "timesteps", "prediction"][index]

    def get_tensor_mode(self, name):
        return "output" if name == "prediction" else "input"

    def get_tensor_dtype(self, name):
        return "float"

    def get_tensor_profile_shape(self, name, index):
        return self.profiles[name][index]

    def create_execution_context(self, strategy):
        assert strategy == "user managed"
        return Context()


class Context:
    """Refuses what the library refuses: shapes outside of the profile, missing addresses, too little memory."""

    def __init__(self):
        self.profile, self.shapes, self.addresses, self.memory, self.wanted = None, {}, {}, None, None
        self.calls = []

    def set_optimization_profile_async(self, index, stream):
        self.profile, self.shapes, self.wanted = index, {}, None
        self.calls.append(("profile", index))
        return True

    def set_input_shape(self, name, shape):
        low, _, high = Engine.profiles[name][self.profile]
        self.shapes[name], self.wanted = shape, None
        return len(low) == len(shape) and all(a <= b <= c for a, b, c in zip(low, shape, high, strict=True))

    def set_tensor_address(self, name, address):
        self.addresses[name] = address
        return address != 0

    def update_device_memory_size_for_shapes(self):
        assert set(self.shapes) == {"sample", "timesteps"}, "shapes are not all given"
        self.wanted = 1024 * self.shapes["sample"][0]
        return self.wanted

    def set_device_memory(self, address, size):
        self.memory = size

    def execute_async_v3(self, stream):
        if self.wanted is None or self.memory < self.wanted or len(self.addresses) != 3:
            return False
        self.calls.append(("run", self.shapes["sample"]))

        def array(name, shape):
            return np.ctypeslib.as_array(ctypes.cast(self.addresses[name], ctypes.POINTER(ctypes.c_float)), shape)

        scale = array("timesteps", self.shapes["timesteps"])[:, None, None, None, None]
        array("prediction", self.shapes["sample"])[:] = array("sample", self.shapes["sample"]) * scale
        return True


def fake_library(engine=None, deserialised=None):
    """`deserialised` gets the bytes that reach the library."""
    seen = [] if deserialised is None else deserialised

    class Runtime:
        engine_host_code_allowed = True

        def __init__(self, logger):
            self.logger = logger

        def deserialize_cuda_engine(self, data):
            assert not self.engine_host_code_allowed
            seen.append(data)
            if engine is None:
                self.logger.log("error", "not\na plan")
            return engine

    class ILogger:
        Severity = types.SimpleNamespace(ERROR="error", INTERNAL_ERROR="internal")

    return types.SimpleNamespace(
        Runtime=Runtime, ILogger=ILogger, TensorIOMode=types.SimpleNamespace(INPUT="input", OUTPUT="output"),
        DataType=types.SimpleNamespace(FLOAT="float", HALF="half"),
        ExecutionContextAllocationStrategy=types.SimpleNamespace(USER_MANAGED="user managed"),
    )  # fmt: skip


class FakeBundle:
    config = model_preset("tiny")
    manifest = types.SimpleNamespace(files={"engines/a.plan": FileEntry(size=len(PLAN), sha256="0" * 64)})

    def read(self, name):
        assert name == "engines/a.plan"
        return PLAN


def plan(**changes):
    profiles = tuple(
        {name: ShapeRange(**dict(zip(("min", "opt", "max"), shapes[index], strict=True)))
         for name, shapes in Engine.profiles.items()}
        for index in range(2)
    )  # fmt: skip
    one = Artefact(
        name="plan-base", kind="plan", backend="tensorrt_rtx", stage="base", precision="fp16", profiles=profiles,
        target=Target(sms=(89,), platform="linux-x86_64"), library=Library(name="tensorrt_rtx", version="1.7.1"),
        files=("engines/a.plan",), outputs=(TensorSpec(name="prediction", dtype="fp32"),),
        inputs=(TensorSpec(name="sample", dtype="fp32"), TensorSpec(name="timesteps", dtype="fp32")),
        receipt=Receipt(build_seconds=0.0),
    )  # fmt: skip
    return one.model_copy(update=changes)


def make(library=None, artefact=None, machine=MACHINE):
    library = library or fake_library(Engine())
    return TensorRTBackend(FakeBundle(), {"base": artefact or plan()}, CHOICE, library=library, machine=machine)


@pytest.mark.parametrize("rows, frames", [(1, 4), (2, 4), (5, 4), (1, 6), (3, 8), (7, 7)])
def test_calls_give_what_the_plan_computes(rows, frames):
    backend = make()
    generator = torch.Generator().manual_seed(rows)
    for _ in range(2):
        sample = torch.randn(rows, frames, 2, 2, 3, generator=generator)
        times = torch.rand(rows, generator=generator)
        out = backend.predict("base", sample, times)
        assert torch.equal(out, sample * times.view(-1, 1, 1, 1, 1))


def test_the_profile_changes_only_when_it_must():
    backend = make()
    for frames in (4, 4, 8, 6, 4):
        backend.predict("base", torch.randn(2, frames, 2, 2, 3), torch.rand(2))
    calls = backend._plans["base"]._context.calls
    assert [index for kind, index in calls if kind == "profile"] == [0, 1, 0]


def test_strided_operands_are_laid_out():
    sample = torch.randn(2, 2, 4, 2, 3).transpose(1, 2)
    assert torch.equal(make().predict("base", sample, torch.ones(2)), sample)


def test_sizes_without_a_profile_are_refused():
    backend = make()
    with pytest.raises(InvalidRequest, match=r"4x2x2x3, 6\.\.8x2x2x3; asked for 5x2x2x3"):
        backend.predict("base", torch.randn(1, 5, 2, 2, 3), torch.rand(1))
    with pytest.raises(InvalidRequest, match="asked for 5x2x2x3"):
        backend.check("base", (1, 5, 2, 2, 3))


@pytest.mark.parametrize("artefact, machine, why", [
    (plan(library=Library(name="tensorrt_rtx", version="1.8.0")), MACHINE, "built by tensorrt_rtx 1.8.0; 1.7.1 is"),
    (plan(target=Target(sms=(86,))), MACHINE, "built for sm_86; this GPU is sm_89"),
    (plan(target=Target(sms=(89,), sku="l4")), MACHINE, "built for l4; this is rtx4090"),
    (plan(target=Target(sms=(89,), platform="linux-aarch64")), MACHINE, "built for linux-aarch64"),
    (plan(backend="tensorrt"), MACHINE, "no plan of tensorrt_rtx"),
    (plan(), Machine(None, None, "CPU", "linux-x86_64", {}, {}), "there is no GPU"),
])  # fmt: skip
def test_a_foreign_plan_never_reaches_the_library(artefact, machine, why):
    reached = []
    with pytest.raises(UnsupportedDevice, match=why):
        make(fake_library(Engine(), reached), artefact, machine)
    assert reached == []
    make(fake_library(Engine(), reached))
    assert reached == [PLAN]


def test_a_refused_plan_is_one_line():
    with pytest.raises(BundleError, match="refused by tensorrt_rtx: not a plan$"):
        make(fake_library(None))


@pytest.mark.parametrize("changes, text", [
    ({"inputs": (TensorSpec(name="sample", dtype="fp16"), TensorSpec(name="timesteps", dtype="fp32"))}, "half"),
    ({"outputs": (TensorSpec(name="out", dtype="fp32"),)}, "'prediction'"),
    ({"profiles": plan().profiles[:1]}, "1 profiles, the plan 2"),
    ({"profiles": plan().profiles[::-1]}, "profile 0 of sample is"),
])  # fmt: skip
def test_a_plan_that_is_not_what_the_manifest_says_is_refused(changes, text):
    with pytest.raises(BundleError, match=text):
        make(artefact=plan(**changes))


def test_the_real_library_is_as_the_stand_in_says():
    """The names and arguments used, from the library's own signatures; it loads without a GPU."""
    trt = pytest.importorskip("tensorrt_rtx")
    from pylumiere.backends.tensorrt import _DATA_TYPES, _logger

    for owner, names in {
        trt.Runtime: ("deserialize_cuda_engine", "engine_host_code_allowed"),
        trt.ICudaEngine: ("num_io_tensors", "num_optimization_profiles", "get_tensor_name", "get_tensor_mode",
                          "get_tensor_dtype", "get_tensor_profile_shape", "create_execution_context"),
        trt.IExecutionContext: tuple(name for name in vars(Context) if not name.startswith("_")),
        trt.DataType: tuple(_DATA_TYPES.values()),
        trt.TensorIOMode: ("INPUT", "OUTPUT"),
        trt.ExecutionContextAllocationStrategy: ("USER_MANAGED",),
    }.items():  # fmt: skip
        assert all(hasattr(owner, name) for name in names), owner
    logger = _logger(trt)
    runtime = trt.Runtime(logger)
    runtime.engine_host_code_allowed = False
    assert runtime.deserialize_cuda_engine(b"no plan at all") is None
    assert logger.last() != "it gave no reason"
