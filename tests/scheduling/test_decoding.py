"""The decoder's calls by themselves: which frames stand in a call, whose they are, and what becomes of its result."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from support.testing import write_random_model
from support.toy import latent_model
from support.whole_clip import decoded

from pylumiere.backends.choice import choose
from pylumiere.backends.torch import TorchBackend
from pylumiere.checkpoints.native import load_checkpoint
from pylumiere.diffusion.plan import DecoderPlan
from pylumiere.diffusion.stages import Feed, StageRun
from pylumiere.diffusion.windows import FrameBuffer, NonFiniteOutput, WindowPlan
from pylumiere.errors import InvalidRequest
from pylumiere.scheduling.batching import call_shape
from pylumiere.scheduling.decoding import DecodeBucket, GroupSampler

CONFIG = latent_model()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return load_checkpoint(write_random_model(tmp_path_factory.mktemp("model"), CONFIG))


@pytest.fixture(scope="module")
def backend(checkpoint):
    return TorchBackend(checkpoint, choose("torch", "cpu", "fp32"))


def plan_of(num_frames, group=3):
    return DecoderPlan(CONFIG.decoder, WindowPlan(num_frames, min(group, num_frames), 0), 12, 8)


def bucket_of(backend, plan, fixed_batch=False):
    return DecodeBucket(backend, CONFIG.decoder, call_shape(plan), fixed_batch=fixed_batch)


def latents(num_frames, seed=0):
    return np.random.default_rng(seed).normal(size=(num_frames, 6, 4, 4)).astype(np.float32)


def compute(bucket, by_frame=True):
    """The current call, a frame at a time or whole; what `complete` gives."""
    bucket.fill()
    rows = bucket.call.rows
    for first in range(rows) if by_frame else (0,):
        bucket.compute(slice(first, first + 1 if by_frame else rows), 1)
    return bucket.complete()


def taken(bucket, handle):
    start, frames = bucket.sampler.take_final(handle)
    return start, len(frames)


@pytest.mark.parametrize("fixed_batch", [False, True])
@pytest.mark.parametrize(("num_frames", "group"), [(8, 3), (9, 3), (1, 3), (5, 5), (4, 1)])
def test_groups_follow_each_other_without_a_gap(backend, checkpoint, num_frames, group, fixed_batch):
    plan, given = plan_of(num_frames, group), latents(num_frames)
    bucket = bucket_of(backend, plan, fixed_batch)
    handle = bucket.add(StageRun(plan, 1, source=FrameBuffer(given)))
    pieces, sizes = [], []
    while not bucket.sampler.is_finished(handle):
        assert bucket.extend(handle) == 0 and bucket.frames_missing() == 0
        call = bucket.begin()
        sizes.append((call.batch.num_tasks, call.batch.count, call.rows))
        assert compute(bucket, by_frame=not fixed_batch) == []
        pieces.append(bucket.sampler.take_final(handle))
    assert bucket.begin() is None
    counts = [min(group, num_frames - first) for first in range(0, num_frames, group)]
    assert sizes == [(1, count, min(group, num_frames) if fixed_batch else count) for count in counts]
    assert [(start, len(frames)) for start, frames in pieces] == list(
        zip(range(0, num_frames, group), counts, strict=True)
    )
    result = np.concatenate([frames for _, frames in pieces])
    assert np.abs(result - decoded(checkpoint.weights["decoder"]["mix"], given, 2)).max() < 1e-6
    assert bucket.sampler.frames_final(handle) == num_frames and bucket.sampler.take_final(handle) is None


def test_frames_that_nobody_took_leave_together_and_in_order(backend):
    plan = plan_of(8)
    bucket = bucket_of(backend, plan)
    handle = bucket.add(StageRun(plan, 1, source=FrameBuffer(latents(8))))
    for _ in range(2):
        bucket.begin()
        compute(bucket)
    start, frames = bucket.sampler.take_final(handle)
    again = bucket_of(backend, plan)
    other = again.add(StageRun(plan, 1, source=FrameBuffer(latents(8))))
    pieces = []
    for _ in range(2):
        again.begin()
        compute(again)
        pieces.append(again.sampler.take_final(other)[1])
    assert start == 0 and np.array_equal(frames, np.concatenate(pieces))


def test_latents_are_let_go_of_when_they_are_decoded(backend):
    plan, source = plan_of(8), FrameBuffer(iter(latents(8)))
    bucket = bucket_of(backend, plan)
    bucket.add(StageRun(plan, 1, source=source))
    held = []
    for _ in range(3):
        bucket.begin()
        compute(bucket)
        held.append(len(source))
    assert held == [0, 0, 0], "read no further than the group, and kept no longer"


def test_clips_take_turns_and_a_paused_one_rests():
    sampler, plan = GroupSampler(), WindowPlan(6, 2, 0)
    one, two = sampler.add(plan), sampler.add(plan)
    assert sampler.hand_out() == (one, range(0, 2)) and sampler.hand_out() == (two, range(0, 2))
    sampler.set_paused(one, True)
    assert sampler.hand_out() == (two, range(2, 4)) and sampler.hand_out() == (two, range(4, 6))
    assert sampler.hand_out() is None and sampler.next_frames(two) is None
    sampler.set_paused(one, False)
    assert sampler.hand_out() == (one, range(2, 4))


def test_a_clip_that_is_removed_while_it_is_decoded_is_forgotten(backend):
    plan = plan_of(8)
    bucket = bucket_of(backend, plan)
    gone, stays = (bucket.add(StageRun(plan, seed, source=FrameBuffer(latents(8, seed)))) for seed in (1, 2))
    bucket.begin()
    bucket.fill()
    bucket.remove(gone)
    bucket.compute(slice(0, 3), 1)
    assert bucket.complete() == [] and bucket.call is None and list(bucket.runs) == [stays]
    bucket.begin()
    bucket.remove(stays)
    assert compute(bucket) == [] and not bucket.runs, "removed before it was filled"


def test_frames_that_are_not_there_yet_are_asked_for(backend):
    plan, feed, given = plan_of(8), Feed(), latents(8)
    bucket = bucket_of(backend, plan)
    handle = bucket.add(StageRun(plan, 1, source=FrameBuffer(feed), feed=feed))
    for first, end in ((0, 3), (3, 6), (6, 8)):
        for frame in given[first:end]:
            assert bucket.extend(handle) == end
            feed.put(frame)
        assert bucket.extend(handle) == 0
        bucket.begin()
        compute(bucket)
    assert bucket.extend(handle) == 0 and bucket.sampler.is_finished(handle)


def test_an_input_that_ends_too_early_is_named(backend):
    plan, feed = plan_of(8), Feed()
    bucket = bucket_of(backend, plan)
    handle = bucket.add(StageRun(plan, 1, source=FrameBuffer(feed), feed=feed))
    feed.put(latents(1)[0])
    feed.end()
    assert bucket.extend(handle) == 0
    bucket.begin()
    with pytest.raises(InvalidRequest, match="the input ended after 1 of 8 frames"):
        bucket.fill()


def test_what_is_not_finite_is_named_and_takes_only_its_clip(backend):
    plan, wrong = plan_of(8), latents(8)
    wrong[4, 2, 1, 3] = np.nan
    bucket = bucket_of(backend, plan)
    handle, other = (bucket.add(StageRun(plan, 1, source=FrameBuffer(given))) for given in (wrong, latents(8)))
    failed = []
    for _ in range(4):
        bucket.begin()
        failed += compute(bucket)
    ((clip, error),) = failed
    assert clip == handle and isinstance(error, NonFiniteOutput) and error.window == 1
    assert str(error) == "the decoder gave NaN or infinity in frames 3 to 5"
    assert list(bucket.runs) == [other] and taken(bucket, other) == (0, 6)


def test_an_error_in_one_frame_is_the_clips(backend):
    plan = plan_of(8)
    bucket = bucket_of(backend, plan)
    handle = bucket.add(StageRun(plan, 1, source=FrameBuffer(latents(8))))
    call = bucket.begin()
    bucket.fill()
    call.errors[1] = MemoryError("no room")
    ((clip, error),) = bucket.complete()
    assert clip == handle and isinstance(error, MemoryError) and not bucket.runs


def test_a_warm_up_decodes_in_the_shape_of_a_part(backend, monkeypatch):
    shapes, decode = [], backend.decode
    monkeypatch.setattr(
        backend, "decode", lambda x, **options: (shapes.append(tuple(x.shape)), decode(x, **options))[1]
    )
    bucket = bucket_of(backend, plan_of(8))
    bucket.warm_up(1, 1)
    bucket.warm_up(1, None)
    assert shapes == [(1, 1, 6, 4, 4), (1, 3, 6, 4, 4)] and bucket.graph_sizes() == []


def test_large_frames_are_cut_into_tiles(backend, checkpoint, monkeypatch):
    shapes, decode = [], backend.decode
    monkeypatch.setattr(backend, "decode", lambda x, **options: (shapes.append(x.shape[2:4]), decode(x, **options))[1])
    config = dataclasses.replace(CONFIG.decoder, tile=8, tile_overlap=2)
    plan = DecoderPlan(config, WindowPlan(1, 1, 0), 2 * 20, 2 * 8)
    bucket = DecodeBucket(backend, config, call_shape(plan), fixed_batch=False)
    given = np.random.default_rng(0).normal(size=(1, 20, 8, 4)).astype(np.float32)
    handle = bucket.add(StageRun(plan, 1, source=FrameBuffer(given)))
    bucket.begin()
    assert compute(bucket) == []
    assert shapes == [(8, 8)] * 3, "at rows 0, 6 and 12"
    result = bucket.sampler.take_final(handle)[1]
    assert np.abs(result - decoded(checkpoint.weights["decoder"]["mix"], given, 2)).max() < 1e-6
