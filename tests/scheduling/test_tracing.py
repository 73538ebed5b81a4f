"""Ranges and spans where somebody looks, and nothing where nobody does."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import types

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from support.testing import write_random_model

from pylumiere.engine import Engine
from pylumiere.scheduling import tracing
from pylumiere.scheduling.tracing import Tracer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_random_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def spans(monkeypatch):
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(trace, "get_tracer", provider.get_tracer)
    return exporter.get_finished_spans


def test_a_span_for_each_request(folder, spans):
    with Engine.load(folder, precision="fp32") as engine:
        engine.generate("x", seed=2**63 - 1, num_frames=2)
        with pytest.raises(ZeroDivisionError):
            engine.generate("x", seed=1, callback_on_step_end=lambda progress: 1 / 0)
    good, bad = spans()
    assert good.name == "pylumiere.request" and good.status.is_unset
    assert dict(good.attributes) == {
        "pylumiere.seed": str(2**63 - 1), "pylumiere.steps": 4, "pylumiere.num_frames": 2, "pylumiere.frames": 2,
    }  # fmt: skip
    assert good.end_time > good.start_time
    assert bad.status.status_code is trace.StatusCode.ERROR and "division" in bad.status.description
    assert bad.events[0].attributes["exception.type"] == "ZeroDivisionError"


def test_nothing_is_imported_for_those_who_do_not_look():
    code = """
import sys
from pylumiere.scheduling.tracing import Tracer
tracer = Tracer(ranges=False)
span = tracer.start_span("a", {})
tracer.end_span(span)
with tracer.range("b"):
    pass
assert span is None and not [name for name in sys.modules if name.startswith(("opentelemetry", "nvtx"))]
"""
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


class Ranges(types.ModuleType):
    """Stands for the package nvtx, which needs NVIDIA's library to show anything."""

    def __init__(self):
        super().__init__("nvtx")
        self.names, self.open = [], 0

    @contextlib.contextmanager
    def annotate(self, message, domain):
        assert domain == "pylumiere"
        self.names.append(message)
        self.open += 1
        yield
        self.open -= 1


def test_a_range_around_each_part_of_a_call(folder, monkeypatch):
    nvtx = Ranges()
    monkeypatch.setitem(sys.modules, "nvtx", nvtx)
    with Engine.load(folder, precision="fp32") as engine:
        engine._scheduler._lanes._tracer = Tracer(ranges=True)
        engine.generate("x", seed=1, num_frames=4, guidance_scale=1.0)
        assert nvtx.names == ["base"] * 4 + ["ssr"] * 2 and nvtx.open == 0
        engine._scheduler._lanes._tracer = Tracer(ranges=False)
        engine.generate("x", seed=1, num_frames=4, guidance_scale=1.0)
    assert len(nvtx.names) == 6


def test_ranges_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "nvtx", None)  # an import of it fails
    assert Tracer(ranges=True).range("x") is tracing._NOTHING
