"""The networks as ONNX graphs, traced once from the one model and lowered to any precision.

The trace runs on tensors without data, with all weights as inputs and with float64 standing for "the precision that
the network computes in". So one trace serves float32, float16 and bfloat16: constants are known exactly, and what the
model computes in float32 whatever its precision (sinusoids) stays there. Lowering replaces float64, and weights become
initializers.

The portable graph takes its weights from the bundle's own safetensors file: ONNX external data has an offset and a
length, and safetensors holds plain little-endian tensors. Where the file is in another dtype, a Cast follows, which
runtimes fold when they load. The location is `../model/base.safetensors`; ONNX Runtime takes files outside the graph's
folder only as bytes (`SessionOptions.add_external_initializers_from_files_in_memory`), which is also how the loader
hands over bytes that were verified.
"""

from __future__ import annotations

import json
import struct
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pylumiere.export.spec import FORBIDDEN_OPS, OPSET, TOLERANCE, NetworkSpec
from torch import Tensor

from pylumiere.errors import BundleError
from pylumiere.networks.families import AnyConfig, build_network
from pylumiere.networks.ops import PlainOps

Forward = Callable[[Mapping[str, Tensor], Mapping[str, Tensor]], Tensor]

_TORCH_TYPES = {"fp32": torch.float32, "bool": torch.bool, "int64": torch.int64}
_STORED = {"F32": "FLOAT", "F16": "FLOAT16", "BF16": "BFLOAT16"}
_COMPUTED = {"fp32": "FLOAT", "fp16": "FLOAT16", "bf16": "BFLOAT16"}


# ---- what to trace -------------------------------------------------------------------------------------------------


class ExportOps(PlainOps):
    """The plain operators, with attention written out. A mask is added to the scores rather than chosen by: the same
    values, and TensorRT-RTX 1.7 fails on masks of booleans in a graph whose batch is not fixed."""

    def attention(self, q: Tensor, k: Tensor, v: Tensor, num_heads: int, mask: Tensor | None = None) -> Tensor:
        q, k, v = (t.unflatten(-1, (num_heads, -1)).transpose(1, 2) for t in (q, k, v))
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
        if mask is not None:
            scores = scores + ((mask.to(scores.dtype) - 1) * _MASKED)[:, None, None, :]
        return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)

    def upcast(self, x: Tensor) -> Tensor:
        return x.float()  # the placeholder precision stands for 16 bits, too


_MASKED = 3e4  # exp(-3e4) is 0 in every precision, and 3e4 is in the range of each


def network_forward(config: AnyConfig) -> tuple[Forward, dict[str, tuple[int, ...]]]:
    """A network as a function of its weights and its inputs, and the shapes of the weights. Holds no data."""
    network = build_network(config).to(torch.float64)
    network.ops = ExportOps()

    def forward(weights, inputs):
        return torch.func.functional_call(network, dict(weights), (), dict(inputs))

    return forward, {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}


def text_forward(
    text: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]
) -> tuple[Forward, dict[str, tuple[int, ...]]]:
    """A text encoder as a function of its weights and of token numbers, and the shapes of the weights; float32
    embeddings.

    Args:
        text: "kind", and for "clip" its "config" as JSON values.
        shapes: of the stored weights.
    """
    if text["kind"] == "clip":
        from pylumiere.networks.text.clip import ClipTextConfig, ClipTextModel

        with torch.device("meta"):
            model = ClipTextModel(ClipTextConfig.from_json(text["config"])).to(torch.float64).eval()

        def forward(weights, inputs):
            return torch.func.functional_call(model, dict(weights), (inputs["input_ids"],)).float()

    else:
        from pylumiere.networks.text import MiniLMEncoder

        def forward(weights, inputs):
            encoder = MiniLMEncoder.__new__(MiniLMEncoder)  # the forward pass alone: no files, no tokenizer
            encoder._weights = weights
            return encoder._forward(inputs["input_ids"], inputs["attention_mask"].bool()).float()

    return forward, dict(shapes)


# ---- trace ---------------------------------------------------------------------------------------------------------


