"""Progress and preview frames, from the threads that work to the clients that listen.

What a job has shown so far is kept while it runs, so a listener that comes late sees all of it. A listener that is too
slow loses old previews, never the end.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

MAX_WAITING = 128  # events of one listener


@dataclass
class _Topic:
    progress: dict[str, Any] | None = None
    previews: list[dict[str, Any]] = field(default_factory=list)


class _Listener:
    def __init__(self, loop: asyncio.AbstractEventLoop):
        self.loop = loop
        self.waiting: deque[tuple[str, Any]] = deque(maxlen=MAX_WAITING)
        self.ready = asyncio.Event()


class Hub:
    """`publish` from any thread; `listen` in an event loop."""

    def __init__(self):
        self._lock = threading.Lock()
        self._topics: dict[str, _Topic] = {}
        self._listeners: dict[str, set[_Listener]] = {}
        self._is_closed = False

    def publish(self, id: str, event: str, data: Any = None) -> None:
        """Events are "progress", "preview" and "status"; the last says that the job's record has changed."""
        with self._lock:
            if event == "progress":
                self._topics.setdefault(id, _Topic()).progress = data
            elif event == "preview":
                self._topics.setdefault(id, _Topic()).previews.append(data)
            listeners = list(self._listeners.get(id, ()))
            for listener in listeners:
                listener.waiting.append((event, data))
        for listener in listeners:
            _wake(listener)

    def forget(self, id: str) -> None:
        """What was shown of a job, when it has ended or starts again."""
        with self._lock:
            self._topics.pop(id, None)

    def progress(self, id: str) -> dict[str, Any] | None:
        with self._lock:
            topic = self._topics.get(id)
            return None if topic is None else topic.progress

    async def listen(self, id: str, *, beat_seconds: float) -> AsyncIterator[tuple[str, Any]]:
        """What was shown so far, then what comes; "beat" when nothing came for a while; ends when the hub closes."""
        listener = _Listener(asyncio.get_running_loop())
        with self._lock:
            topic = self._topics.get(id)
            if topic is not None:
                listener.waiting.extend(("preview", preview) for preview in topic.previews)
                if topic.progress is not None:
                    listener.waiting.append(("progress", topic.progress))
            self._listeners.setdefault(id, set()).add(listener)
        try:
            while not self._is_closed:
                while listener.waiting:
                    yield listener.waiting.popleft()
                try:
                    await asyncio.wait_for(listener.ready.wait(), beat_seconds)
                except TimeoutError:
                    yield "beat", None
                listener.ready.clear()
        finally:
            with self._lock:
                self._listeners[id].discard(listener)
                if not self._listeners[id]:
                    del self._listeners[id]

    def close(self) -> None:
        with self._lock:
            self._is_closed = True
            listeners = [listener for group in self._listeners.values() for listener in group]
        for listener in listeners:
            _wake(listener)

    @property
    def num_listeners(self) -> int:
        with self._lock:
            return sum(len(group) for group in self._listeners.values())


def _wake(listener: _Listener) -> None:
    if not listener.loop.is_closed():
        listener.loop.call_soon_threadsafe(listener.ready.set)
