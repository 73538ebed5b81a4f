"""Frames that arrive while a clip is sampled: what the sampler asks of them, a buffer, a producer in a thread."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from typing import Protocol

import numpy as np

from pylumiere._runtime import FrameQueue


class FrameSource(Protocol):
    """Frames that arrive while the clip is being sampled. Only their number matters to the sampler."""

    def require(self, num_frames: int) -> tuple[int, bool]:
        """Waits until `num_frames` have arrived or the input has ended; returns (frames arrived, has ended)."""

    def release(self, first: int) -> None:
        """Frames below `first` will not be asked for again."""


class FrameBuffer:
    """Conditioning frames that arrive as a stream; keeps those that can still be asked for. A FrameSource.

    Args:
        frames: yields single frames [...] or chunks [n, ...]; told apart by `frame_ndim`. Never read ahead.
        frame_ndim: dimensions of one frame.
    """

    def __init__(self, frames: Iterable[np.ndarray], frame_ndim: int = 3):
        self._frames = iter(frames)
        self._frame_ndim = frame_ndim
        self._held: dict[int, np.ndarray] = {}
        self._first = self._arrived = 0
        self._ended = False
        self._shape: tuple[int, ...] | None = None

    def require(self, num_frames: int) -> tuple[int, bool]:
        while self._arrived < num_frames and not self._ended:
            try:
                chunk = np.asarray(next(self._frames))
            except StopIteration:
                self._ended = True
                break
            for frame in [chunk] if chunk.ndim == self._frame_ndim else chunk:
                if self._shape is None:
                    self._shape = frame.shape
                if frame.shape != self._shape:
                    raise ValueError(
                        f"frame {self._arrived} of the input has shape {frame.shape}, those before have {self._shape}"
                    )
                if self._arrived >= self._first:
                    self._held[self._arrived] = frame
                self._arrived += 1
        return self._arrived, self._ended

    def release(self, first: int) -> None:
        for index in range(self._first, min(first, self._arrived)):
            self._held.pop(index, None)
        self._first = max(self._first, first)

    def gather(self, frames: np.ndarray) -> np.ndarray:
        """Frames at the indices `frames` [...], stacked: [..., *frame shape]."""
        frames = np.asarray(frames)
        stacked = np.stack([self._held[index] for index in frames.ravel().tolist()])
        return stacked.reshape(*frames.shape, *stacked.shape[1:])

    def __len__(self) -> int:
        """Frames held."""
        return len(self._held)


class in_background:
    """Runs an iterator in a thread of its own, at most `capacity` items ahead of the consumer.

    An exception of the iterator is raised at the consumer, after the items before it. `close` (also when the object is
    dropped, or as a context manager) stops the thread at its next item, closes the iterator and waits for both.
    """

    def __init__(self, iterable: Iterable, capacity: int = 2):
        self._queue = FrameQueue(capacity)
        self._state: dict[str, BaseException] = {}
        # The thread must not hold `self`: a dropped iterator has to be collected for its thread to stop.
        self._thread = threading.Thread(
            target=_produce, args=(iter(iterable), self._queue, self._state), name="pylumiere-producer", daemon=True
        )
        self._thread.start()

    def __iter__(self):
        return self

    def __next__(self):
        item = self._queue.get()
        if item:
            return item[0]
        self._thread.join()
        error = self._state.pop("error", None)
        if error is not None:
            raise error
        raise StopIteration

    def close(self) -> None:
        self._queue.cancel()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def __del__(self):
        if hasattr(self, "_thread"):
            self.close()


def _produce(iterator: Iterator, queue: FrameQueue, state: dict[str, BaseException]) -> None:
    try:
        try:
            for item in iterator:
                if not queue.put(item):
                    break
        finally:
            if hasattr(iterator, "close"):
                iterator.close()
    except BaseException as error:
        state["error"] = error
    finally:
        queue.finish()