def trace(forward: Forward, weight_shapes: Mapping[str, tuple[int, ...]], spec: NetworkSpec):
    """The graph of `forward`, in the placeholder precision, with the weights as inputs after the spec's own.

    Returns:
        an onnx_ir.Model. Weights are inputs by their own names.
    """
    import onnx_ir as ir
    import onnx_ir.passes.common as passes
    from onnxscript import optimizer

    example = {name: 2 * axis.multiple if axis.multiple > 1 else 4 for name, axis in spec.axes.items()}
    example["B"] = 2
    if "W" in example:
        example["W"] = 3 * spec.axes["W"].multiple
    dims = {name: _dimension(name, axis.multiple) for name, axis in spec.axes.items()}
    values = {p.name: torch.zeros(p.shape(example), dtype=_TORCH_TYPES[p.dtype], device="meta") for p in spec.inputs}
    dynamic = {p.name: {i: dims[axis] for i, axis in enumerate(p.axes) if isinstance(axis, str)} for p in spec.inputs}
    weights = {n: torch.empty(shape, dtype=torch.float64, device="meta") for n, shape in weight_shapes.items()}

    class Traced(torch.nn.Module):
        def forward(self, inputs, weights):
            return forward(weights, inputs)

    with torch.no_grad():
        exported = torch.export.export(
            Traced(), (values, weights), dynamic_shapes=(dynamic, dict.fromkeys(weights))
        )
        # The optimizer's pattern rules take longer than the trace and find nothing that the runtimes do not.
        program = torch.onnx.export(exported, dynamo=True, opset_version=OPSET, optimize=False, verbose=False)
    model = program.model
    names = [*(f"inputs_{name}" for name in values), *(f"weights_{name.replace('.', '_')}" for name in weights)]
    found = [value.name.lower() for value in model.graph.inputs]  # capitals are lost on the way
    if found != [name.lower() for name in names]:
        wrong = next((p for p in zip(found, names, strict=False) if p[0] != p[1].lower()), (len(found), len(names)))
        raise RuntimeError(f"the exporter's inputs are not those that were given: {wrong}")
    for value, name in zip(model.graph.inputs, [*values, *weights], strict=True):
        value.name = name
    for value, port in zip(model.graph.inputs, spec.inputs, strict=False):
        value.shape = ir.Shape(port.axes)
    (result,) = model.graph.outputs
    result.name, result.shape = spec.output.name, ir.Shape(spec.output.axes)
    if result.dtype != ir.DataType.FLOAT:
        raise RuntimeError(f"the traced output is {result.dtype}")
    optimizer.fold_constants(model)
    for cleaning in (passes.CommonSubexpressionEliminationPass(), passes.RemoveUnusedNodesPass(),
                     passes.RemoveUnusedOpsetsPass(), passes.RemoveUnusedFunctionsPass(),
                     passes.ClearMetadataAndDocStringPass()):  # fmt: skip
        cleaning(model)  # metadata holds stack traces: paths of this machine
    model.ir_version = 10
    model.graph.name, model.producer_name = spec.stage, "pylumiere"
    forbidden = sorted({node.op_type for node in model.graph} & set(FORBIDDEN_OPS))
    if forbidden:
        raise RuntimeError(f"the graph of {spec.stage} holds {', '.join(forbidden)}")
    return model


def _dimension(name: str, multiple: int):
    axis = torch.export.Dim(f"_{name}" if multiple > 1 else name, min=1, max=4096)
    return multiple * axis if multiple > 1 else axis


# ---- lower ---------------------------------------------------------------------------------------------------------


def lower(model, precision: str):
    """Replaces the placeholder precision by "fp32", "fp16" or "bf16", in place; returns the model."""
    import onnx_ir as ir

    target = ir.DataType[_COMPUTED[precision]]

    def convert(tensor):
        array = tensor.numpy().astype(target.numpy())
        return ir.Tensor(array, dtype=target, name=tensor.name)

    graph = model.graph
    for value in graph.initializers.values():
        if value.const_value.dtype == ir.DataType.DOUBLE:
            value.const_value = convert(value.const_value)
    for value in _values(graph):
        if value.dtype == ir.DataType.DOUBLE:
            value.dtype = target
    for node in list(graph):
        for name, attribute in list(node.attributes.items()):
            if attribute.type == ir.AttributeType.TENSOR and attribute.value.dtype == ir.DataType.DOUBLE:
                node.attributes[name] = ir.AttrTensor(name, convert(attribute.value))
            elif node.op_type == "Cast" and name == "to" and attribute.value == ir.DataType.DOUBLE:
                node.attributes[name] = ir.AttrInt64(name, int(target))
        if node.op_type == "CastLike" and node.inputs[1].dtype is not None:
            to, result = node.inputs[1].dtype, node.outputs[0]
            cast = ir.node("Cast", [node.inputs[0]], attributes={"to": int(to)})
            cast.outputs[0].name, cast.outputs[0].shape = f"{result.name}.cast", result.shape
            cast.outputs[0].dtype = to
            graph.insert_before(node, cast)
            result.replace_all_uses_with(cast.outputs[0])
            graph.remove(node, safe=True)
        elif node.op_type == "Cast" and node.inputs[0].dtype == node.outputs[0].dtype and node.outputs[0].dtype:
            source, result = node.inputs[0], node.outputs[0]
            if result in graph.outputs:
                continue
            result.replace_all_uses_with(source)
            graph.remove(node, safe=True)
    return model


