"""What the exported networks take and give: their families' ports, the ranges of the axes, and tolerances.

The ONNX exporter, the plan builder, the checks and the manifest all read it. Inputs and outputs are float32 in every
precision; a graph converts them at its ends.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from pylumiere.checkpoints.bundle import ShapeRange, TensorSpec
from pylumiere.config import DECODER, ModelConfig, StageConfig
from pylumiere.diffusion.plan import size_step
from pylumiere.diffusion.windows import WindowPlan
from pylumiere.errors import InvalidRequest
from pylumiere.networks.families import AnyConfig, Port, family_of

OPSET = 18

# Most relative RMS error of an exported graph against the eager model in float32. The demo's networks show 1e-6 in
# fp32 and 5e-4 in fp16; there is room for deeper ones. A layer that is wrong shows far more.
TOLERANCE = {"fp32": 2e-5, "fp16": 2e-2, "bf16": 8e-2}

# Operators that a graph must not hold: TensorRT is wrong or slow on them.
FORBIDDEN_OPS = ("GroupNormalization",)

MAX_BATCH = 64


@dataclass(frozen=True)
class Axis:
    """A dynamic axis: sizes from `min` to `max` in steps of `multiple`."""

    name: str
    min: int
    opt: int
    max: int
    multiple: int = 1

    def odd(self, fraction: float) -> int:
        """An odd multiple near this fraction of the largest size, within the range."""
        low, high = self.min // self.multiple, self.max // self.multiple
        return min(max(int(high * fraction) | 1, low), high) * self.multiple


def tensor_spec(port: Port) -> TensorSpec:
    """A port as the manifest has it."""
    return TensorSpec(name=port.name, dtype=port.dtype)


@dataclass(frozen=True)
class NetworkSpec:
    """The interface of one network.

    Attributes:
        stage: its name, "decoder" or "text".
        inputs, output: in the order of the graph.
        axes: ranges of the dynamic axes, by name.
        buckets: sizes of all axes for which plans get a profile of their own; the batch is the largest of each.
        free: axes along which a bucket's calls may be shorter; all others are fixed in its profile.
        vocabulary: how many tokens a text encoder knows; 0 for the others.
    """

    stage: str
    inputs: tuple[Port, ...]
    output: Port
    axes: dict[str, Axis]
    buckets: tuple[dict[str, int], ...]
    free: tuple[str, ...] = ("B",)
    vocabulary: int = 0

    def check_sizes(self) -> Iterator[tuple[str, dict[str, int]]]:
        """Sizes at which a graph is compared with the eager model: smallest, odd, largest."""
        odd = {name: axis.odd(0.4 if name == "W" else 0.6) for name, axis in self.axes.items()}
        yield "smallest", {name: axis.min for name, axis in self.axes.items()}
        yield "odd", odd
        yield "largest", {name: axis.max for name, axis in self.axes.items()}

    def ranges(self) -> dict[str, ShapeRange]:
        """What the dynamic graph takes: one profile over the whole range."""
        low, best, high = ({n: getattr(axis, f) for n, axis in self.axes.items()} for f in ("min", "opt", "max"))
        return {p.name: ShapeRange(min=p.shape(low), opt=p.shape(best), max=p.shape(high)) for p in self.inputs}

    def profiles(self) -> tuple[dict[str, ShapeRange], ...]:
        """One per bucket: everything fixed but the free axes, so that kernels are chosen for these very sizes."""
        found = []
        for bucket in self.buckets:
            low = {**bucket, **{name: self.axes[name].min for name in self.free}}
            found.append(
                {p.name: ShapeRange(min=p.shape(low), opt=p.shape(bucket), max=p.shape(bucket)) for p in self.inputs}
            )
        return tuple(found)

    def to_json(self) -> dict:
        """Plain values, for keys of the cache and for other processes."""
        ports = [[port.name, port.dtype, list(port.axes)] for port in (*self.inputs, self.output)]
        axes = [[a.name, a.min, a.opt, a.max, a.multiple] for a in self.axes.values()]
        return {"stage": self.stage, "ports": ports, "axes": axes, "buckets": list(self.buckets),
                "free": list(self.free), "vocabulary": self.vocabulary}  # fmt: skip

    @classmethod
    def from_json(cls, data: dict) -> NetworkSpec:
        *inputs, output = [Port(name, dtype, tuple(axes)) for name, dtype, axes in data["ports"]]
        axes = {row[0]: Axis(*row) for row in data["axes"]}
        buckets, free = tuple(data["buckets"]), tuple(data["free"])
        return cls(data["stage"], tuple(inputs), output, axes, buckets, free, data["vocabulary"])


def network_specs(
    config: ModelConfig,
    *,
    batch: int = 2,
    frames: tuple[int, ...] = (),
    sizes: tuple[tuple[int, int], ...] = (),
) -> dict[str, NetworkSpec]:
    """The interfaces of a model's networks, by stage.

    Args:
        batch: largest batch; 2 is one clip with guidance.
        frames: numbers of frames of the first network; () for the model's own.
        sizes: (height, width) of the finished clip; () for the model's own.

    Raises:
        InvalidRequest: sizes that the networks cannot have; the option and what is allowed are named.
    """
    if not 1 <= batch <= MAX_BATCH:
        raise InvalidRequest(f"--batch {batch} is not in 1..{MAX_BATCH}")
    for count in frames:
        _check_multiple("--frames", count, config.first.network.temporal_factor, 4096)
    frames = frames or _call_frames(config.first)
    if len(set(frames)) > 1 and min(frames) < config.first.network.min_frames:
        raise InvalidRequest(
            f"--frames {min(frames)} cannot stand beside {max(frames)}: of one frame this network is another one; "
            "export that into a bundle of its own"
        )
    sizes = sizes or (config.size,)
    for height, width in sizes:
        for name, value in (("height", height), ("width", width)):
            _check_multiple(f"--size ({name})", value, size_step(config), 16384)
    specs = {}
    for index, (stage, scale) in enumerate(zip(config.stages, config.scales, strict=True)):
        lengths = frames if index == 0 else _call_frames(stage)
        small = _scaled(sizes, scale)
        specs[stage.name] = _network_spec(stage.name, stage.network, config.text_tokens, batch, lengths, small)
    if config.decoder is not None:
        # Its calls are groups of one clip's frames, of which the last may be short, and of large frames their tiles.
        decoder = config.decoder
        small = _scaled(sizes, config.decoder_scale)
        tiles = tuple(dict.fromkeys((min(height, decoder.tile), min(width, decoder.tile)) for height, width in small))
        spec = _network_spec(DECODER, decoder.network, config.text_tokens, 1, (decoder.group_frames,), tiles)
        specs[DECODER] = replace(spec, free=("T",))
    return specs


def text_spec(text_tokens: int, width: int, vocabulary: int, *, is_masked: bool) -> NetworkSpec:
    """The text encoder: one prompt or a few, always the same length.

    Args:
        is_masked: it is told which tokens are the prompt's; else it attends to all.
    """
    inputs = [Port("input_ids", "int64", ("B", text_tokens))]
    if is_masked:
        inputs.append(Port("attention_mask", "int64", ("B", text_tokens)))
    output = Port("embeddings", "fp32", ("B", text_tokens, width))
    return NetworkSpec("text", tuple(inputs), output, {"B": Axis("B", 1, 1, 8)}, ({"B": 1},), vocabulary=vocabulary)


def _call_frames(stage: StageConfig) -> tuple[int]:
    """The length of a stage's calls where the user names none."""
    windows, network = stage.windows, stage.network
    if windows is None:
        return (network.num_frames,)
    return (WindowPlan(None, windows.frames, 0, halo=windows.halo, multiple=network.temporal_factor).call_frames,)


