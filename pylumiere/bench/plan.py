"""`pylumiere bench plan`: arithmetic, memory traffic and memory of a model, and the time that these allow on a GPU.

The network is walked on the meta device, which knows shapes and holds no memory, so a plan for a model of any size
takes seconds. An operation costs its products and sums, and the fewest bytes that cross the memory bus: inputs and
weights read once, the result written once, as the fused kernels do it. On a GPU with a peak rate and a peak bandwidth
it takes at least max(flops / rate, bytes / bandwidth); the sum over all operations is a bound that no implementation of
this network, operation by operation, can beat. The rates are the vendors' data sheets': dense, bf16 (fp16 on Turing)
with fp32 accumulation, no sparsity.
"""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pylumiere.config import STUNetConfig
from pylumiere.errors import InvalidRequest
from pylumiere.kernels.cost import Cost
from pylumiere.networks.ops import PlainOps
from pylumiere.networks.stunet import STUNet
from pylumiere.networks.stunet.presets import model_preset
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
    """Adds up what each kind of operation costs."""

    def __init__(self, element_bytes: int):
        self.element_bytes = element_bytes
        self.work: dict[str, list[Cost]] = defaultdict(list)

    def _add(self, kind: str, flops: int, *tensors: Tensor | None) -> None:
        values = sum(t.numel() for t in tensors if t is not None)
        self.work[kind].append(Cost(flops, values * self.element_bytes))

    def activate(self, x, norm, scale, shift, silu, *, row_bias=None):
        if norm is not None:  # its statistics; the rest is done where the operation loads its input
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

    def linear(self, x, weight, bias, *, residual=None, **options):
        y = super().linear(x, weight, bias, **options)
        self._add("linear", 2 * y.numel() * x.shape[-1], x, weight, residual, y)
        return y

    def attention(self, q, k, v, num_heads, mask=None):
        self._add("attention in space and to text", 4 * q.numel() * k.shape[1], q, k, v, q)
        return torch.empty_like(q)

    def temporal_attention(self, qkv, num_heads):
        out = qkv.new_empty(*qkv.shape[:-1], qkv.shape[-1] // 3)
        self._add("temporal attention", 4 * out.numel() * qkv.shape[1], qkv, out)
        return out


@dataclass(frozen=True)
class NetworkPlan:
    """One call of one network: cost by kind of operation, parameters, peak bytes of activations."""

    work: dict[str, list[Cost]]
    parameters: int
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
    config: STUNetConfig, batch: int, frames: int, height: int, width: int, text_tokens: int = 77
) -> NetworkPlan:
    """What one call on [batch, frames, height, width, in_channels] costs in 16-bit numbers.

    Raises:
        ValueError: sizes that the network's levels cannot divide.
    """
    ops = CountingOps(element_bytes=2)
    with torch.device("meta"), torch.inference_mode():
        network = STUNet(config).to(torch.bfloat16).eval()
        network.ops = ops
        text = torch.empty(batch, text_tokens, config.text_dim) if config.text_dim else None
        level = torch.empty(batch) if config.noise_level else None
        network(torch.empty(batch, frames, height, width, config.in_channels), torch.empty(batch), text, None, level)
    parameters = sum(p.numel() for p in network.parameters())
    activations = activation_bytes(config, batch, frames, height, width, torch.bfloat16, text_tokens)
    return NetworkPlan(dict(ops.work), parameters, activations)


@dataclass(frozen=True)
class ClipPlan:
    """A whole clip: calls of each network, and what they add up to.

    Attributes:
        base, ssr: one call; of a guided base with both halves of the guidance. `ssr` is None where a model has none.
        base_calls, ssr_calls: of the whole clip.
        base_rows: of a call of the base: 2 with guidance.
    """

    base: NetworkPlan
    ssr: NetworkPlan | None
    base_calls: int
    ssr_calls: int
    base_rows: int = 1

    @property
    def flops(self) -> int:
        return self.base_calls * self.base.total.flops + (self.ssr_calls * self.ssr.total.flops if self.ssr else 0)

    @property
    def bytes_needed(self) -> int:
        """Weights of both networks in 16 bits, and the larger one's activations."""
        networks = [n for n in (self.base, self.ssr) if n is not None]
        return 2 * sum(n.parameters for n in networks) + max(n.activation_bytes for n in networks)

    def seconds(self, chip: Chip) -> dict[str, float]:
        parts = {"base": self.base_calls * self.base.seconds(chip)}
        if self.ssr is not None:
            parts["ssr"] = self.ssr_calls * self.ssr.seconds(chip)
        return parts


