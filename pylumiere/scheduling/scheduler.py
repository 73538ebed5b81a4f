"""The scheduler: one thread that decides which network call is next, for all requests of an engine.

Requests wait in order of arrival until the memory budget and `max_running` have room for them. Those that run are
served by the time that they have had: of the buckets that have something to compute, the one whose clips have had the
least is next, and inside a bucket clips take turns. So a long request does not hold up a short one.
"""

from __future__ import annotations

import concurrent.futures
import functools
import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from pylumiere.config import DECODER
from pylumiere.diffusion.stages import Feed, Pipeline, StageRun
from pylumiere.errors import Cancelled, QueueFull
from pylumiere.request import Progress
from pylumiere.scheduling.batching import Bucket, Call, CallShape, Lanes, call_shape, use_threads
from pylumiere.scheduling.decoding import DecodeBucket
from pylumiere.scheduling.jobs import Job
from pylumiere.scheduling.memory import Budget, CallBytes, Need, resident_bytes
from pylumiere.scheduling.tracing import Tracer

if TYPE_CHECKING:
    from pylumiere.backends.graphs import DeviceCalls

logger = logging.getLogger("pylumiere")

SPARE = -1  # owner of a warm bucket that is lent to one clip after the other, of those that share with nobody


@dataclass(eq=False)
class _Work:
    """A job's stage that runs: where it is, and its frames for the stage that follows.

    A clip is in two stages at once where the frames of the first go to the second as they become final: `follower` is
    the second, and `feed` the way there.
    """

    job: Job
    need: Need
    owner: int = 0  # of a bucket of its own; 0: buckets are shared
    run: StageRun | None = None
    bucket: Bucket | None = None
    handle: int = -1
    text: Any = None
    initial: np.ndarray | None = None
    low: list[np.ndarray] = field(default_factory=list)
    feed: Feed | None = None
    follower: _Work | None = None
    is_follower: bool = False
    tasks_done: int = 0
    begun: float = 0.0
    is_paused: bool = False
    wanted: int = 0  # frames of the stage before that must be there before it can go on
    taken: int = 0  # final frames taken from the sampler


@dataclass
class _StageCounts:
    calls: int = 0
    rows: int = 0
    call_seconds: float = 0.0  # from handing a call out to its last part
    lane_seconds: float = 0.0
    sizes: Counter = field(default_factory=Counter)  # calls by number of windows
    runs: int = 0
    run_seconds: float = 0.0  # of whole stages

    def to_dict(self) -> dict[str, Any]:
        return {
            "calls": self.calls, "rows": self.rows, "call_seconds": round(self.call_seconds, 6),
            "lane_seconds": round(self.lane_seconds, 6),
            "windows_per_call": {str(size): count for size, count in sorted(self.sizes.items())},
            "clips": self.runs, "clip_seconds": round(self.run_seconds, 6),
        }  # fmt: skip


class _Counts:
    """What `metrics` reports."""

    def __init__(self):
        self.ended = {"completed": 0, "failed": 0, "cancelled": 0}
        self.frames = 0
        self.stages: dict[str, _StageCounts] = {}

    def call(self, stage: str, call: Call) -> None:
        counts = self.stages.setdefault(stage, _StageCounts())
        counts.calls += 1
        counts.rows += call.rows
        counts.call_seconds += time.perf_counter() - call.begun
        counts.lane_seconds += call.seconds
        counts.sizes[call.batch.num_tasks] += 1

    def stage(self, stage: str, seconds: float) -> None:
        counts = self.stages.setdefault(stage, _StageCounts())
        counts.runs += 1
        counts.run_seconds += seconds


def _span_facts(job: Job) -> dict[str, Any]:
    facts = {
        "seed": str(job.metadata["seed"]), "steps": job.metadata.get("num_inference_steps"),
        "num_frames": job.metadata["num_frames"],
    }  # fmt: skip
    return {f"pylumiere.{name}": value for name, value in facts.items() if value is not None}