def fix_axes(model, spec: NetworkSpec):
    """Fixes the axes in which all buckets agree, in place; the sizes of everything behind them are then known."""
    import onnx_ir as ir

    fixed = {name: spec.buckets[0][name] for name in spec.axes
             if name not in spec.free and len({bucket[name] for bucket in spec.buckets}) == 1}  # fmt: skip
    ports = {port.name: port for port in (*spec.inputs, spec.output)}
    for value in (*model.graph.inputs, *model.graph.outputs):
        if value.name in ports:
            value.shape = ir.Shape(ports[value.name].fixed(fixed).axes)
    return model


def _values(graph):
    yield from graph.inputs
    yield from graph.initializers.values()
    for node in graph:
        yield from node.outputs


def with_safetensors(model, spec: NetworkSpec, weights: Path, location: str, precision: str):
    """Turns weight inputs into initializers that lie in a safetensors file, in place.

    Args:
        weights: the file, for its header.
        location: how the graph names it.
        precision: that the graph computes in.

    Raises:
        BundleError: a weight that the file does not hold in the graph's shape.
    """
    import onnx_ir as ir

    target = ir.DataType[_COMPUTED[precision]]
    header, start = read_safetensors_header(weights)

    def initializer(name: str, shape: tuple[int, ...]):
        entry = header.get(name)
        if entry is None or tuple(entry["shape"]) != shape or entry["dtype"] not in _STORED:
            raise BundleError(f"{weights}: {name} is not there as {list(shape)}")
        begin, end = entry["data_offsets"]
        dtype = ir.DataType[_STORED[entry["dtype"]]]
        return ir.ExternalTensor(
            location, start + begin, end - begin, dtype, shape=ir.Shape(shape), name=name, base_dir=weights.parent
        )

    _replace_weights(model, spec, initializer, target)
    return model


def with_values(model, spec: NetworkSpec, weights: Mapping[str, Tensor], precision: str):
    """Turns weight inputs into initializers with these values in the graph's precision, in place."""
    import onnx_ir as ir

    target = ir.DataType[_COMPUTED[precision]]
    dtype = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[precision]

    def initializer(name: str, shape: tuple[int, ...]):
        value = weights[name].to(dtype).contiguous()
        if not torch.isfinite(value).all():
            raise BundleError(f"{name} does not fit {precision}: it holds values beyond its range")
        raw = value.view(torch.int16).numpy().view(target.numpy()) if precision != "fp32" else value.numpy()
        return ir.Tensor(raw, dtype=target, shape=ir.Shape(shape), name=name)

    _replace_weights(model, spec, initializer, target)
    return model


def _replace_weights(model, spec: NetworkSpec, initializer: Callable, target) -> None:
    import onnx_ir as ir

    graph = model.graph
    names = {port.name for port in spec.inputs}
    taken = [value for value in graph.inputs if value.name not in names]
    casts = []
    for value in taken:
        graph.inputs.remove(value)
        if not value.uses():
            continue
        tensor = initializer(value.name, tuple(int(size) for size in value.shape))
        stored = ir.Value(name=value.name, type=ir.TensorType(tensor.dtype), shape=tensor.shape, const_value=tensor)
        if tensor.dtype == target:
            value.replace_all_uses_with(stored)
        else:
            cast = ir.node("Cast", [stored], attributes={"to": int(target)})
            cast.outputs[0].name = f"{value.name}.cast"
            cast.outputs[0].dtype, cast.outputs[0].shape = target, tensor.shape
            value.replace_all_uses_with(cast.outputs[0])
            casts.append(cast)
        graph.register_initializer(stored)
    if casts:
        graph.insert_before(next(iter(graph)), casts)


