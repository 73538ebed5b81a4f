"""`pylumiere bench model`: the networks of a model as an engine runs them, beside what else could run them.

Every provider computes the same two rows: one clip with guidance, or two windows, or two frames of a decoder. Each is
checked against the same network in float64 before the clock starts, and all take turns. What each kind of operation
takes, against the rates that this machine reaches at its best, is measured in the engine's own arrangement: one row a
thread, all threads busy.
"""

from __future__ import annotations

import datetime
import functools
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from pylumiere.backends.choice import choose
from pylumiere.backends.cpu_ops import CpuOps
from pylumiere.backends.torch import TorchBackend
from pylumiere.bench import against as comparison
from pylumiere.bench import check_names
from pylumiere.bench.compare import rel_rms
from pylumiere.bench.facts import append_row, source_hash
from pylumiere.bench.harness import Timing, measure, measure_device
from pylumiere.bench.plan import NetworkPlan, plan_network
from pylumiere.bench.predict import OTHER, Measured
from pylumiere.bench.rivals import FAMILIES, Missing, Operands, Wrapped, make_rivals, side_by_side
from pylumiere.checkpoints.native import Checkpoint
from pylumiere.config import DECODER, ModelConfig
from pylumiere.loading import load_model, read_model_config
from pylumiere.networks.families import AnyConfig, build_network

ROWS = 2
ALLOWED = {"fp32": 1e-4, "bf16": 0.02}  # relative RMS error; bf16 rounds a hundred times on the way
SOURCES = ("pylumiere/networks", "pylumiere/backends/torch.py", "pylumiere/backends/cpu_ops.py", "runtime")


@dataclass(frozen=True)
class Site:
    """One network at the sizes of its calls.

    Attributes:
        stage: its name; "decoder" for the decoder.
        operands: of ROWS samples.
    """

    stage: str
    checkpoint: Checkpoint
    operands: Operands

    @property
    def name(self) -> str:
        return f"{self.stage} " + "x".join(str(size) for size in self.operands[0].shape)

    @property
    def network(self) -> AnyConfig:
        return self.checkpoint.config.networks[self.stage]

    @property
    def weights(self) -> Mapping[str, Tensor]:
        return self.checkpoint.weights[self.stage]

    @functools.cached_property
    def expected(self) -> Tensor:
        """The network's result in float64."""
        exact = build_network(self.network, {name: weight.double() for name, weight in self.weights.items()})
        with torch.inference_mode():
            return exact(*(t.double() if t is not None and t.is_floating_point() else t for t in self.operands))

    @property
    def plan(self) -> NetworkPlan:
        """What a call costs."""
        rows, frames, height, width, _ = self.operands[0].shape
        return plan_network(self.network, rows, frames, height, width, self.checkpoint.config.text_tokens)


def make_operands(config: ModelConfig, stage: str, *, rows: int = ROWS, frames: int | None = None,
                  size: tuple[int, int] | None = None) -> Operands:  # fmt: skip
    """What a call of the stage gets: noise, times over the schedule, text of some length, a noise level; or latents."""
    generator = torch.Generator().manual_seed(5)
    if stage == DECODER:
        height, width = size or (config.last.network.height, config.last.network.width)
        network = config.decoder.network
        frames = frames or network.min_frames
        return (torch.randn(rows, frames, height, width, network.latent_channels, generator=generator),)
    network, windows = config.stage(stage).network, config.stage(stage).windows
    frames = frames or (network.num_frames if windows is None else windows.frames)
    height, width = size or (network.height, network.width)
    sample = torch.randn(rows, frames, height, width, network.in_channels, generator=generator)
    times = torch.tensor([500.0]) if rows == 1 else torch.linspace(900.0, 100.0, rows)
    text = mask = level = None
    if network.text_dim:
        text = torch.randn(rows, config.text_tokens, network.text_dim, generator=generator)
        if network.masks_text:
            lengths = torch.tensor([9 if row % 2 == 0 else 2 for row in range(rows)])
            mask = torch.arange(config.text_tokens)[None] < lengths[:, None]
    if network.noise_level:
        level = torch.full((rows,), 0.1)
    return sample, times, text, mask, level