class Scheduler:
    """See the module. Its thread starts with the first job and holds nothing while it waits.

    Args:
        pipeline: the loaded model.
        lanes, part_rows, part_threads: see `Lanes`.
        capacity: windows of a call, by whether it is guided.
        fixed_batch: every call has exactly that many.
        budget: what requests may take.
        max_running: requests that are worked on at once.
        max_queue: requests that wait for that.
        device_calls: streams and graphs of a GPU.
    """

    def __init__(self, pipeline: Pipeline, *, lanes: int, part_rows: int | None, part_threads: int | None,
                 capacity: dict[bool, int], fixed_batch: bool, budget: Budget, max_running: int,
                 max_queue: int, device_calls: DeviceCalls | None = None):  # fmt: skip
        self.pipeline, self.budget = pipeline, budget
        self.max_running, self.max_queue = max_running, max_queue
        self.lock = threading.RLock()  # an engine's finalizer may run inside
        self._changed = threading.Condition(self.lock)
        self._is_dirty = False
        self._closing: str | None = None  # "drain" or "cancel"
        self._thread: threading.Thread | None = None
        self._waiting: deque[tuple[Job, Need]] = deque()
        self._running: list[_Work] = []
        self._computed: list[Call] = []
        self._commands: deque[Callable[[], None]] = deque()
        self._counts = _Counts()
        # From here on for the scheduler's thread alone.
        self._capacity, self._fixed_batch = capacity, fixed_batch
        self._device_calls = device_calls
        self._tracer = Tracer(ranges=device_calls is not None)
        self._lanes = Lanes(lanes, part_threads, part_rows, self._part_done, self._tracer)
        self._buckets: dict[CallShape, Bucket] = {}
        self._warm: set[CallShape] = set()
        self._in_flight = 0  # parts
        self._served = 0.0
        self._next_owner = 0

    # ---- for other threads -------------------------------------------------------------------------------------------

    def submit(self, job: Job, need: Need) -> None:
        """Queues a job.

        Raises:
            BudgetExceeded: it does not fit even alone.
            QueueFull: too many wait.
        """
        self.budget.check(need)
        with self.lock:
            if self._closing:
                raise RuntimeError("the engine is closed")
            if len(self._waiting) >= self.max_queue:
                raise QueueFull(f"{len(self._waiting)} requests wait already, and max_queue={self.max_queue}")
            self._waiting.append((job, need))
            job._span = self._tracer.start_span("pylumiere.request", _span_facts(job))
            self._ensure_thread()
            self.notify()

    def _ensure_thread(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="pylumiere-engine", daemon=True)
            self._thread.start()

    def ended(self, job: Job) -> None:
        """A job has ended; the lock is held."""
        self._counts.ended[job.status] += 1
        self._counts.frames += job._num_final
        self._tracer.end_span(job._span, job._error, **{"pylumiere.frames": job._num_final})
        level = logging.WARNING if job.status == "failed" else logging.DEBUG
        if logger.isEnabledFor(level):
            logger.log(level, "request %s after %.3f s: seed %s%s", job.status, time.monotonic() - job._submitted,
                       job.metadata["seed"], f", {job._error}" if job._error else "")  # fmt: skip
        self.notify()

    def warm_up(self, calls: dict[CallShape, CallBytes]) -> None:
        """Makes the buffers of these calls and computes each once in every lane; they stay. On a GPU captures them as
        graphs, largest first. Waits; what runs goes on afterwards.

        Raises:
            BudgetExceeded: they do not fit.
        """
        by_size = sorted(calls.items(), key=lambda item: item[1].buffers + item[1].activations, reverse=True)
        finished: concurrent.futures.Future[None] = concurrent.futures.Future()

        def prepare() -> None:
            warm, shapes, fixed = dict(self.budget.warm), set(self._warm), dict(self.budget.fixed)
            try:
                self.budget.warm.update(calls)
                self.budget.check()
                graphs = []
                for shape, size in by_size:
                    if shape in self._warm and shape not in self._buckets:
                        continue  # a spare one that is lent
                    bucket = self._bucket(shape)
                    self._warm.add(shape)
                    bucket.is_spare = shape.owner == SPARE
                    self._lanes.in_each(bucket.warm_up)
                    of_one = size.activations / bucket.sampler.capacity
                    graphs += [(of_one * windows, bucket, windows) for windows in bucket.graph_sizes()]
                self._capture(graphs)
                finished.set_result(None)
            except BaseException as error:
                self.budget.warm, self._warm, self.budget.fixed = warm, shapes, fixed
                for bucket in list(self._buckets.values()):
                    self._drop_if_idle(bucket)
                finished.set_exception(error)

        with self.lock:
            if self._closing:
                raise RuntimeError("the engine is closed")
            self._commands.append(prepare)
            self._ensure_thread()
            self.notify()
        finished.result()

    def _capture(self, graphs: list[tuple[float, Bucket, int]]) -> None:
        """Captures calls (bytes, bucket, windows), largest first, while no lane computes."""
        if not graphs:
            return
        with self.lock:
            while self._in_flight:
                self._changed.wait()
        for _, bucket, windows in sorted(graphs, key=lambda graph: graph[0], reverse=True):
            bucket.capture(windows)
        # The pool keeps what the largest graph needs; calls without a graph take theirs beside it.
        self.budget.fixed["graphs"] = max(int(max(size for size, _, _ in graphs)), self.budget.fixed.get("graphs", 0))
        self.budget.check()

    def add_lanes(self, count: int) -> None:
        """More parts at once; before the first call."""
        self._lanes.count += count

    def metrics(self) -> dict[str, Any]:
        """A snapshot, as JSON values."""
        with self.lock:
            counts = self._counts
            planned = self.budget.total([work.need for work in self._running])
            stages = {name: stage.to_dict() for name, stage in counts.stages.items()}
            return {
                "requests": {"queued": len(self._waiting), "running": self._num_running(), **counts.ended},
                "frames": counts.frames,
                "stages": stages,
                "parts_in_flight": self._in_flight,
                "call_shapes": len(self._buckets),
                "graphs": 0 if self._device_calls is None else self._device_calls.captured,
                "memory": {"budget": self.budget.limit, "planned": planned, "resident": resident_bytes()},
            }

    def notify(self) -> None:
        """Something changed that the scheduler's thread should look at."""
        with self.lock:
            self._is_dirty = True
            self._changed.notify_all()

    def close(self, drain: bool = False, timeout: float | None = None) -> None:
        """Takes no more jobs; cancels those there are, or lets them end; ends the threads."""
        until = None if timeout is None else time.monotonic() + timeout
        with self.lock:
            if self._closing != "cancel":
                self._closing = "drain" if drain else "cancel"
            self.notify()
        thread = self._thread
        if thread is None or thread is threading.current_thread():
            return
        thread.join(None if until is None else max(0.0, until - time.monotonic()))
        if thread.is_alive():
            with self.lock:
                self._closing = "cancel"
                self.notify()
            thread.join()

    # ---- the thread --------------------------------------------------------------------------------------------------

    def _work(self) -> None:
        use_threads(self._lanes.num_threads)  # here frames are enlarged for the next stage
        while True:
            try:
                if not self._turn():
                    break
            except BaseException as error:  # a fault of ours: nobody may be left waiting
                logger.exception("the scheduler failed; its requests end with this error")
                self._fail_all(error)
        self._lanes.close()

    def _fail_all(self, error: BaseException) -> None:
        with self.lock:
            jobs = [job for job, _ in self._waiting] + [work.job for work in self._running]
            self._waiting.clear()
            self._running.clear()
        self._buckets.clear()  # calls in the lanes end without effect
        for job in jobs:
            job._finish(error)

    def _turn(self) -> bool:
        """A function of its own: while the thread waits, none of its variables holds a job."""
        with self.lock:
            while not (self._is_dirty or self._computed):
                if not self._changed.wait(self._until_deadline()):
                    break
            self._is_dirty = False
            computed, self._computed = self._computed, []
            if self._closing == "cancel":
                for job in [job for job, _ in self._waiting] + [work.job for work in self._running]:
                    job._finish(Cancelled("the engine was closed"))
            now = time.monotonic()
            for job, _ in self._waiting:
                job._expire(now)
            self._waiting = deque(item for item in self._waiting if not item[0].done)
            for work in self._running:
                work.job._expire(now)
            commands, self._commands = self._commands, deque()
        for command in commands:
            command()
        for call in computed:
            self._complete(call)
        for work in list(self._running):
            self._look_at(work)
        self._admit()
        self._dispatch()
        with self.lock:
            return not (self._closing and not self._running and not self._waiting and self._in_flight == 0)

    def _until_deadline(self) -> float | None:
        jobs = [job for job, _ in self._waiting] + [work.job for work in self._running]
        deadlines = [job._deadline for job in jobs if job._deadline is not None]
        return max(0.0, min(deadlines) - time.monotonic()) if deadlines else None

    # -- requests come and go

    def _num_running(self) -> int:
        return sum(not work.is_follower for work in self._running)

    def _admit(self) -> None:
        while True:
            with self.lock:
                if not self._waiting or self._num_running() >= self.max_running:
                    return
                job, need = self._waiting[0]
                if not self.budget.fits([work.need for work in self._running], need):
                    return
                self._waiting.popleft()
                if job.done:
                    continue
                job._status, job._stage_begun = "running", time.monotonic()
                work = _Work(job, need)
                self._running.append(work)
            try:
                self._start(work)
            except BaseException as error:
                self._end(work, error)

    def _start(self, work: _Work) -> None:
        order = work.job._order
        if order.plan is None:
            self._enter_stage(work, self.pipeline.follow(order.stages[0], order.feed, order.seed))
            return
        with self.lock:
            self._in_flight += 1
        self._lanes.run(functools.partial(self._embed, work))

    def _embed(self, work: _Work) -> None:
        """Embeds a request's prompts and encodes its clip, in a lane: that takes as long as network calls, and this
        thread has others to serve."""
        error = None
        try:
            if not work.job.done:
                work.text = self.pipeline.embed(work.job._order.plan)
                work.initial = self.pipeline.encode(work.job._order.plan, self._lanes.num_threads)
        except BaseException as failed:
            error = failed
        with self.lock:
            self._in_flight -= 1
            self._commands.append(functools.partial(self._begin, work, error))
            self.notify()

    def _begin(self, work: _Work, error: BaseException | None) -> None:
        if work not in self._running or work.job.done:
            return  # it ended meanwhile
        try:
            if error is not None:
                raise error
            work.job._lap("text")
            initial, work.initial = work.initial, None
            self._enter_stage(work, self.pipeline.start(work.job._order.plan, work.text, initial))
        except BaseException as failed:
            self._end(work, failed)

    def _enter_stage(self, work: _Work, run: StageRun) -> None:
        """A stage, and those after it that read its frames as they become final."""
        order, stage = work.job._order, run.stage
        work.owner = self._new_owner() if order.is_fed(stage) else 0
        self._enter(work, run)
        while order.is_streamed(stage):
            stage, work.feed = order.after(stage), Feed()
            follower = work.follower = _Work(
                work.job, Need(0, {}), self._new_owner(), text=work.text, is_follower=True
            )
            with self.lock:
                self._running.append(follower)
            self._enter(follower, self.pipeline.follow(stage, work.feed, order.seed, work.text))
            work = follower

    def _new_owner(self) -> int:
        self._next_owner += 1
        return self._next_owner

    def _enter(self, work: _Work, run: StageRun) -> None:
        """Into the bucket of a stage's calls."""
        stage = run.stage
        shape = call_shape(stage, work.owner)
        bucket = self._bucket(shape)
        if not bucket.runs:
            bucket.service = max(bucket.service, self._served)
        work.run, work.bucket, work.handle = run, bucket, bucket.add(run)
        work.tasks_done, work.taken, work.wanted, work.begun, work.is_paused = 0, 0, 0, time.monotonic(), False

    def _bucket(self, shape: CallShape) -> Bucket:
        spare = self._buckets.get(replace(shape, owner=SPARE)) if shape.owner else None
        if shape not in self._buckets and spare is not None:
            self._move(spare, shape)
        if shape not in self._buckets:
            self._buckets[shape] = self._make_bucket(shape)
        return self._buckets[shape]

    def _make_bucket(self, shape: CallShape) -> Bucket | DecodeBucket:
        backend, config = self.pipeline.backend, self.pipeline.config
        options = dict(fixed_batch=self._fixed_batch, device_calls=self._device_calls)
        if shape.stage == DECODER:
            return DecodeBucket(backend, config.decoder, shape, **options)
        network, capacity = config.networks[shape.stage], self._capacity[shape.guided]
        return Bucket(backend, network, config.text_tokens, shape, capacity=capacity, **options)

    def _move(self, bucket: Bucket, shape: CallShape) -> None:
        del self._buckets[bucket.shape]
        bucket.shape = shape
        self._buckets[shape] = bucket

    def _leave(self, work: _Work) -> None:
        bucket, work.bucket, work.run = work.bucket, None, None
        if bucket is None:
            return
        if work.handle in bucket.runs:
            bucket.remove(work.handle)
        self._drop_if_idle(bucket)

    def _drop_if_idle(self, bucket: Bucket) -> None:
        if bucket.runs or (bucket.call is not None and bucket.call.is_sent) or bucket.shape in self._warm:
            return
        spare = replace(bucket.shape, owner=SPARE)
        if bucket.is_spare and spare in self._warm and self._buckets.get(bucket.shape) is bucket:
            if bucket.call is not None:
                bucket.complete()  # nobody's any more
            self._move(bucket, spare)
        else:
            self._buckets.pop(bucket.shape, None)

    def _end(self, work: _Work, error: BaseException | None = None) -> None:
        self._leave(work)
        with self.lock:
            self._running.remove(work)
        work.job._finish(error)

    def _look_at(self, work: _Work) -> None:
        """What other threads did to a job since the last turn."""
        job = work.job
        if job.done:
            self._end(work)
            return
        if work.bucket is None:
            return
        try:
            self._move_frames(work)
        except BaseException as error:
            self._end(work, error)
            return
        if work.bucket is not None:  # else the job has ended
            self._pause(work)

    def _ask_for(self, work: _Work, wanted: int) -> None:
        """Asks for more of a clip's input: whoever follows the job reads it, or the stage before makes it."""
        if work.run.feed is None:
            return
        with self.lock:
            if work.run.feed is work.job._order.feed:
                work.job._frames_wanted = wanted
                work.job._changed.notify_all()
            elif wanted > work.wanted:
                work.wanted = wanted
                self._is_dirty = True  # the stage before may be at rest

    def _pause(self, work: _Work) -> None:
        """A clip rests while its reader has frames to take, or its callback has not returned."""
        job = work.job
        with self.lock:
            rests = bool(job._steps_ended) or (work.run.stage is job._order.last and not job._has_room())
        if work.follower is not None:  # not further ahead of it than a few windows, unless it waits for more
            is_ahead = work.feed.backlog > 4 * work.run.stage.windows.window and work.feed.has(work.follower.wanted)
            rests = rests or is_ahead
        if rests != work.is_paused:
            work.bucket.sampler.set_paused(work.handle, rests)
            work.is_paused = rests

    # -- calls

    def _dispatch(self) -> None:
        while self._in_flight < self._lanes.count:
            waiting = [b for b in self._buckets.values() if b.runs and (b.call is None or not b.call.is_sent)]
            for bucket in sorted(waiting, key=lambda b: b.service):
                if self._send(bucket):
                    break
            else:
                return

    def _send(self, bucket: Bucket) -> bool:
        """Gives a bucket's next call to the lanes. False: there is none, or its input has not arrived."""
        works = [work for work in self._running if work.bucket is bucket]
        try:
            if bucket.call is None:
                for work in works:
                    wanted = bucket.extend(work.handle)
                    if wanted:
                        self._ask_for(work, wanted)
                        return False
                if bucket.begin() is None:
                    return False
            missing = bucket.frames_missing()
            if missing:
                self._ask_for(works[0], missing)  # the only one: a bucket with a feed is not shared
                return False
            bucket.fill()
        except BaseException as error:
            # An input that ended too early. It has a bucket of its own, so nobody else's task is lost.
            for work in works:
                self._end(work, error)
            if bucket.call is not None:
                bucket.complete()
            self._drop_if_idle(bucket)
            return True
        self._served = max(self._served, bucket.service)
        bucket.call.begun = time.perf_counter()
        parts = self._lanes.put(bucket.call)
        with self.lock:
            self._in_flight += parts
        return True

    def _part_done(self, call: Call, seconds: float) -> None:
        """In a lane."""
        with self.lock:
            call.seconds += seconds
            call.missing -= 1
            self._in_flight -= 1
            if call.missing == 0:
                self._computed.append(call)
            self._changed.notify_all()

    def _complete(self, call: Call) -> None:
        bucket = call.bucket
        if self._buckets.get(bucket.shape) is not bucket:
            return
        bucket.service += call.seconds / max(1, len(bucket.runs))
        with self.lock:
            self._counts.call(bucket.shape.stage, call)
        tasks = call.batch.clips[: call.batch.num_tasks].tolist()
        for handle, error in bucket.complete():
            for work in [w for w in self._running if w.bucket is bucket and w.handle == handle]:
                self._end(work, error)
        for work in [w for w in self._running if w.bucket is bucket]:
            count = tasks.count(work.handle)
            if count:
                try:
                    self._advance(work, count)
                except BaseException as error:
                    self._end(work, error)
        self._drop_if_idle(bucket)

    def _advance(self, work: _Work, tasks: int) -> None:
        """A clip of the call that has just ended."""
        if work.job.done:
            return
        work.tasks_done += tasks
        progress = self._progress(work)
        job = work.job
        with self.lock:
            job.progress = progress
            if job._callback is not None and not job.done:
                job._steps_ended.append(progress)
                job._changed.notify_all()
        self._move_frames(work)

    def _progress(self, work: _Work) -> Progress:
        sampler, handle, stage = work.bucket.sampler, work.handle, work.run.stage
        plan = sampler.plan(handle)
        steps, done, final = stage.num_steps, work.tasks_done, sampler.frames_final(handle)
        if plan.num_windows is None:
            return Progress(stage.name, done, None, final, None, None)
        num_tasks = plan.num_windows * steps
        left = (time.monotonic() - work.begun) / done * (num_tasks - done)
        return Progress(stage.name, done * steps // num_tasks, steps, final, plan.num_frames, left)

    def _move_frames(self, work: _Work) -> None:
        """Final frames to the reader, or to the next stage; and the next stage, or the end."""
        job, sampler, handle = work.job, work.bucket.sampler, work.handle
        order, stage = job._order, work.run.stage
        is_last = stage is order.last
        if not is_last or job._has_room():
            final = sampler.take_final(handle)
            if final is not None:
                start, frames = final
                work.taken += len(frames)
                if order.plan is not None and stage is order.stages[0]:
                    frames = order.plan.task.settle(start, frames)
                if work.follower is not None:
                    for frame in frames:
                        work.feed.put(frame)
                elif not is_last:
                    work.low.append(frames)
                else:
                    job._deliver(frames if order.plan is None else order.plan.delivered(start, frames))
        if not sampler.is_finished(handle) or work.taken < sampler.frames_final(handle):
            return
        with self.lock:
            if job._steps_ended:
                return  # the callback of the last step may still end the job
        self._leave(work)
        job._lap(stage.name)
        with self.lock:
            self._counts.stage(stage.name, time.monotonic() - work.begun)
        if is_last:
            self._end(work)
        elif work.follower is not None:
            work.feed.end()
            work.follower.need, work.follower.is_follower = work.need, False
            with self.lock:
                self._running.remove(work)
        else:
            frames, work.low = np.concatenate(work.low), []
            if stage is order.stages[0] and order.plan is not None:
                frames = order.plan.handed_on(frames)
            self._enter_stage(work, self.pipeline.follow(order.after(stage), frames, order.seed, work.text))