def plan_clip(
    model: str, *, frames: int | None = None, size: int | None = None, steps: int | None = None,
    ssr_steps: int | None = None, window: int | None = None, overlap: int | None = None,
) -> ClipPlan:  # fmt: skip
    """The plan of a preset model's clip.

    Args:
        model: "demo", "stunet-b" or "stunet-l".
        frames: of the clip; the model's own if None. More than the network makes at once are base windows' worth.
        size: height and width of the result.
        steps, ssr_steps: of the two stages.
        window, overlap: of the super-resolution.

    Raises:
        InvalidRequest: an unknown model, or values that it cannot take.
    """
    try:
        config = model_preset(model)
        base, ssr = config.base.network, config.ssr.network if config.ssr else None
        result = ssr or base
        frames, size = frames or base.num_frames, size or result.height
        scale = size / result.height
        height, width = round(base.height * scale), round(base.width * scale)
        guided = 2 if config.base.sampling.guidance_scale != 1 else 1
        one = plan_network(base, guided, frames, height, width, config.text_tokens)
        base_calls = steps or config.base.sampling.num_inference_steps
        if ssr is None:
            return ClipPlan(one, None, base_calls, 0, guided)
        window, overlap = window or config.window_frames, config.window_overlap if overlap is None else overlap
        if not 0 <= overlap < window:
            raise InvalidRequest(f"--overlap {overlap} should be in 0..{window - 1}")
        windows = max(1, math.ceil((frames - overlap) / (window - overlap)))
        two = plan_network(ssr, 1, window, size, size, config.text_tokens)
        return ClipPlan(one, two, base_calls, windows * (ssr_steps or config.ssr.sampling.num_inference_steps), guided)
    except ValueError as error:
        raise error if isinstance(error, InvalidRequest) else InvalidRequest(str(error)) from error


def doubling(model: str) -> dict[str, dict[str, float]]:
    """Ratios of FLOPs, by kind of operation, of one base call with twice the frames, height or width."""
    config = model_preset(model).base.network
    sizes = {"T": config.num_frames, "H": config.height, "W": config.width}
    reference = plan_network(config, 1, *sizes.values())
    table = {}
    for axis in sizes:
        larger = {**sizes, axis: 2 * sizes[axis]}
        grown = plan_network(
            replace(config, num_frames=larger["T"], height=larger["H"], width=larger["W"]), 1, *larger.values()
        )
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

    networks = {"base": (plan.base, plan.base_calls), "ssr": (plan.ssr, plan.ssr_calls)}
    work = Table(title=f"{model}: one clip, 16-bit numbers", title_justify="left")
    for heading in ("operation", "base TFLOP", "base GB", "ssr TFLOP", "ssr GB"):
        work.add_column(heading, justify="left" if heading == "operation" else "right")
    kinds = list(dict.fromkeys(kind for net, _ in networks.values() if net for kind in net.work))
    for kind in [*kinds, "all"]:
        cells = []
        for net, calls in networks.values():
            cost = Cost(0, 0)
            if net is not None:
                cost = net.total if kind == "all" else sum(net.work.get(kind, []), Cost(0, 0))
            cells += [f"{calls * cost.flops / 1e12:.1f}", f"{calls * cost.bytes / 1e9:.0f}"]
        work.add_row(kind, *cells)
    time = Table(title="Least time, at the data sheet's rates", title_justify="left")
    for heading in ("GPU", "base s", "ssr s", "clip s", "clips/h", "GB needed", "GB there"):
        time.add_column(heading, justify="left" if heading == "GPU" else "right")
    for chip, row in zip(chips, to_rows(plan, chips), strict=True):
        seconds = row["seconds_at_bound"]
        time.add_row(
            chip.name, f"{seconds['base']:.2f}", f"{seconds.get('ssr', 0):.2f}", f"{seconds['clip']:.2f}",
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
        double = Table(title="FLOPs of a base call with an axis doubled, times those before", title_justify="left")
        double.add_column("operation")
        for axis in growth:
            double.add_column(axis, justify="right")
        for kind in next(iter(growth.values())):
            double.add_row(kind, *(f"{growth[axis][kind]:.2f}" for axis in growth))
        tables.append(double)
    return tables
