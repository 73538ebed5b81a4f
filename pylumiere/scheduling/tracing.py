"""Ranges for Nsight and spans for OpenTelemetry, where somebody looks; otherwise nothing at all.

Ranges need the package nvtx and a GPU. Spans need a program that has imported opentelemetry.trace, as one that exports
spans has: this module imports nothing that is not there already.
"""

from __future__ import annotations

import contextlib
import sys
from typing import Any

_NOTHING = contextlib.nullcontext()


class Tracer:
    """Args: ranges: make NVTX ranges, if the package is installed."""

    def __init__(self, ranges: bool):
        self._nvtx = None
        if ranges:
            with contextlib.suppress(ImportError):
                import nvtx

                self._nvtx = nvtx

    def range(self, name: str):
        """A context manager around one piece of work."""
        return _NOTHING if self._nvtx is None else self._nvtx.annotate(name, domain="pylumiere")

    def start_span(self, name: str, attributes: dict[str, Any]):
        """A span, to be given to `end_span`; None where nobody looks."""
        trace = sys.modules.get("opentelemetry.trace")
        if trace is None:
            return None
        return trace.get_tracer("pylumiere").start_span(name, attributes=attributes)

    def end_span(self, span, error: BaseException | None = None, **attributes: Any) -> None:
        if span is None:
            return
        for name, value in attributes.items():
            span.set_attribute(name, value)
        if error is not None:
            span.record_exception(error)
            trace = sys.modules["opentelemetry.trace"]
            span.set_status(trace.Status(trace.StatusCode.ERROR, str(error)))
        span.end()
