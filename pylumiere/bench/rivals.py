"""The networks of a model by other software, on the same weights: what a user could run on a CPU instead.

Each is given its better form: weights channels-last or as they come, rows in one call on all threads or side by side
with a thread each, torch.compile with frozen weights, OpenVINO with one stream or one a row. Shapes are fixed, so that
whatever can be folded is folded. Preparing them is not timed.

OpenVINO 2026.4 breaks one of these graphs with its code generator for elementwise chains, which is switched off
(`SNIPPETS_MODE=DISABLE`).
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from pylumiere.backends.torch import channels_last
from pylumiere.networks.families import AnyConfig, build_network

FAMILIES = ("eager", "compile", "onnxruntime", "openvino")
PACKAGES = {"onnxruntime": ("onnxruntime", "onnxscript"), "openvino": ("openvino",)}
# Of TorchBackend.predict: sample, timesteps, text, text_mask, noise_level; or of its decode: latents.
Operands = tuple[Tensor | None, ...]


@dataclass(frozen=True)
class Rival:
    """A network, ready to be called on the operands that it was made for.

    Attributes:
        name: family, precision and form.
        family: of FAMILIES.
        precision: "fp32" or "bf16".
        run: computes all rows; returns [B, T, H, W, 3] float32.
        prepared: seconds that making it took.
    """

    name: str
    family: str
    precision: str
    run: Callable[[], Tensor]
    prepared: float


@dataclass(frozen=True)
class Missing:
    """A rival that cannot run here, and why."""

    name: str
    reason: str


class Wrapped(torch.nn.Module):
    """A network that takes only the operands that it has, in their order; no Nones for exporters to meet."""

    def __init__(self, network: Callable[..., Tensor], operands: Operands):
        super().__init__()
        self.network = network
        self.count = len(operands)
        self.places = [index for index, operand in enumerate(operands) if operand is not None]

    def forward(self, *given: Tensor) -> Tensor:
        operands: list[Tensor | None] = [None] * self.count
        for place, tensor in zip(self.places, given, strict=True):
            operands[place] = tensor
        return self.network(*operands)


def make_rivals(
    config: AnyConfig,
    weights: Mapping[str, Tensor],
    operands: Operands,
    families: tuple[str, ...] = FAMILIES,
    *,
    threads: int,
    precisions: tuple[str, ...] = ("fp32", "bf16"),
    max_autotune: bool = False,
) -> Iterator[Rival | Missing]:
    """Prepares rivals one after the other. Each row of the operands is one sample.

    Args:
        config, weights: the network.
        operands: what it will be called on.
        families: of FAMILIES.
        threads: of the CPU in all.
        precisions: those of interest; ONNX Runtime has fp32 only.
        max_autotune: also torch.compile's "max-autotune".
    """
    given = tuple(operand for operand in operands if operand is not None)

    def wrapped(dtype: torch.dtype, in_channels_last: bool) -> Wrapped:
        prepare = channels_last if in_channels_last else torch.clone
        network = build_network(config, {name: prepare(weight.to(dtype)) for name, weight in weights.items()})
        return Wrapped(network, operands).eval()

    makers = {"eager": _eager, "compile": _compile, "onnxruntime": _onnxruntime, "openvino": _openvino}
    for family in families:
        missing = [p for p in PACKAGES.get(family, ()) if importlib.util.find_spec(p) is None]
        if missing:
            yield Missing(family, f"the package {missing[0]} is not installed; see pylumiere[bench]")
            continue
        for precision in precisions:
            dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
            if family == "onnxruntime" and precision != "fp32":
                continue
            forms = makers[family](wrapped, dtype, given, threads)
            if family == "compile" and max_autotune:
                forms = [*forms, *_compile(wrapped, dtype, given, threads, "max-autotune-no-cudagraphs")]
            for form, make in forms:
                name = f"{family} {precision} {form}".strip()
                begun = time.perf_counter()
                try:
                    run = make()
                    run()
                except Exception as error:  # whatever a rival's compiler raises; it is named, not hidden
                    yield Missing(name, _first_line(error))
                else:
                    yield Rival(name, family, precision, run, time.perf_counter() - begun)


# ---- forms ---------------------------------------------------------------------------------------------------------


def _eager(wrapped, dtype, given, threads):
    def form(in_channels_last: bool, rows: bool):
        network = wrapped(dtype, in_channels_last)
        call = lambda *part: network(*part)  # noqa: E731
        return side_by_side(call, given, threads) if rows else _whole(call, given, threads)

    several = len(given[0]) > 1 and threads > 1
    for last, name in ((False, ""), (True, "channels-last")):
        yield name, lambda last=last: form(last, False)
        if several:
            yield f"{name} rows".strip(), lambda last=last: form(last, True)


def _compile(wrapped, dtype, given, threads, mode: str | None = None):
    def form(rows: bool):
        import torch._dynamo.config as dynamo
        import torch._inductor.config as inductor

        dynamo.recompile_limit = max(dynamo.recompile_limit, 64)  # it is per function, and every form is one more
        network = torch.compile(wrapped(dtype, True), mode=mode, dynamic=False)
        call = lambda *part: network(*part)  # noqa: E731
        # Compiled here, by the first call: the generated loops know their number of threads.
        with inductor.patch(freezing=True), torch.inference_mode():
            torch.set_num_threads(max(1, threads // len(given[0])) if rows else threads)
            call(*(tensor[:1] for tensor in given) if rows else given)
        torch.set_num_threads(threads)
        return side_by_side(call, given, threads) if rows else _whole(call, given, threads)

    name = "max-autotune" if mode else ""
    yield name, lambda: form(False)
    if len(given[0]) > 1 and threads > 1:
        yield f"{name} rows".strip(), lambda: form(True)


def _onnxruntime(wrapped, dtype, given, threads):
    import onnxruntime

    def form(rows: bool):
        part = tuple(tensor[:1] for tensor in given) if rows else given
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "network.onnx"
            export_onnx(wrapped(dtype, False), part, path)
            options = onnxruntime.SessionOptions()
            options.log_severity_level = 3
            options.intra_op_num_threads = max(1, threads // len(given[0])) if rows else threads
            session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        names = [port.name for port in session.get_inputs()]

        def call(*tensors: Tensor) -> Tensor:
            feed = {name: tensor.numpy() for name, tensor in zip(names, tensors, strict=True)}
            return torch.from_numpy(session.run(None, feed)[0])

        return side_by_side(call, given, threads) if rows else _whole(call, given, threads)

    yield "", lambda: form(False)
    if len(given[0]) > 1 and threads > 1:
        yield "rows", lambda: form(True)


def _openvino(wrapped, dtype, given, threads):
    precision = {torch.float32: "f32", torch.bfloat16: "bf16"}[dtype]

    def form(rows: bool):
        part = tuple(tensor[:1] for tensor in given) if rows else given
        model = openvino_model(wrapped(torch.float32, False), part)
        streams = len(given[0]) if rows else 1
        compiled = compile_openvino(model, precision, threads, streams)
        local = threading.local()

        def call(*tensors: Tensor) -> Tensor:
            if not hasattr(local, "request"):
                local.request = compiled.create_infer_request()
            result = local.request.infer([tensor.numpy() for tensor in tensors], share_inputs=True, share_outputs=True)
            return torch.from_numpy(result[0])

        return side_by_side(call, given, threads) if rows else _whole(call, given, threads)

    yield "", lambda: form(False)
    if len(given[0]) > 1 and threads > 1:
        yield "rows", lambda: form(True)


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Without the exporters' remarks about packages that are not installed and functions that will change."""
    log = logging.getLogger("torch.onnx")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)


