"""Takes jobs from the store, runs them on a worker, writes the results. One thread for each job that runs.

A worker is where the engine is: in this process (`LocalWorker`), or in one of many (`ray_app`). It may be lost in
mid-job (`WorkerLost`); the job then goes back into the queue and runs again, from its stored request and seed.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

from pylumiere.diffusion.windows import NonFiniteOutput
from pylumiere.engine import Chunk, Engine
from pylumiere.errors import BudgetExceeded, Cancelled, DeadlineExceeded, InvalidRequest
from pylumiere.media.readers import Limits
from pylumiere.media.writers import VideoWriter
from pylumiere.request import GenerationRequest, Progress
from pylumiere.serve import media, schema
from pylumiere.serve.hub import Hub
from pylumiere.serve.metrics import Metrics, Sample
from pylumiere.serve.store import Job, Store

logger = logging.getLogger("pylumiere")

SWEEP_SECONDS = 60.0
BUFFER_FRAMES = 32  # final frames of one clip that wait for the encoder


class WorkerLost(RuntimeError):
    """The worker ended in mid-job through no fault of the job's."""


class Work(Protocol):
    """One clip in the making: final frames in order. After the last, `metadata` tells what was done."""

    metadata: dict[str, Any]

    def __iter__(self) -> Iterator[Chunk]: ...

    def cancel(self) -> None:
        """From any thread; the iterator then raises Cancelled."""


class Worker(Protocol):
    def start(
        self, request: GenerationRequest, on_progress: Callable[[Progress], None], timeout: float | None
    ) -> Work: ...

    def check(self, request: GenerationRequest) -> None:
        """Raises what a worker would: InvalidRequest, BudgetExceeded."""


