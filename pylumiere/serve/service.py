"""What the routes do, without HTTP: a checked request and its files become a job on record, and a job an answer."""

from __future__ import annotations

import contextlib
import logging
import secrets
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from math import ceil
from typing import Any

from pylumiere.config import ModelConfig
from pylumiere.diffusion.plan import MAX_ENLARGEMENT, plan_request, size_step
from pylumiere.errors import BudgetExceeded, InvalidRequest
from pylumiere.media.inputs import parse_keyframes
from pylumiere.media.video import Limits as VideoLimits
from pylumiere.request import GenerationRequest
from pylumiere.serve import media, schema
from pylumiere.serve.gate import ANYONE
from pylumiere.serve.hub import Hub
from pylumiere.serve.jobs import Runner, Worker, check_style
from pylumiere.serve.keys import Key, KeyRing
from pylumiere.serve.metrics import Metrics
from pylumiere.serve.schema import (
    KEYFRAME,
    VARIANTS,
    ApiError,
    CreateVideo,
    DeletedVideo,
    EditVideo,
    ExtendVideo,
    Files,
    ModelObject,
    Options,
    RemixVideo,
    Sampling,
    VideoObject,
)
from pylumiere.serve.store import Job, QueueFull, Store

logger = logging.getLogger("pylumiere")

MODEL_LENGTHS = 8  # the longest clip over the model's own, unless `Limits.frames` says otherwise


@dataclass(frozen=True)
class Limits:
    """What a service takes.

    Attributes:
        queue: jobs that wait; one more is answered with 429.
        jobs_per_owner: waiting and running, where there are no keys; a key has its own.
        body_bytes: of one request.
        image_pixels: of one picture, or frame of a clip, that is given.
        decoded_bytes: of one given clip; a byte for each colour of a pixel.
        frames: of one clip; None is `MODEL_LENGTHS` times the model's own length.
        deadline: seconds in which a job must be done whose request names none; None is no limit.
    """

    queue: int = 256
    jobs_per_owner: int = 1024
    body_bytes: int = 12 * 2**20
    image_pixels: int = 16 * 2**20
    decoded_bytes: int = 256 * 2**20
    frames: int | None = None
    deadline: float | None = None

    @property
    def files(self) -> VideoLimits:
        """Of each file of a request."""
        return VideoLimits(max_pixels=self.image_pixels, max_bytes=self.decoded_bytes)


