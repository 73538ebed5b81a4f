"""Which artefact of a bundle is taken on which machine, and how calls are cut to what it takes."""

from __future__ import annotations

import pytest

from pylumiere.backends.artefacts import ArtefactBackend, Machine, cut, imagined_machine, select
from pylumiere.backends.choice import choose
from pylumiere.checkpoints.bundle import (
    Artefact,
    FileEntry,
    Library,
    Manifest,
    Receipt,
    ShapeRange,
    Target,
    TensorSpec,
    TextEncoder,
)
from pylumiere.config import AutoencoderKLConfig, DecoderConfig, ModelConfig, StageConfig, UNet2DConfig
from pylumiere.errors import BundleError, InvalidRequest, UnsupportedDevice
from pylumiere.networks.stunet.presets import model_preset

RTX, FULL = Library(name="tensorrt_rtx", version="1.7.1"), Library(name="tensorrt", version="10.9.0")
SHAPES = {"base": (8, 16, 16, 7), "ssr": (4, 32, 32, 6)}


def artefact(kind, stage, precision="fp16", library=RTX, sms=(), sku=None, platform="any", name=None):
    backend = {"onnx": "onnxruntime", "cubins": "triton"}.get(kind, library.name)
    target = Target(sku=sku, sms=sms, platform=platform)
    name = name or f"{kind}-{stage}-{library.name}-{target.label}-{precision}"
    shape = SHAPES.get(stage, (8,))
    ranges = ShapeRange(min=(1, *shape), opt=(2, *shape), max=(2, *shape))
    return Artefact(
        name=name, kind=kind, backend=backend, stage=stage, target=target, precision=precision, library=library,
        files=("model/base.safetensors",), inputs=(TensorSpec(name="sample", dtype="fp32"),),
        outputs=(TensorSpec(name="prediction", dtype="fp32"),), profiles=({"sample": ranges},),
        receipt=Receipt(build_seconds=0.0),
    )  # fmt: skip


def both(*arguments, **options):
    return [artefact(arguments[0], stage, *arguments[1:], **options) for stage in ("base", "ssr")]


HASH = TextEncoder(kind="hash", width=32)


def manifest(*groups, text=HASH):
    entry = FileEntry(size=1, sha256="0" * 64)
    files = dict.fromkeys(["model/base.safetensors", "model/ssr.safetensors", "text/tokenizer.json"], entry)
    return Manifest(
        name="tiny", created_by="tests", model=model_preset("tiny").to_dict(), text=text, files=files,
        weights={"base": "model/base.safetensors", "ssr": "model/ssr.safetensors"},
        artefacts=tuple(one for group in groups for one in group),
    )  # fmt: skip


def gpu(sm=89, sku="rtx4090", versions=None, missing=None, platform="linux-x86_64"):
    here = {"tensorrt": "10.9.0", "tensorrt_rtx": "1.7.1", "triton": "3.9", "onnxruntime": "1", "torch": "2"}
    return Machine(sm, sku, sku or "a GPU", platform, versions or here, missing or {})


CPU = Machine(
    None, None, "CPU", "linux-x86_64", {"torch": "2", "onnxruntime": "1"},
    {"tensorrt": "it needs a GPU", "tensorrt_rtx": "it needs a GPU", "triton": "it needs a GPU"},
)  # fmt: skip
PORTABLE = both("plan", sms=(80, 86, 89, 120))
PER_SM = both("plan", sms=(89,))
EXACT = both("plan", sms=(89,), sku="rtx4090")
ONNX = both("onnx", "fp32", Library(name="onnx", version="1"))


def test_the_nearest_plan_is_taken():
    everything = manifest(PORTABLE, ONNX, PER_SM, both("plan", sms=(75,)), EXACT)
    taken = {
        sku: [a.target.label for a in select(everything, machine).artefacts.values()]
        for sku, machine in {"rtx4090": gpu(), "l4": gpu(sku="l4"), "a10": gpu(86, "a10"), "t4": gpu(75, "t4")}.items()
    }
    assert taken == {"rtx4090": ["rtx4090"] * 2, "l4": ["sm_89"] * 2, "a10": ["portable"] * 2, "t4": ["sm_75"] * 2}


def test_the_order_is_tensorrt_triton_onnxruntime_torch():
    full = both("plan", library=FULL, sms=(89,))
    everything = manifest(EXACT, full, ONNX)
    without: dict[str, str] = {}
    order = []
    for _ in range(5):
        order.append(select(everything, gpu(missing=without)).backend)
        without[order[-1]] = "taken away"
    assert order == ["tensorrt", "tensorrt_rtx", "triton", "onnxruntime", "torch"]
    with pytest.raises(UnsupportedDevice, match="taken away"):
        select(everything, gpu(missing=without))