def read_safetensors_header(path: Path) -> tuple[dict[str, Any], int]:
    """Entries by name, and where the tensors' bytes start in the file. For files that were read and checked before."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    return header, 8 + length


def save(model, path: Path) -> dict[str, int]:
    """Writes a graph; tensors that are not external go into the file. Returns its operators with their counts."""
    import onnx_ir as ir

    ir.save(model, path)
    return dict(Counter(node.op_type for node in model.graph).most_common())


def save_with_data(model, path: Path) -> None:
    """Writes a graph with all larger tensors in one file beside it, `NAME.data`."""
    import onnx_ir as ir

    ir.save(model, path, external_data=f"{path.name}.data", size_threshold_bytes=1024)


def load_trace(path: Path):
    import onnx_ir as ir

    return ir.load(path)


# ---- compare -------------------------------------------------------------------------------------------------------


def example_inputs(spec: NetworkSpec, sizes: dict[str, int], seed: int = 0) -> dict[str, np.ndarray]:
    """Inputs as a request has them: noise, steps over the whole schedule, prompts of various lengths."""
    rng = np.random.default_rng(seed)
    found = {}
    for port in spec.inputs:
        shape = port.shape(sizes)
        if port.name in ("text_mask", "attention_mask"):
            lengths = rng.integers(1, shape[1] + 1, shape[0])
            mask = np.arange(shape[1])[None] < lengths[:, None]
            found[port.name] = mask if port.dtype == "bool" else mask.astype(np.int64)
        elif port.name == "input_ids":
            found[port.name] = rng.integers(0, spec.vocabulary, shape)
        elif port.name == "timesteps":
            found[port.name] = rng.uniform(0, 999, shape).astype(np.float32)
        elif port.name == "noise_level":
            found[port.name] = rng.uniform(0, 1, shape).astype(np.float32)
        else:
            found[port.name] = rng.standard_normal(shape, np.float32)
    return found


def open_session(graph: Path, files: Mapping[str, Path] | None = None, threads: int = 0):
    """An ONNX Runtime session on the CPU; `files` are external data by the location that the graph gives them."""
    import mmap

    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    options.enable_cpu_mem_arena = False  # a check runs a few sizes once: memory is worth more than speed
    if not files:
        return onnxruntime.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])
    maps = []
    for path in files.values():
        with path.open("rb") as file:
            maps.append(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    arrays = [np.frombuffer(data, np.uint8) for data in maps]
    options.add_external_initializers_from_files_in_memory(list(files), arrays, [len(a) for a in arrays])
    return onnxruntime.InferenceSession(graph.read_bytes(), options, providers=["CPUExecutionProvider"])


def compare(
    session, eager: Callable[[dict[str, Tensor]], Tensor], spec: NetworkSpec, sizes: dict[str, int], tolerance: float
) -> dict[str, Any]:
    """Runs both on the same inputs and compares every value.

    Returns:
        {"shapes", "max_abs", "rel_rms", "values"}, see bundle.Comparison.

    Raises:
        BundleError: other shapes, nothing to compare, a value that is not finite, or a larger error than `tolerance`.
    """
    feed = example_inputs(spec, sizes)
    names = [port.name for port in session.get_inputs()]
    if names != [port.name for port in spec.inputs]:
        raise BundleError(f"the graph of {spec.stage} takes {', '.join(names)}")
    (found,) = session.run([spec.output.name], feed)
    with torch.inference_mode():
        expected = eager({name: torch.from_numpy(value) for name, value in feed.items()}).numpy()
    where = f"the graph of {spec.stage} at {', '.join(f'{n}={s}' for n, s in sizes.items())}"
    if found.shape != expected.shape or found.shape != spec.output.shape(sizes) or found.size == 0:
        raise BundleError(f"{where}: its output has shape {found.shape}, the model's {expected.shape}")
    if not (np.isfinite(found).all() and np.isfinite(expected).all()):
        raise BundleError(f"{where}: its output or the model's is not finite")
    difference = found.astype(np.float64) - expected
    scale = float(np.sqrt(np.mean(np.square(expected, dtype=np.float64))))
    if scale == 0:
        raise BundleError(f"{where}: the model gives zeros everywhere, which compares nothing")
    error = float(np.sqrt(np.mean(np.square(difference)))) / scale
    if not error <= tolerance:
        raise BundleError(f"{where}: relative RMS error {error:.2g} is more than {tolerance:g}")
    return {
        "shapes": {name: list(value.shape) for name, value in feed.items()},
        "max_abs": float(np.abs(difference).max()),
        "rel_rms": error,
        "values": int(found.size),
    }


__all__ = ["TOLERANCE", "compare", "lower", "network_forward", "open_session", "save", "text_forward", "trace"]