def _scaled(sizes: tuple[tuple[int, int], ...], scale: int) -> tuple[tuple[int, int], ...]:
    return tuple((height // scale, width // scale) for height, width in sizes)


def _network_spec(
    stage: str, network: AnyConfig, text_tokens: int, batch: int, frames: tuple[int, ...], sizes: tuple
) -> NetworkSpec:
    ports = family_of(network).ports(network, text_tokens)
    inputs, output = ports.inputs, ports.output
    buckets = tuple(
        {"B": batch, "T": count, "H": height, "W": width} for count in sorted(set(frames)) for height, width in sizes
    )
    first, factor = buckets[0], network.spatial_factor
    axes = {
        "B": Axis("B", 1, 1, batch),
        "T": Axis("T", network.min_frames, first["T"], max(b["T"] for b in buckets), network.temporal_factor),
        "H": Axis("H", factor, first["H"], max(b["H"] for b in buckets), factor),
        "W": Axis("W", factor, first["W"], max(b["W"] for b in buckets), factor),
    }
    if axes["T"].max < axes["T"].min:  # one frame, as a network of its own: the axis is fixed
        count = {"T": axes.pop("T").max}
        inputs, output = tuple(port.fixed(count) for port in inputs), output.fixed(count)
    return NetworkSpec(stage, inputs, output, axes, buckets)


def _check_multiple(option: str, value: int, unit: int, limit: int) -> None:
    if value < unit or value % unit or value > limit:
        raise InvalidRequest(f"{option} {value} is not a multiple of {unit} in {unit}..{limit - limit % unit}")