def test_a_cpu_takes_onnx_and_says_why():
    selection = select(manifest(EXACT, ONNX), CPU)
    assert selection.backend == "onnxruntime" and selection.precision == "fp32"
    assert list(selection.artefacts) == ["base", "ssr"]
    assert "onnxruntime" in selection.reason and "it needs a GPU" in selection.reason
    assert all("there is no GPU" in selection.passed_over[plan.name] for plan in EXACT)


@pytest.mark.parametrize("machine, why", [
    (gpu(versions={"tensorrt_rtx": "1.7.2"}), "built by tensorrt_rtx 1.7.1; 1.7.2 is installed"),
    (gpu(90, "h100"), "built for sm_89; this GPU is sm_90"),
    (gpu(platform="linux-aarch64"), "built for linux-x86_64; this is linux-aarch64"),
    (gpu(missing={"tensorrt_rtx": "its library does not load"}), "does not load"),
])  # fmt: skip
def test_a_foreign_plan_is_refused_by_the_manifest(machine, why):
    plans = manifest(both("plan", sms=(89,), platform="linux-x86_64"))
    with pytest.raises(UnsupportedDevice, match=why) as caught:
        select(plans, machine, "tensorrt_rtx")
    assert "backend 'tensorrt_rtx' can run" in str(caught.value) and "\n" not in str(caught.value)


def test_a_card_of_another_name_takes_no_exact_plan():
    with pytest.raises(UnsupportedDevice, match="built for rtx4090; this is l4"):
        select(manifest(EXACT), gpu(sku="l4"), "tensorrt_rtx")


def test_every_stage_must_be_there_in_one_precision():
    half = manifest(EXACT[:1], ONNX)
    assert select(half, gpu()).backend == "triton"
    mixed = manifest([artefact("plan", "base", "fp16", sms=(89,)), artefact("plan", "ssr", "bf16", sms=(89,))])
    with pytest.raises(UnsupportedDevice, match="do not cover every stage in one precision"):
        select(mixed, gpu(), "tensorrt_rtx")


def test_precision():
    ada = both("plan", "fp16", sms=(89,)), both("plan", "bf16", sms=(89,))
    plans = manifest(*ada, both("plan", "bf16", sms=(75,)), ONNX)
    assert select(plans, gpu(), "tensorrt_rtx").precision == "bf16"
    assert select(plans, gpu(), "tensorrt_rtx", "fp16").precision == "fp16"
    assert select(plans, gpu(), "tensorrt_rtx", "float16").precision == "fp16"
    with pytest.raises(UnsupportedDevice, match="sm_75 has no bf16"):
        select(plans, gpu(75, "t4"), "tensorrt_rtx")
    assert select(plans, CPU, precision="bf16").backend == "torch"
    with pytest.raises(UnsupportedDevice, match="computes in fp32; bf16 was asked for"):
        select(plans, CPU, "onnxruntime", "bf16")
    with pytest.raises(UnsupportedDevice, match="precision 'fp8' is unknown"):
        select(plans, CPU, precision="fp8")


def test_half_precision_graphs_are_not_for_a_cpu():
    with pytest.raises(UnsupportedDevice, match="no fp16 convolutions on a CPU"):
        select(manifest(both("onnx", "fp16", Library(name="onnx", version="1"))), CPU, "onnxruntime")


def latents(*artefacts, upcast=True):
    """The manifest of a model with a decoder."""
    unet = UNet2DConfig(cross_attention_dim=32)
    vae = AutoencoderKLConfig((32,), force_upcast=upcast)
    model = ModelConfig("latent", (StageConfig("unet", unet),), DecoderConfig(vae), text_encoder="hash")
    files = dict.fromkeys(["model/base.safetensors"], FileEntry(size=1, sha256="0" * 64))
    weights = dict.fromkeys(["unet", "decoder"], "model/base.safetensors")
    return Manifest(name="latent", created_by="tests", model=model.to_dict(), text=HASH, files=files, weights=weights,
                    artefacts=artefacts)  # fmt: skip