def make_site(checkpoint: Checkpoint, stage: str, **sizes) -> Site:
    """The stage at its own sizes, or at others; see `make_operands`."""
    return Site(stage, checkpoint, make_operands(checkpoint.config, stage, **sizes))


def run(
    model: str = "demo",
    *,
    stages: Iterable[str] = (),
    vs: Iterable[str] | None = None,
    precisions: Iterable[str] = (),
    max_autotune: bool = False,
    smoke: bool = False,
    repeats: int | None = None,
    path: Path | None = None,
    against: Path | None = None,
) -> int:
    """Checks and times the networks on this machine's CPU; 0 if all results were right, else 1.

    Args:
        model: see `pylumiere.loading.load_model`.
        stages: names of the model's stages; none means all.
        vs: rivals, of `rivals.FAMILIES`; None means all that are installed but torch.compile, which takes minutes.
        precisions: of the rivals, "fp32" and "bf16"; none means both.
        max_autotune: torch.compile also with this mode, which takes longer.
        smoke: check only.
        repeats: of each provider.
        path: append rows here.
        against: rows of an earlier run; 1 is returned too where we have become slower beside eager PyTorch.

    Raises:
        InvalidRequest: an unknown rival, stage or precision.
        BundleError: the model cannot be read.
    """
    families = tuple(name for name in FAMILIES if name != "compile") if vs is None else tuple(vs)
    stages, precisions = tuple(stages), tuple(precisions) or tuple(ALLOWED)
    check_names("--vs", families, FAMILIES)
    check_names("--precision", precisions, ALLOWED)
    earlier = comparison.read(against) if against else None
    known = tuple(read_model_config(model, check_hashes=False).networks)
    check_names("--stage", stages, known)
    found, _ = load_model(model, "torch", "cpu", "fp32")
    checkpoint = found if isinstance(found, Checkpoint) else found.checkpoint()
    threads = torch.get_num_threads()
    bounds = {} if smoke else measure_device("cpu")
    for name, rate in bounds.items():
        print(f"{name} {rate / 1e9:.4g}e9, on {threads} threads", flush=True)
    rows, wrong = [], 0
    for stage in stages or known:
        site = make_site(checkpoint, stage)
        found, bad = _time(site, families, precisions, max_autotune, threads, smoke, repeats, bounds)
        rows, wrong = rows + found, wrong + bad
        if not smoke:
            kinds, measured = _layers(site, threads, bounds)
            rows += kinds + _scaling(site, threads) + _predictions(site, measured, threads)
    source = source_hash(SOURCES)
    rows = [{"bench": "model", "model": checkpoint.config.name, **row, "source": source} for row in rows]
    if path is not None:
        for row in rows:
            append_row(path, row)
    slower = comparison.report(rows, earlier) if earlier is not None else 0
    return 1 if wrong or slower else 0


# ---- providers -----------------------------------------------------------------------------------------------------