def export_onnx(network: torch.nn.Module, given: tuple[Tensor, ...], path: Path) -> None:
    """A graph of fixed shapes, as torch's own exporter makes it."""
    with _quietly():
        torch.onnx.export(network, given, path, dynamo=True, verbose=False, external_data=False)


def openvino_model(network: torch.nn.Module, given: tuple[Tensor, ...]):
    """OpenVINO's own conversion of a network of fixed shapes."""
    os.environ.setdefault("OPENVINO_TELEMETRY_OPT_OUT", "1")
    import openvino

    with _quietly():
        return openvino.convert_model(torch.export.export(network, given))


def compile_openvino(model, precision: str, threads: int, streams: int, cache: Path | None = None):
    """For the CPU; `precision` is "f32" or "bf16"."""
    import openvino

    settings = {
        "INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": streams,
        "SNIPPETS_MODE": "DISABLE",
    }  # fmt: skip
    if cache is not None:
        settings["CACHE_DIR"] = str(cache)
    return openvino.Core().compile_model(model, "CPU", settings)


# ---- arrangements --------------------------------------------------------------------------------------------------


def _whole(call: Callable[..., Tensor], given: tuple[Tensor, ...], threads: int) -> Callable[[], Tensor]:
    """All rows in one call."""

    @torch.inference_mode()
    def run() -> Tensor:
        torch.set_num_threads(threads)
        return call(*given).float()

    return run


class _Worker(threading.Thread):
    """Computes a function whenever it is told to; a thread that stays, so that OpenMP's threads stay, too."""

    def __init__(self, function: Callable[[], Tensor]):
        super().__init__(daemon=True)
        self._function, self._start, self._done = function, threading.Semaphore(0), threading.Semaphore(0)
        self.result: Tensor | None = None
        self.error: BaseException | None = None
        self.start()

    def run(self) -> None:
        while True:
            self._start.acquire()
            try:
                self.result, self.error = self._function(), None
            except BaseException as error:
                self.error = error
            self._done.release()

    def begin(self) -> None:
        self._start.release()

    def end(self) -> Tensor:
        self._done.acquire()
        if self.error is not None:
            raise self.error
        return self.result


def side_by_side(call: Callable[..., Tensor], given: tuple[Tensor, ...], threads: int) -> Callable[[], Tensor]:
    """A row a thread, `threads` of them at once, each with its share of the cores."""
    share = max(1, threads // len(given[0]))

    def rows_of(worker: int) -> Callable[[], list[Tensor]]:
        @torch.inference_mode()
        def rows() -> list[Tensor]:
            torch.set_num_threads(share)  # of the calling thread
            parts = range(worker, len(given[0]), min(threads, len(given[0])))
            return [call(*(tensor[row : row + 1] for tensor in given)).float() for row in parts]

        return rows

    workers = [_Worker(rows_of(worker)) for worker in range(min(threads, len(given[0])))]

    def run() -> Tensor:
        for worker in workers:
            worker.begin()
        parts = [worker.end() for worker in workers]
        return torch.cat([parts[row % len(parts)][row // len(parts)] for row in range(len(given[0]))])

    return run


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:160] if lines else ''}"
