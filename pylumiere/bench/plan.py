"""`pylumiere bench plan`: arithmetic, memory traffic and memory of a model, and the time that these allow on a GPU.

The network is walked on the meta device, which knows shapes and holds no memory, so a plan for a model of any size
takes seconds. An operation costs its products and sums, and the fewest bytes that cross the memory bus: inputs and
weights read once, the result written once, as the fused kernels do it. On a GPU with a peak rate and a peak bandwidth
it takes at least max(flops / rate, bytes / bandwidth); the sum over all operations is a bound that no implementation of
this network, operation by operation, can beat. The rates are the vendors' data sheets': dense, bf16 (fp16 on Turing)
with fp32 accumulation, no sparsity.

How often each network is called is the engine's own plan of the clip.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from pylumiere.checkpoints.native import SHIPPED
from pylumiere.config import ModelConfig, StageConfig
from pylumiere.diffusion.plan import DecoderPlan, StagePlan, plan_request
from pylumiere.errors import InvalidRequest
from pylumiere.kernels.cost import Cost
from pylumiere.loading import read_model_config
from pylumiere.networks.families import AnyConfig, build_network, computing_dtype, family_of
from pylumiere.networks.ops import PlainOps
from pylumiere.networks.stunet import presets as stunet
from pylumiere.networks.unet import presets as unet
from pylumiere.request import GenerationRequest
from pylumiere.scheduling.memory import activation_bytes


@dataclass(frozen=True)
class Chip:
    """Peak rates: FLOP/s of dense matrix products in 16 bits, bytes/s and bytes of its memory."""

    name: str
    flops: float
    bandwidth: float
    memory: float


def _chip(name: str, teraflops: float, gigabytes_per_second: float, gigabytes: float) -> Chip:
    return Chip(name, teraflops * 1e12, gigabytes_per_second * 1e9, gigabytes * 1e9)


# Data sheets of the usual (SXM where there is one) versions.
CHIPS = {
    chip.name: chip
    for chip in (
        _chip("t4", 65, 320, 16),
        _chip("a10", 125, 600, 24),
        _chip("a100", 312, 2039, 80),
        _chip("rtx3090", 71, 936, 24),
        _chip("l4", 121, 300, 24),
        _chip("l40s", 362, 864, 48),
        _chip("rtx4090", 165, 1008, 24),
        _chip("h100", 989, 3350, 80),
        _chip("h200", 989, 4800, 141),
        _chip("b200", 2250, 8000, 180),
        _chip("rtx5090", 209, 1792, 32),
    )
}


class CountingOps(PlainOps):
    """Adds up what each kind of operation costs. What stands before or after a product is done where it loads and
    stores: of a GroupNorm the statistics are left."""

    def __init__(self, element_bytes: int):
        self.element_bytes = element_bytes
        self.work: dict[str, list[Cost]] = defaultdict(list)

    def _add(self, kind: str, flops: int, *tensors: Tensor | None) -> None:
        values = sum(t.numel() for t in tensors if t is not None)
        self.work[kind].append(Cost(flops, values * self.element_bytes))

    def activate(self, x, norm, scale, shift, silu, *, row_bias=None):
        if norm is not None:
            self._add("norm and activation", 4 * x.numel(), x)
        return x

    def spatial_conv(self, x, weight, bias, *, residual=None, **options):
        y = super().spatial_conv(x, weight, bias, **options)
        self._add("spatial conv", 2 * y.numel() * weight[0].numel(), x, weight, residual, y)
        return y

    def temporal_conv(self, x, weight, bias, *, residual=None, **options):
        y = super().temporal_conv(x, weight, bias, **options)
        self._add("temporal conv", 2 * y.numel() * weight[0].numel(), x, weight, residual, y)
        return y

    def matmul(self, x, weight, bias, residual=None):
        y = super().matmul(x, weight, bias)
        self._add("linear", 2 * y.numel() * x.shape[-1], x, weight, residual, y)
        return y

    def layer_norm(self, x, weight, bias, eps=1e-5):
        self._add("norm and activation", 8 * x.numel(), x, weight, bias, x)
        return torch.empty_like(x)

    def geglu(self, x):
        out = x.new_empty(*x.shape[:-1], x.shape[-1] // 2)
        self._add("norm and activation", 14 * out.numel(), x, out)  # ten of them for the error function
        return out

    def attention(self, q, k, v, num_heads, mask=None):
        self._add("attention in space and to text", 4 * q.numel() * k.shape[1], q, k, v, q)
        return torch.empty_like(q)

    def temporal_attention(self, qkv, num_heads):
        out = qkv.new_empty(*qkv.shape[:-1], qkv.shape[-1] // 3)
        self._add("temporal attention", 4 * out.numel() * qkv.shape[1], qkv, out)
        return out


@dataclass(frozen=True)
class NetworkPlan:
    """One call of one network: cost by kind of operation, parameters, bytes of weights, peak bytes of activations."""

    work: dict[str, list[Cost]]
    parameters: int
    weight_bytes: int
    activation_bytes: int

    @property
    def total(self) -> Cost:
        return sum((cost for costs in self.work.values() for cost in costs), Cost(0, 0))

    def by_kind(self) -> dict[str, Cost]:
        return {kind: sum(costs, Cost(0, 0)) for kind, costs in self.work.items()}

    def seconds(self, chip: Chip) -> float:
        return sum(self.seconds_by_kind(chip).values())

    def seconds_by_kind(self, chip: Chip) -> dict[str, float]:
        return {
            kind: sum(cost.seconds(chip.flops, chip.bandwidth) for cost in costs) for kind, costs in self.work.items()
        }


def plan_network(
    config: AnyConfig, batch: int, frames: int, height: int, width: int, text_tokens: int = 77
) -> NetworkPlan:
    """What one call on [batch, frames, height, width, channels] costs in 16-bit numbers; of a decoder that is to be
    computed in float32, in those.

    Raises:
        ValueError: sizes that the network's levels cannot divide.
    """
    dtype = computing_dtype(config, torch.bfloat16)
    network, ops = build_network(config).to(dtype), CountingOps(dtype.itemsize)
    network.ops = ops
    operands = family_of(config).ports(config, text_tokens).operands({"B": batch, "T": frames, "H": height, "W": width})
    with torch.device("meta"), torch.inference_mode():
        network(**operands)
    parameters = sum(p.numel() for p in network.parameters())
    activations = activation_bytes(config, batch, frames, height, width, torch.bfloat16, text_tokens)
    return NetworkPlan(dict(ops.work), parameters, parameters * dtype.itemsize, activations)


@dataclass(frozen=True)
class StageCalls:
    """What one stage does for a whole clip.

    Attributes:
        name: of the stage; "decoder" for the decoder.
        calls: windows times steps; of a decoder, tiles of groups of frames.
        rows: of a call, which a CPU computes one by one: 2 with guidance, else 1; of a decoder, the frames of a group.
        network: one call of all its rows.
    """

    name: str
    calls: int
    rows: int
    network: NetworkPlan


@dataclass(frozen=True)
class ClipPlan:
    """A whole clip: the calls of its stages in their order, and what they add up to."""

    stages: tuple[StageCalls, ...]

    @property
    def flops(self) -> int:
        return sum(stage.calls * stage.network.total.flops for stage in self.stages)

    @property
    def bytes_needed(self) -> int:
        """Weights of all networks, and the activations of the one that has most."""
        networks = [stage.network for stage in self.stages]
        return sum(n.weight_bytes for n in networks) + max(n.activation_bytes for n in networks)

    def seconds(self, chip: Chip) -> dict[str, float]:
        """By stage."""
        return {stage.name: stage.calls * stage.network.seconds(chip) for stage in self.stages}


def find_config(model: str) -> ModelConfig:
    """The configuration of a model by the name of a preset, or of what `load_model` loads; weights are not read.

    Raises:
        InvalidRequest: neither; the names are listed.
        BundleError: a folder or bundle that cannot be read.
    """
    for presets in (stunet, unet):
        if model in presets.MODELS:
            return presets.model_preset(model)
    if model not in SHIPPED and not Path(model).exists():
        names = ", ".join((*stunet.MODELS, *unet.MODELS))
        raise InvalidRequest(f"--model {model!r} is no folder and not one of {names}")
    return read_model_config(model, check_hashes=False)


def plan_clip(
    model: str, *, frames: int | None = None, size: int | None = None, steps: int | None = None,
    ssr_steps: int | None = None, window: int | None = None, overlap: int | None = None,
) -> ClipPlan:  # fmt: skip
    """The plan of a clip.

    Args:
        model: see `find_config`.
        frames: of the clip; the model's own if None. More than a network makes at once are windows' worth.
        size: height and width of the result.
        steps, ssr_steps: of the first stage, and of those that follow it.
        window, overlap: of the stages after the first; of the first one if it is alone.

    Raises:
        InvalidRequest: an unknown model, or values that it cannot take.
    """
    config = find_config(model)
    if ssr_steps is not None:
        config = replace(config, stages=(config.first, *(_with_steps(s, ssr_steps) for s in config.stages[1:])))
    request = GenerationRequest(
        prompt="a clip", num_frames=frames, height=size, width=size, num_inference_steps=steps, window_frames=window,
        window_overlap=overlap,
    )  # fmt: skip
    return ClipPlan(tuple(_stage_calls(stage, config.text_tokens) for stage in plan_request(request, config).stages))


def _with_steps(stage: StageConfig, steps: int) -> StageConfig:
    try:
        return replace(stage, sampling=replace(stage.sampling, num_inference_steps=steps))
    except ValueError as error:
        raise InvalidRequest(f"stage {stage.name}: {error}") from error


def _stage_calls(stage: StagePlan | DecoderPlan, text_tokens: int) -> StageCalls:
    rows, frames, height, width = stage.call_sizes
    network = plan_network(stage.network, rows, frames, height, width, text_tokens)
    return StageCalls(stage.name, stage.num_calls, frames if isinstance(stage, DecoderPlan) else rows, network)


def doubling(model: str) -> dict[str, dict[str, float]]:
    """Ratios of FLOPs, by kind of operation, of one call of the first stage with twice the frames, height or width."""
    config = find_config(model).first.network
    sizes = {"T": config.num_frames, "H": config.height, "W": config.width}
    reference = plan_network(config, 1, *sizes.values())
    table = {}
    for axis in sizes:
        grown = plan_network(config, 1, *{**sizes, axis: 2 * sizes[axis]}.values())
        table[axis] = {
            kind: sum(c.flops for c in grown.work[kind]) / sum(c.flops for c in costs)
            for kind, costs in reference.work.items()
        }
        table[axis]["all"] = grown.total.flops / reference.total.flops
    return table


def find_chips(names: list[str]) -> list[Chip]:
    """Raises InvalidRequest for a name without a row; "all" is every row."""
    if not names or names == ["all"]:
        return list(CHIPS.values())
    unknown = [name for name in names if name not in CHIPS]
    if unknown:
        raise InvalidRequest(f"--sku {unknown[0]!r} has no rates; known are {', '.join(CHIPS)}, all")
    return [CHIPS[name] for name in names]


def to_rows(plan: ClipPlan, chips: list[Chip]) -> list[dict]:
    """One JSON-ready row a chip: seconds of each stage at the bound, clips an hour, memory needed and there."""
    rows = []
    for chip in chips:
        parts = plan.seconds(chip)
        seconds = sum(parts.values())
        rows.append(
            {
                "sku": chip.name, "seconds_at_bound": {**parts, "clip": seconds}, "clips_per_hour": 3600 / seconds,
                "bytes_needed": plan.bytes_needed, "fits": plan.bytes_needed <= chip.memory, "flops": plan.flops,
            }
        )  # fmt: skip
    return rows


def to_tables(
    model: str, plan: ClipPlan, chips: list[Chip], growth: dict[str, dict[str, float]] | None = None,
    predicted: dict | None = None,
):  # fmt: skip
    """For a terminal: the networks' cost by kind, one row a chip; `doubling`'s ratios, and what `predict` says of one
    machine (machine, predicted and measured seconds by stage), where given."""
    from rich.table import Table

    names = [stage.name for stage in plan.stages]
    wide = [stage.name for stage in plan.stages if stage.network.weight_bytes > 2 * stage.network.parameters]
    formats = ", ".join(["16-bit numbers", *(f"{name} in fp32" for name in wide)])
    work = Table(title=f"{model}: one clip, {formats}", title_justify="left")
    for heading in ("operation", *(f"{name} {unit}" for name in names for unit in ("TFLOP", "GB"))):
        work.add_column(heading, justify="left" if heading == "operation" else "right")
    costs = [(stage.calls, {**stage.network.by_kind(), "all": stage.network.total}) for stage in plan.stages]
    for kind in [*dict.fromkeys(kind for stage in plan.stages for kind in stage.network.work), "all"]:
        cells = []
        for calls, by_kind in costs:
            cost = by_kind.get(kind, Cost(0, 0))
            cells += [f"{calls * cost.flops / 1e12:.1f}", f"{calls * cost.bytes / 1e9:.0f}"]
        work.add_row(kind, *cells)
    time = Table(title="Least time, at the data sheet's rates", title_justify="left")
    for heading in ("GPU", *(f"{name} s" for name in names), "clip s", "clips/h", "GB needed", "GB there"):
        time.add_column(heading, justify="left" if heading == "GPU" else "right")
    for chip, row in zip(chips, to_rows(plan, chips), strict=True):
        seconds = row["seconds_at_bound"]
        time.add_row(
            chip.name, *(f"{seconds[name]:.2f}" for name in names), f"{seconds['clip']:.2f}",
            f"{row['clips_per_hour']:.0f}", f"{row['bytes_needed'] / 1e9:.1f}",
            f"{chip.memory / 1e9:.0f}" + ("" if row["fits"] else ", too little"),
        )  # fmt: skip
    tables = [work, time]
    if predicted is not None:
        table = Table(title=f"Predicted for {predicted['machine']}", title_justify="left")
        for heading in ("networks", "predicted s", "measured s", "error"):
            table.add_column(heading, justify="left" if heading == "networks" else "right")
        seconds, measured = predicted["predicted"], predicted["measured"] or {}
        for stage, value in [*seconds.items(), ("clip", sum(seconds.values()))]:
            real = measured.get(stage, sum(measured.values()) if len(measured) == len(seconds) else 0)
            told = (f"{real:.2f}", f"{100 * (value / real - 1):+.0f} %") if real else ("", "")
            table.add_row(stage, f"{value:.2f}", *told)
        tables.append(table)
    if growth is not None:
        title = f"FLOPs of a {names[0]} call with an axis doubled, times those before"
        double = Table(title=title, title_justify="left")
        double.add_column("operation")
        for axis in growth:
            double.add_column(axis, justify="right")
        for kind in next(iter(growth.values())):
            double.add_row(kind, *(f"{growth[axis][kind]:.2f}" for axis in growth))
        tables.append(double)
    return tables