@dataclass
class Service:
    """Everything behind the routes.

    Attributes:
        names: of the model; the first is reported, all are taken.
        styles: of the model.
        is_ready: false with a reason while jobs would only wait.
    """

    config: ModelConfig
    store: Store
    keys: KeyRing | None = None
    limits: Limits = Limits()
    concurrency: int = 1
    names: tuple[str, ...] = ()
    styles: tuple[str, ...] = ()
    hub: Hub = field(default_factory=Hub)
    metrics: Metrics = field(default_factory=Metrics)

    def __post_init__(self):
        self.names = self.names or (self.config.name,)
        self.most_frames = self.limits.frames or MODEL_LENGTHS * self.config.first.network.num_frames
        self.created = int(time.time())
        self.runner = Runner(
            self.store, self.hub, self.metrics, stages=list(self.config.networks), concurrency=self.concurrency,
            limits=self.limits.files,
        )  # fmt: skip
        self._decoding = threading.BoundedSemaphore(2)  # pictures are large while they are decoded
        for status in ("queued", "in_progress", "completed", "failed"):
            read = lambda status=status: self.store.counts()[status]  # noqa: E731
            self.metrics.gauge(f"pylumiere_store_{status}_jobs", f"Jobs on record that are {status}.", read)
        self.metrics.gauge("pylumiere_store_bytes", "Bytes of results on the disk.", self.store.result_bytes)
        self.metrics.gauge("pylumiere_listeners", "Open event streams.", lambda: self.hub.num_listeners)

    def start(self, worker: Worker) -> None:
        """Settles what an earlier process left, then runs jobs on the worker."""
        settled = self.store.recover()
        self.store.sweep()
        if any(settled.values()):
            logger.info("found jobs of an earlier process: %s", settled)
        self.runner.set_worker(worker)

    def close(self) -> None:
        self.hub.close()
        self.runner.close()
        self.store.close()

    # ---- what the routes do ------------------------------------------------------------------------------------------

    def create(self, key: Key | None, create: CreateVideo, files: Files, token: str | None) -> VideoObject:
        inputs, rate = self._inputs(create, files), None
        if "input_reference" in inputs:
            reference = inputs.pop("input_reference")
            if media.is_picture(reference):
                inputs["image"] = reference
            else:
                inputs["video"], rate = reference, media.clip_rate(reference, "input_reference", self.limits.files)
        with _refusals():
            fields = schema.generation_fields(create, rate or self.config.fps, self.most_frames)
        return self._accept(key, create, fields, inputs, token)

    def edit(self, key: Key | None, edit: EditVideo, files: Files, token: str | None) -> VideoObject:
        """Video to video, inpainting or outpainting of a file, or of a completed video in its own size."""
        inputs, (clip, rate, source) = self._inputs(edit, files), self._clip(key, edit, files)
        with _refusals("video"):
            fields = schema.generation_fields(edit, rate, self.most_frames)
        if edit.mask is None and "mask" not in files and edit.expand is None:
            fields.setdefault("strength", schema.EDIT_STRENGTH)
        return self._accept(key, edit, _sized(fields, source), {"video": clip, **inputs}, token, source, "video")

    def extend(self, key: Key | None, extend: ExtendVideo, files: Files, token: str | None) -> VideoObject:
        """The clip, and after it frames that the networks make with all of it in view."""
        clip, rate, source = self._clip(key, extend, files)
        with _refusals("video"):
            fields = schema.generation_fields(extend, rate, self.most_frames)
            fields["extend_by"] = schema.frames_for(extend.seconds, rate, self.most_frames - 1)
        return self._accept(key, extend, _sized(fields, source), {"video": clip}, token, source, "video")

    def remix(self, key: Key | None, remix: RemixVideo, id: str, token: str | None) -> VideoObject:
        source = self._completed(key, id)
        try:
            inputs = self.store.inputs(source)
        except FileNotFoundError:  # deleted meanwhile
            raise _no_video(id) from None
        with _refusals():
            GenerationRequest(prompt=remix.prompt)
        fields = {**source.request, "prompt": remix.prompt}
        return self._add(key, fields, source.plan, inputs, self.limits.deadline, token, source)

    def _inputs(self, options: Options, files: Files) -> dict[str, bytes]:
        """A request's files by the store's names; `input_reference` still has to be told a picture or a clip."""
        inputs = {name: data for name, data in files.items() if name in ("input_reference", "mask")}
        texts = {"mask": options.mask}
        frames = {match[1]: data for name, data in files.items() if (match := KEYFRAME.fullmatch(name))}
        if isinstance(options, CreateVideo):
            texts["input_reference"] = options.input_reference and options.input_reference.image_url
            for frame, url in (options.keyframes or {}).items():
                if not KEYFRAME.fullmatch(f"keyframes[{frame}]"):
                    text = f"keyframes: {frame[:60]!r} is no frame; give numbers, first or last"
                    raise ApiError(400, text, code="invalid_value", param="keyframes")
                if frame in frames:
                    raise ApiError(400, f"keyframes: frame {frame[:60]} is given twice", code="invalid_form")
                frames[frame] = schema.data_url_bytes(url, "keyframes")
        for name, url in texts.items():
            if url is not None:
                inputs[name] = schema.data_url_bytes(url, name)
        with _refusals():
            for index, frame in parse_keyframes(f"{frame}:{frame}" for frame in frames).items():
                inputs[f"keyframe_{index}"] = frames[frame]
        return inputs

    def _clip(
        self, key: Key | None, request: EditVideo | ExtendVideo, files: Files
    ) -> tuple[bytes, float, Job | None]:
        """The clip of an edit or extension, its rate, and the job that made it."""
        if request.video is None:
            if "video" not in files:
                raise ApiError(400, "video is missing", code="missing_field", param="video")
            clip, source = files["video"], None
            if media.is_picture(clip):
                raise ApiError(400, "video is a picture; give a clip", code="invalid_video", param="video")
        else:
            source = self._completed(key, request.video.id)
            path = self.store.lease(source.id, owner(key), VARIANTS["video"][0])
            if path is None:
                raise _no_video(source.id)
            try:
                clip = path.read_bytes()
            finally:
                self.store.release(source.id)
        return clip, media.clip_rate(clip, "video", self.limits.files) or self.config.fps, source

    def _completed(self, key: Key | None, id: str) -> Job:
        job = self.job(key, id)
        if job.status != "completed":
            raise ApiError(400, f"{id} is {job.status}; only completed videos can be used", code="video_not_ready")
        return job

    def _accept(
        self, key: Key | None, options: Sampling, fields: dict[str, Any], inputs: dict[str, bytes], token: str | None,
        source: Job | None = None, given: str = "input_reference",
    ) -> VideoObject:  # fmt: skip
        if options.model is not None and options.model not in self.names:
            allowed = ", ".join(self.names)
            raise ApiError(
                400, f"model={options.model!r}: this server has {allowed}", code="model_not_found", param="model"
            )
        fields.setdefault("seed", secrets.randbits(32))
        with self._decoding, _refusals(given):
            request = media.generation_request(
                fields, inputs, self.limits.files, most_frames=self.most_frames, given=given
            )
            plan = self._plan(request)
        if "video" in inputs:
            fields["num_frames"] = plan["num_frames"]  # what is decoded again stops there
        if "extend_by" in fields:
            plan["application"] = "extension"
        timeout = self.limits.deadline if options.timeout is None else options.timeout
        return self._add(key, fields, plan, inputs, timeout, token, source)

    def _plan(self, request: GenerationRequest) -> dict[str, Any]:
        check_style(request, self.styles)
        plan = plan_request(request, self.config)
        if plan.height % 2 or plan.width % 2:
            raise InvalidRequest(f"size='{plan.width}x{plan.height}': mp4 takes even sizes")
        if self.runner.worker is not None:
            self.runner.worker.check(request)
        return {
            "num_frames": plan.num_frames, "fps": plan.fps, "height": plan.height, "width": plan.width,
            "seed": plan.seed, "sampler": plan.sampler, "num_inference_steps": plan.num_inference_steps,
            "guidance_scale": plan.guidance_scale, "application": plan.task.name,
        }  # fmt: skip

    def _add(
        self, key: Key | None, fields: dict[str, Any], plan: dict[str, Any], inputs: dict[str, bytes],
        timeout: float | None, token: str | None, source: Job | None,
    ) -> VideoObject:  # fmt: skip
        try:
            job = self.store.add(
                owner(key), self.names[0], fields, plan, inputs=inputs, timeout=timeout, token=token,
                remixed_from=None if source is None else source.id, queue_limit=self.limits.queue,
                owner_limit=self.limits.jobs_per_owner if key is None else key.jobs,
            )  # fmt: skip
        except QueueFull as error:
            wait = self.store.counts()["queued"] * self.runner.seconds_per_job / self.runner.concurrency
            raise ApiError(429, str(error), code="queue_full", retry_after=min(60, max(1, ceil(wait / 4)))) from None
        self.runner.notify()
        return self.video(job)

    def job(self, key: Key | None, id: str) -> Job:
        job = self.store.get(id, owner(key))
        if job is None:
            raise _no_video(id)
        return job

    def delete(self, key: Key | None, id: str) -> DeletedVideo:
        job = self.store.delete(id, owner(key))
        if job is None:
            raise _no_video(id)
        self.runner.cancel(id)
        self.hub.publish(id, "status")
        return DeletedVideo(id=id)

    def video(self, job: Job) -> VideoObject:
        plan, expires_at = job.plan, self.store.expires_at(job)
        error = None if job.status != "failed" else schema.VideoError(code=job.error_code, message=job.error_message)
        progress = {"completed": 100, "in_progress": self.runner.percent(job.id)}.get(job.status, 0)
        return VideoObject(
            id=job.id, model=job.model, status=job.status, progress=progress, created_at=int(job.created_at),
            completed_at=int(job.ended_at) if job.status == "completed" else None,
            expires_at=None if expires_at is None else int(expires_at), prompt=job.request["prompt"],
            remixed_from_video_id=job.remixed_from, seconds=f"{plan['num_frames'] / plan['fps']:g}",
            size=f"{plan['width']}x{plan['height']}", error=error, num_frames=plan["num_frames"], fps=plan["fps"],
            seed=plan["seed"], num_inference_steps=plan["num_inference_steps"], guidance_scale=plan["guidance_scale"],
            sampler=plan["sampler"], application=plan.get("application", "text to video"), **{
                name: job.request.get(name, default) for name, default in _REQUESTED.items()
            },
        )  # fmt: skip

    def model(self, name: str) -> ModelObject:
        height, width = self.config.size
        network, sampling = self.config.first.network, self.config.first.sampling
        return ModelObject(
            id=name, created=self.created,
            defaults={
                "num_frames": network.num_frames, "fps": self.config.fps,
                "seconds": network.num_frames / self.config.fps, "size": f"{width}x{height}",
                "sampler": sampling.sampler, "num_inference_steps": sampling.num_inference_steps,
                "guidance_scale": sampling.guidance_scale,
            },
            styles=list(self.styles),
            limits={
                "num_frames": {"most": self.most_frames, "step": 1},
                "size": {"step": size_step(self.config), "width": MAX_ENLARGEMENT * width,
                         "height": MAX_ENLARGEMENT * height},
            },
        )  # fmt: skip


# Of a video object: fields of the request that it repeats.
_REQUESTED = {
    "negative_prompt": "", "expand": None, "fit": "crop", "strength": 1.0, "style": None, "style_strength": 1.0,
    "loop": False,
}  # fmt: skip


@contextlib.contextmanager
def _refusals(given: str = "input_reference") -> Iterator[None]:
    """The engine's refusals as answers."""
    try:
        yield
    except BudgetExceeded as error:
        raise schema.invalid(error, "budget_exceeded", given) from None
    except InvalidRequest as error:
        raise schema.invalid(error, given=given) from None


def _sized(fields: dict[str, Any], source: Job | None) -> dict[str, Any]:
    """A clip that this server made is worked on in its own size."""
    if source is not None and "width" not in fields:
        fields |= {side: source.plan[side] for side in ("width", "height")}
    return fields


def owner(key: Key | None) -> str:
    return ANYONE if key is None else key.name


def _no_video(id: str) -> ApiError:
    return ApiError(404, f"there is no video {id[:60]!r}", code="video_not_found", param="video_id")
