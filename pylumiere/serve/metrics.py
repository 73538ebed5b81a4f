"""What Prometheus reads at /metrics. One registry for each service, so that two can live in one process."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
Sample = tuple[str, str, dict[str, str], float]
_SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000)


class Metrics:
    def __init__(self):
        self.registry = CollectorRegistry()
        own = {"registry": self.registry}
        self.requests = Counter(
            "pylumiere_requests", "HTTP requests by route, method and status.", ["route", "method", "status"], **own
        )
        self.request_seconds = Histogram(
            "pylumiere_request_seconds", "Time to answer, event streams apart.", ["route"], buckets=_SECONDS, **own
        )
        self.jobs = Counter("pylumiere_jobs", "Jobs that ended, by outcome.", ["outcome"], **own)
        self.queue_seconds = Histogram("pylumiere_queue_seconds", "From acceptance to start.", buckets=_SECONDS, **own)
        self.stage_seconds = Histogram(
            "pylumiere_stage_seconds", "Time of a clip's stages.", ["stage"], buckets=_SECONDS, **own
        )
        self.frames = Counter("pylumiere_frames", "Frames of completed clips.", **own)

    def gauge(self, name: str, text: str, read: Callable[[], float]) -> None:
        """A value that is read at each scrape."""
        Gauge(name, text, registry=self.registry).set_function(read)

    def collect_with(self, read: Callable[[], Iterable[Sample]]) -> None:
        """Gauges (name, text, labels, value) that `read` gives at each scrape."""
        self.registry.register(_Collector(read))

    def text(self) -> bytes:
        return generate_latest(self.registry)


class _Collector:
    def __init__(self, read: Callable[[], Iterable[Sample]]):
        self._read = read

    def collect(self) -> Iterable[Metric]:
        families: dict[str, GaugeMetricFamily] = {}
        for name, text, labels, value in self._read():
            family = families.setdefault(name, GaugeMetricFamily(name, text, labels=list(labels)))
            family.add_metric(list(labels.values()), float(value))
        return list(families.values())