def test_a_decoder_that_is_for_fp32_stands_beside_16_bits():
    def plan(stage, precision):
        return artefact("plan", stage, precision, sms=(89,))

    half, full = plan("unet", "fp16"), plan("decoder", "fp32")
    taken = select(latents(half, full), gpu(), "tensorrt_rtx")
    assert taken.precision == "fp16" and dict(taken.artefacts) == {"unet": half, "decoder": full}
    assert select(latents(half, full), gpu(), "tensorrt_rtx", "fp16").artefacts == taken.artefacts
    with pytest.raises(UnsupportedDevice, match="computes in fp16; bf16 was asked for"):
        select(latents(half, full), gpu(), "tensorrt_rtx", "bf16")
    for decoder in (latents(half, plan("decoder", "fp16")), latents(half, full, upcast=False)):
        with pytest.raises(UnsupportedDevice, match="do not cover every stage in one precision"):
            select(decoder, gpu(), "tensorrt_rtx")


def test_everything_that_was_not_taken_has_a_reason():
    text = artefact("onnx", "text", "fp32", Library(name="onnx", version="1"), name="text")
    cubins = artefact("cubins", "base", sms=(89,), library=Library(name="triton", version="3"))
    everything = manifest(PORTABLE, PER_SM, EXACT, ONNX, [text, cubins])
    for machine in (CPU, gpu(), gpu(90, None), imagined_machine("h100"), imagined_machine("sm_75")):
        selection = select(everything, machine)
        taken = {a.name for a in selection.artefacts.values()}
        assert all(selection.passed_over[a.name] for a in everything.artefacts if a.name not in taken)


def test_the_text_encoder_is_a_graph_where_torch_has_no_weights():
    text = artefact("onnx", "text", "fp32", Library(name="onnx", version="1"))
    common = dict(kind="minilm", width=32, tokenizer="text/tokenizer.json")
    graph_only = manifest(ONNX, [text], text=TextEncoder(**common))
    with_weights = manifest(ONNX, [text], text=TextEncoder(**common, weights="model/ssr.safetensors"))
    assert select(graph_only, CPU, "torch").artefacts["text"] == text
    assert "text" not in select(with_weights, CPU, "torch").artefacts
    assert select(with_weights, CPU).artefacts["text"] == text
    assert "text" not in select(manifest(ONNX, [text]), CPU).artefacts


def test_a_model_folder_is_no_bundle():
    for backend in ("onnxruntime", "tensorrt", "tensorrt_rtx"):
        with pytest.raises(UnsupportedDevice, match="pylumiere export"):
            choose(backend, "cpu", "fp32")


def profiled(*profiles):
    specs = tuple(TensorSpec(name=name, dtype="fp32") for name in profiles[0])
    ranges = tuple(
        {n: ShapeRange(min=low, opt=high, max=high) for n, (low, high) in profile.items()} for profile in profiles
    )
    return artefact("plan", "base", sms=(89,)).model_copy(update={"inputs": specs, "profiles": ranges})


def test_calls_are_cut_to_the_largest_batch():
    plan = profiled({"sample": ((1, 8, 4), (4, 8, 4)), "timesteps": ((1,), (4,))})
    pieces = cut(plan, {"sample": (10, 8, 4), "timesteps": (10,)})
    assert [(p.start, p.stop, p.padded) for p in pieces] == [(0, 4, 4), (4, 8, 4), (8, 10, 2)]


def test_rows_are_padded_up_to_the_smallest_batch():
    plan = profiled({"sample": ((3, 8), (4, 8))})
    assert [(p.start, p.stop, p.padded) for p in cut(plan, {"sample": (5, 8)})] == [(0, 4, 4), (4, 5, 3)]


def test_the_profile_that_fits_is_taken():
    plan = profiled({"sample": ((1, 8), (2, 8))}, {"sample": ((1, 16), (2, 32))}, {"sample": ((1, 16), (8, 16))})
    chosen = {size: {p.profile for p in cut(plan, {"sample": (8, size)})} for size in (8, 16, 24)}
    assert chosen == {8: {0}, 16: {2}, 24: {1}}


class Alone(ArtefactBackend):
    """Of one artefact, which nothing runs."""

    def __init__(self, artefact):
        self._artefact = artefact

    def artefact(self, stage):
        assert stage == self._artefact.stage
        return self._artefact


def test_sizes_outside_of_every_profile_are_refused():
    plan = profiled({"sample": ((1, 8, 16), (2, 8, 32)), "timesteps": ((1,), (2,))})
    backend = Alone(plan)
    with pytest.raises(InvalidRequest, match=r"8x16\.\.32; asked for 8x40"):
        backend.check("base", (1, 8, 40))
    backend.check("base", (99, 8, 24))
    with pytest.raises(BundleError, match="takes sample, timesteps; the model gives sample"):
        cut(plan, {"sample": (1, 8, 16)})
