"""How long a network takes at sizes that were not measured, from what its kinds of operations took at one that was.

A kind of operation (spatial convolutions, norms, ...) is taken to keep its distance from its own bound: if it took 1.3
times max(flops / rate, bytes / bandwidth) at the measured size, it will at another. What it takes at the smallest size
that the network accepts, it takes at every one: that is Python and calls of libraries. So is all that belongs to no
kind. The rows are those of `bench model`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from pylumiere.bench.plan import ClipPlan, NetworkPlan, find_config, plan_network
from pylumiere.errors import InvalidRequest
from pylumiere.networks.families import AnyConfig

OTHER = "everything else"


@dataclass(frozen=True)
class Measured:
    """One network as it was measured on a machine.

    Attributes:
        seconds: of a thread, by kind, for one call.
        least: the same at the smallest size.
        plan: cost of that call.
        lanes: threads that computed it, each its own rows.
        rows: of the call.
        flops_per_second, bytes_per_second: the machine's best with all threads.
    """

    seconds: Mapping[str, float]
    least: Mapping[str, float]
    plan: NetworkPlan
    lanes: int
    rows: int
    flops_per_second: float
    bytes_per_second: float

    def predict(self, plan: NetworkPlan, rows: int) -> float:
        """Seconds of a call of that many rows with another cost, on as many threads."""
        total = 0.0
        for kind, took in self.seconds.items():
            fixed = min(took, self.least.get(kind, 0.0)) if kind in self.plan.work else took
            total += fixed * rows / self.rows
            if took > fixed:
                total += (took - fixed) * self._bound(plan, kind) / self._bound(self.plan, kind)
        return total / self.lanes

    def _bound(self, plan: NetworkPlan, kind: str) -> float:
        rates = self.flops_per_second / self.lanes, self.bytes_per_second / self.lanes
        return sum(cost.seconds(*rates) for cost in plan.work.get(kind, ()))


def measured_networks(rows: list[dict], model: str) -> dict[str, Measured]:
    """By stage, from the rows of `bench model`; of several runs the last.

    Raises:
        InvalidRequest: there are none of this model, or a row lacks what it should have.
    """
    config = find_config(model)
    found: dict[str, Measured] = {}
    try:
        kinds = [row for row in rows if row.get("bench") == "model" and row.get("model") == model and "kind" in row]
        for stage, network in config.networks.items():
            own = [row for row in kinds if row["stage"] == stage]
            own = [row for row in own if row["run"] == own[-1]["run"]]
            if own:
                found[stage] = _measured(network, own, config.text_tokens)
    except (KeyError, TypeError, ValueError) as error:
        raise InvalidRequest(f"a row of `bench model` is not as it should be: {error}") from None
    if not found:
        raise InvalidRequest(f"no row of `bench model` is about {model!r}")
    return found


def _measured(network: AnyConfig, rows: list[dict], text_tokens: int) -> Measured:
    first = rows[0]
    count, frames, height, width, _ = first["shape"]
    return Measured(
        {row["kind"]: float(row["lane_seconds"]) for row in rows},
        {row["kind"]: float(row["least_lane_seconds"]) for row in rows},
        plan_network(network, count, frames, height, width, text_tokens), first["lanes"], count,
        first["matmul_bf16_flops_per_s"], first["copy_bytes_per_s"],
    )  # fmt: skip


def predict_clip(networks: Mapping[str, Measured], clip: ClipPlan) -> dict[str, float]:
    """Seconds of a warm clip's networks, by stage; what stands between their calls is not in it."""
    return {
        stage.name: stage.calls * networks[stage.name].predict(stage.network, stage.rows)
        for stage in clip.stages
        if stage.name in networks
    }


def machine_of(rows: list[dict]) -> str:
    """For people: processor, threads and date of the last measured network."""
    row = [row for row in rows if row.get("bench") == "model" and "kind" in row][-1]
    return f"{row.get('cpu', 'CPU')}, {row.get('lanes')} threads, {str(row.get('date', ''))[:10]}"


def measured_clip(rows: list[dict], model: str, stages: Iterable[str]) -> dict[str, float] | None:
    """Seconds of these stages in the last row of `bench e2e` about the model at its own size, if there is one."""
    ours = [row for row in rows if row.get("bench") == "e2e" and row.get("provider") == "pylumiere"]
    own = [row for row in ours if row.get("case") == f"{model}, cold command to mp4"]
    parts = own[-1].get("parts", {}) if own else {}
    return {stage: parts[stage] for stage in stages if stage in parts} or None