def engine_call(site: Site, precision: str, threads: int, ops: Callable[[], CpuOps] | None = None):
    """Our network as an engine calls it: a row a lane. `ops` replaces its operations."""
    backend = TorchBackend(site.checkpoint, choose("torch", "cpu", precision))
    if ops is not None:
        backend._networks[site.stage].ops = ops()
    call = backend.decode if site.stage == DECODER else functools.partial(backend.predict, site.stage)
    call = functools.partial(call, num_threads=max(1, threads // ROWS))
    given = tuple(operand for operand in site.operands if operand is not None)
    return side_by_side(Wrapped(call, site.operands), given, threads)


def _time(site, families, precisions, max_autotune, threads, smoke, repeats, bounds) -> tuple[list[dict], int]:
    calls: dict[str, Callable[[], Tensor]] = {}
    facts: dict[str, dict] = {}
    wrong = 0

    def add(name: str, family: str, precision: str, call: Callable[[], Tensor], prepared: float) -> None:
        nonlocal wrong
        error = rel_rms(call(), site.expected)
        right = error <= ALLOWED[precision]
        facts[name] = {"family": family, "precision": precision, "error": error, "correct": right, "prepared": prepared}
        if right:
            calls[name] = call
        else:
            wrong += family == "pylumiere"
        told = "correct" if right else "WRONG, not timed"
        print(f"{site.name} {name}: {told}, relative RMS error {error:.1e}, made in {prepared:.1f} s", flush=True)

    for precision in ALLOWED:
        begun = time.perf_counter()
        call = engine_call(site, precision, threads)
        add(f"pylumiere {precision}", "pylumiere", precision, call, time.perf_counter() - begun)
    for rival in make_rivals(site.network, site.weights, site.operands, families, threads=threads,
                             precisions=precisions, max_autotune=max_autotune):  # fmt: skip
        if isinstance(rival, Missing):
            print(f"{site.name} {rival.name}: left out, {rival.reason}", flush=True)
        else:
            add(rival.name, rival.family, rival.precision, rival.run, rival.prepared)
    case = {"case": site.name, "device": "cpu", "call_threads": threads}
    if smoke:
        return [{**case, "provider": name, **fact, "smoke": True} for name, fact in facts.items()], wrong
    cost = site.plan.total
    timings = measure(calls, "cpu", repeats)
    rows = [
        {**case, "provider": name, **facts[name], **_timing(timings[name]), "flops": cost.flops, **bounds}
        for name in calls
    ]
    _print_times(site.name, rows, bounds)
    return rows, wrong


def _timing(timing: Timing) -> dict[str, float]:
    return {"seconds": timing.median, "spread": timing.spread, "best": timing.best}


def _print_times(name: str, rows: list[dict], bounds: dict[str, float]) -> None:
    fastest = min(row["seconds"] for row in rows if row["family"] == "pylumiere")
    for row in sorted(rows, key=lambda row: row["seconds"]):
        rate = row["flops"] / row["seconds"]
        share = 100 * rate / bounds[f"matmul_{row['precision']}_flops_per_s"]
        print(
            f"{name} {row['provider']:28} {1e3 * row['seconds']:8.1f} ms +- {1e3 * row['spread']:.1f} | "
            f"{rate / 1e12:6.3f} TFLOP/s, {share:4.1f} % of matmul | {row['seconds'] / fastest:5.2f} x ours",
            flush=True,
        )


# ---- kinds of operations -------------------------------------------------------------------------------------------


class TimedOps(CpuOps):
    """CpuOps that adds up its seconds by kind, per thread; the kinds are those of `plan.CountingOps`."""

    def __init__(self):
        super().__init__()
        self._untimed = CpuOps()
        self._local = threading.local()
        self.seconds: dict[str, float] = defaultdict(float)
        self._lock = threading.Lock()

    def _timed(self, kind: str, function: Callable[[], Tensor]) -> Tensor:
        inner, self._local.inner = getattr(self._local, "inner", 0.0), 0.0
        begun = time.perf_counter()
        result = function()
        took = time.perf_counter() - begun
        with self._lock:
            self.seconds[kind] += took - self._local.inner
        self._local.inner = inner + took
        return result

    def activate(self, *given, **options):
        return self._timed("norm and activation", lambda: super(TimedOps, self).activate(*given, **options))

    def spatial_conv(self, *given, **options):
        return self._timed("spatial conv", lambda: super(TimedOps, self).spatial_conv(*given, **options))

    def temporal_conv(self, *given, **options):
        return self._timed("temporal conv", lambda: super(TimedOps, self).temporal_conv(*given, **options))

    def matmul(self, *given, **options):
        return self._timed("linear", lambda: super(TimedOps, self).matmul(*given, **options))

    def layer_norm(self, *given, **options):
        return self._timed("norm and activation", lambda: super(TimedOps, self).layer_norm(*given, **options))

    def geglu(self, *given, **options):
        return self._timed("norm and activation", lambda: super(TimedOps, self).geglu(*given, **options))

    def attention(self, *given, **options):
        kind = "attention in space and to text"
        return self._timed(kind, lambda: super(TimedOps, self).attention(*given, **options))

    def temporal_attention(self, *given, **options):
        # Its inner call of `attention` is part of it.
        return self._timed("temporal attention", lambda: self._untimed.temporal_attention(*given, **options))


def kind_seconds(site: Site, threads: int, rounds: int = 7) -> tuple[dict[str, float], float]:
    """Seconds of a thread that each kind of operation takes in one call of all rows, and the seconds of the call."""
    ops: list[TimedOps] = []
    call = engine_call(site, "bf16", threads, lambda: ops.append(TimedOps()) or ops[0])
    call()
    found, totals = [], []
    for _ in range(rounds):
        ops[0].seconds.clear()
        begun = time.perf_counter()
        call()
        totals.append(time.perf_counter() - begun)
        found.append(dict(ops[0].seconds))
    order = sorted(range(rounds), key=totals.__getitem__)
    middle = order[rounds // 2]
    seconds = found[middle]
    lanes = min(threads, ROWS)
    seconds[OTHER] = max(0.0, lanes * totals[middle] - sum(seconds.values()))
    return seconds, totals[middle]


def _layers(site: Site, threads: int, bounds: dict[str, float]) -> tuple[list[dict], Measured]:
    seconds, total = kind_seconds(site, threads)
    smallest = (site.network.spatial_factor,) * 2
    least_site = make_site(site.checkpoint, site.stage, frames=site.network.min_frames, size=smallest)
    least, _ = kind_seconds(least_site, threads)
    plan, lanes = site.plan, min(threads, ROWS)
    run = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    work, rows = plan.by_kind(), []
    for kind, took in sorted(seconds.items(), key=lambda item: -item[1]):
        cost = work.get(kind, plan.total)
        row = {
            "case": site.name, "stage": site.stage, "shape": list(site.operands[0].shape), "kind": kind, "run": run,
            "provider": "pylumiere bf16", "lane_seconds": took, "least_lane_seconds": least[kind],
            "share": took / (lanes * total), "lanes": lanes, **bounds,
        }  # fmt: skip
        told = ""
        if kind in work:
            row |= {
                "flops": cost.flops, "bytes": cost.bytes,
                "of_matmul": lanes * cost.flops / took / bounds["matmul_bf16_flops_per_s"],
                "of_copy": lanes * cost.bytes / took / bounds["copy_bytes_per_s"],
            }  # fmt: skip
            told = f"{100 * row['of_matmul']:5.1f} % of matmul, {100 * row['of_copy']:5.1f} % of copy"
        rows.append(row)
        print(f"{site.name} {kind:30} {100 * row['share']:5.1f} % of the time | {told}", flush=True)
    rates = bounds["matmul_bf16_flops_per_s"], bounds["copy_bytes_per_s"]
    return rows, Measured(seconds, least, plan, lanes, ROWS, *rates)


# Of the demo's stages: sizes that nothing was taken from. Half and twice the frames, and other pictures.
PREDICTED = {"base": ((40, None), (160, None), (80, 48)), "ssr": ((16, None), (8, 64), (8, 192))}


def _predictions(site: Site, measured: Measured, threads: int) -> list[dict]:
    """Predicted and measured seconds of calls at other sizes."""
    rows = []
    for frames, side in PREDICTED[site.stage] if site.checkpoint.config.name == "demo" else ():
        size = None if side is None else (side, side)
        other = make_site(site.checkpoint, site.stage, frames=frames, size=size)
        predicted = measured.predict(other.plan, ROWS)
        timing = measure({"call": engine_call(other, "bf16", threads)}, "cpu")["call"]
        error = predicted / timing.median - 1
        print(
            f"{other.name}: predicted {1e3 * predicted:.1f} ms, measured {1e3 * timing.median:.1f} ms, "
            f"{100 * error:+.0f} %", flush=True,
        )  # fmt: skip
        rows.append({"case": other.name, "predicted": predicted, "error_of_prediction": error, **_timing(timing)})
    return rows


def _scaling(site: Site, threads: int) -> list[dict]:
    """The same rows on 1, 2, ... threads."""
    counts = [count for count in (1, 2, 4, 8, 16) if count <= threads]
    calls = {str(count): engine_call(site, "bf16", count) for count in counts}
    timings = measure(calls, "cpu")
    rows = []
    for count in counts:
        timing = timings[str(count)]
        gain = timings["1"].median / timing.median
        print(f"{site.name} on {count} threads: {1e3 * timing.median:.1f} ms, {gain:.2f} x one thread", flush=True)
        rows.append({"case": site.name, "provider": "pylumiere bf16", "scaling": count, **_timing(timing)})
    return rows