class Runner:
    """Runs what the store holds, `concurrency` jobs at once.

    Args:
        stages: names of the model's stages, in their order.
        limits: of a job's files.

    Attributes:
        worker: None until `set_worker`; jobs wait for it.
    """

    def __init__(self, store: Store, hub: Hub, metrics: Metrics, *, stages: Sequence[str], concurrency: int,
                 limits: Limits):  # fmt: skip
        self.store, self.hub, self.metrics, self.concurrency = store, hub, metrics, concurrency
        self.limits = limits
        self.worker: Worker | None = None
        self.seconds_per_job = 2.0  # a moving mean, for Retry-After
        # Of a clip's time, by stage in their order: moving means, for the percentage.
        self._shares = dict.fromkeys(stages, 1 / len(stages))
        self._changed = threading.Condition()
        self._running: dict[str, _Running] = {}
        self._is_closing = False
        self._pool = ThreadPoolExecutor(concurrency, thread_name_prefix="pylumiere-serve")
        self._dispatcher = threading.Thread(target=self._dispatch, name="pylumiere-dispatch", daemon=True)
        self._dispatcher.start()

    def set_worker(self, worker: Worker) -> None:
        with self._changed:
            self.worker = worker
            self._changed.notify_all()

    def notify(self) -> None:
        """There may be something to do."""
        with self._changed:
            self._changed.notify_all()

    def cancel(self, id: str) -> None:
        """Stops a job that was deleted. Its slot is free after at most one call of a network."""
        with self._changed:
            running = self._running.get(id)
        if running is not None:
            running.cancel()

    @property
    def num_running(self) -> int:
        with self._changed:
            return len(self._running)

    def percent(self, id: str) -> int:
        with self._changed:
            running = self._running.get(id)
        return 0 if running is None else running.percent

    def close(self) -> None:
        """Stops what runs; it goes back into the queue, for the next start."""
        with self._changed:
            self._is_closing = True
            running = list(self._running.values())
            self._changed.notify_all()
        for one in running:
            one.cancel()
        self._dispatcher.join()
        self._pool.shutdown()

    # ---- inside ------------------------------------------------------------------------------------------------------

    def _dispatch(self) -> None:
        swept = time.monotonic()
        while True:
            with self._changed:
                if self._is_closing:
                    return
                job = None
                if self.worker is not None and len(self._running) < self.concurrency:
                    job = self._claim()
                if job is None:
                    self._changed.wait(self._expire())
                else:
                    running = self._running[job.id] = _Running(dict(self._shares))
                    self._pool.submit(self._run, job, running)
            if time.monotonic() - swept > SWEEP_SECONDS:
                swept = time.monotonic()
                self._sweep()

    def _claim(self) -> Job | None:
        try:
            return self.store.claim()
        except Exception:
            logger.exception("the store cannot be read")
            self._changed.wait(1.0)
            return None

    def _expire(self) -> float:
        """Fails what waited too long. Returns the seconds until there is something to do again."""
        try:
            for id in self.store.expire():
                self.metrics.jobs.labels("failed").inc()
                self.hub.publish(id, "status")
            deadline = self.store.next_deadline()
        except Exception:
            logger.exception("the store cannot be read")
            return 1.0
        return SWEEP_SECONDS if deadline is None else min(SWEEP_SECONDS, max(0.01, deadline - time.time()))

    def _sweep(self) -> None:
        try:
            for id in self.store.sweep():
                self.hub.publish(id, "status")
        except Exception:
            logger.exception("the retention of old clips failed")

    def _run(self, job: Job, running: _Running) -> None:
        outcome = "failed"
        try:
            self.hub.publish(job.id, "status")
            self.metrics.queue_seconds.observe(max(0.0, job.started_at - job.created_at))
            outcome = self._make(job, running)
        except Cancelled:
            outcome = "cancelled"
            if self._is_closing:
                self.store.requeue(job.id, is_attempt=False)
        except WorkerLost as error:
            logger.warning("job %s: its worker was lost (%s); attempt %d", job.id, error, job.attempts)
            outcome = "worker_lost"
            self.store.requeue(job.id, is_attempt=True)
        except InvalidRequest as error:
            self.store.fail(job.id, "invalid_request", str(error))
        except schema.ApiError as error:  # an input that could be read when it came
            self.store.fail(job.id, "invalid_request", error.message)
        except BudgetExceeded as error:
            self.store.fail(job.id, "budget_exceeded", str(error))
        except DeadlineExceeded:
            text = f"it was not done within its {round(job.deadline - job.created_at, 3):g} s"
            self.store.fail(job.id, "deadline_exceeded", text)
        except NonFiniteOutput as error:
            logger.exception("job %s failed", job.id)
            self.store.fail(job.id, "non_finite_output", str(error))
        except Exception:
            # The message may hold paths of this machine; it goes to the log alone.
            logger.exception("job %s failed", job.id)
            with contextlib.suppress(Exception):
                self.store.fail(job.id, "server_error", "the server failed on this job; its log has the reason")
        finally:
            self._ended(job, outcome)

    def _make(self, job: Job, running: _Running) -> str:
        num_frames, fps = job.plan["num_frames"], job.plan["fps"]
        self.hub.forget(job.id)

        def follow(progress: Progress) -> None:
            self.hub.publish(job.id, "progress", {**vars(progress), "percent": running.follow(progress)})

        request = media.generation_request(job.request, self.store.inputs(job), self.limits)
        folder = self.store.start_result(job.id)
        try:
            timeout = None if job.deadline is None else job.deadline - time.time()
            if timeout is not None and timeout <= 0:
                raise DeadlineExceeded
            work = running.start(lambda: self.worker.start(request, follow, timeout))
            sheet, stride, middle = media.SpriteSheet(num_frames), media.preview_stride(num_frames), None
            with VideoWriter(folder / schema.VARIANTS["video"][0], fps) as writer:
                for chunk in work:
                    writer.write(chunk.frames)
                    sheet.add(chunk.start, chunk.frames)
                    for index in range(-chunk.start % stride, len(chunk.frames), stride):
                        preview = {"frame": chunk.start + index, "image": media.preview_url(chunk.frames[index])}
                        self.hub.publish(job.id, "preview", preview)
                    if chunk.start <= num_frames // 2 < chunk.start + len(chunk.frames):
                        middle = media.thumbnail(chunk.frames[num_frames // 2 - chunk.start])
            (folder / schema.VARIANTS["thumbnail"][0]).write_bytes(middle)
            (folder / schema.VARIANTS["spritesheet"][0]).write_bytes(sheet.encode())
            if not self.store.complete(job.id):
                return "cancelled"
        finally:
            self.store.drop_result(job.id)
        seconds = work.metadata.get("seconds", {})
        for stage in ("text", *self._shares):
            if stage in seconds:
                self.metrics.stage_seconds.labels(stage).observe(seconds[stage])
        if seconds.get("total"):
            for stage, share in self._shares.items():
                self._shares[stage] += 0.2 * (seconds.get(stage, 0.0) / seconds["total"] - share)
        self.metrics.frames.inc(num_frames)
        return "completed"

    def _ended(self, job: Job, outcome: str) -> None:
        self.metrics.jobs.labels(outcome).inc()
        if outcome == "completed":
            took = time.time() - job.started_at
            self.seconds_per_job += 0.2 * (took - self.seconds_per_job)
        self._sweep()
        with self._changed:
            del self._running[job.id]
            self._changed.notify_all()
        self.hub.publish(job.id, "status")
        self.hub.forget(job.id)


class _Running:
    """A job in its thread."""

    def __init__(self, shares: dict[str, float]):
        self.percent = 0
        self._shares = shares
        self._lock = threading.Lock()
        self._work: Work | None = None
        self._is_cancelled = False

    def start(self, start: Callable[[], Work]) -> Work:
        if self._is_cancelled:
            raise Cancelled("the job was cancelled before it started")
        work = start()
        with self._lock:
            self._work = work
            is_cancelled = self._is_cancelled
        if is_cancelled:
            work.cancel()
        return work

    def cancel(self) -> None:
        with self._lock:
            self._is_cancelled = True
            work = self._work
        if work is not None:
            work.cancel()

    def follow(self, progress: Progress) -> int:
        """The percentage, which never falls and reaches 100 with the whole file only."""
        part = progress.step / progress.steps if progress.steps else 0.0
        names = list(self._shares)
        done = sum(self._shares[name] for name in names[: names.index(progress.stage)])
        # The last stage fills up what is left: text and file are in no stage.
        done += part * (1 - done if progress.stage == names[-1] else self._shares[progress.stage])
        self.percent = max(self.percent, min(99, int(100 * done)))
        return self.percent


class LocalWorker:
    """An engine in this process."""

    def __init__(self, engine: Engine):
        self.engine = engine

    def watch(self, metrics: Metrics) -> None:
        """The engine's numbers, read at each scrape."""
        weights = self.engine.info()["weight_bytes"]

        def read() -> Iterator[Sample]:
            now = self.engine.metrics()
            for state, count in now["requests"].items():
                yield "pylumiere_engine_requests", "The engine's requests.", {"state": state}, count
            for kind, count in {**now["memory"], "weights": weights}.items():
                text = "The budget (0 is none), what the planner counts now, the process, the networks."
                yield "pylumiere_engine_memory_bytes", text, {"kind": kind}, count or 0
            for stage, counts in now["stages"].items():
                for name, text in (
                    ("calls", "Calls of a network."), ("rows", "Rows of those calls."),
                    ("call_seconds", "From handing a call out to its last part."),
                ):  # fmt: skip
                    yield f"pylumiere_engine_{name}", text, {"stage": stage}, counts[name]
                for windows, count in counts["windows_per_call"].items():
                    labels = {"stage": stage, "windows": windows}
                    yield "pylumiere_engine_calls_by_windows", "Calls by the windows that shared them.", labels, count

        metrics.collect_with(read)

    def check(self, request: GenerationRequest) -> None:
        check_style(request, self.engine.styles())
        self.engine.stream(request).close()

    def start(
        self, request: GenerationRequest, on_progress: Callable[[Progress], None], timeout: float | None
    ) -> Work:
        check_style(request, self.engine.styles())
        # The callback runs in the thread that takes the frames, which is the job's own.
        request = request.model_copy(update={"callback_on_step_end": on_progress})
        return _LocalWork(self.engine.submit(request, buffer_frames=BUFFER_FRAMES, timeout=timeout))


def check_style(request: GenerationRequest, styles: Collection[str]) -> None:
    """A client names a style of the model; an engine would also take a file's path.

    Raises:
        InvalidRequest: the model has no such style.
    """
    if request.style is not None and request.style not in styles:
        raise InvalidRequest(f"style={request.style!r}: this model has {', '.join(styles) or 'no styles'}")


class _LocalWork:
    def __init__(self, job: Any):
        self._job = job
        self.metadata: dict[str, Any] = job.metadata

    def __iter__(self) -> Iterator[Chunk]:
        return self._job.frames()

    def cancel(self) -> None:
        self._job.cancel()
