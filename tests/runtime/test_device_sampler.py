"""The sampler on a device gives what the one on the CPU gives, batch by batch, whatever happens to its clips.

Both are driven side by side over drawn clips. Rings begin as NaN. Here the device is the CPU, and what it does stands
in a queue until somebody waits, as on a GPU; the tests marked `gpu` do the same on one.
"""

from __future__ import annotations

import importlib.util
import math
import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pylumiere.kernels import denoise_step

from pylumiere.backends.graphs import HostCalls
from pylumiere.diffusion.device_sampler import DeviceSampler
from pylumiere.diffusion.windows import BatchSampler, NonFiniteOutput, WindowPlan, memory_bytes

_spec = importlib.util.spec_from_file_location("exact", Path(__file__).with_name("test_exact.py"))
exact = importlib.util.module_from_spec(_spec)
sys.modules["exact"] = exact  # its dataclass looks itself up
_spec.loader.exec_module(exact)

SHAPE = exact.SHAPE
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


class LateCalls(HostCalls):
    """A CPU that does its work as late as a GPU may: when somebody waits. Only `fetch` does not wait for the rest."""

    def __init__(self):
        self.queue = []

    def enqueue(self, function):
        self.queue.append(function)

    def run(self, compute, result, target):
        while self.queue:
            self.queue.pop(0)()
        super().run(compute, result, target)


def make_calls(device):
    if device == "cpu":
        return LateCalls()
    from pylumiere.backends.graphs import DeviceCalls

    return DeviceCalls(torch.device(device))


def read(calls, sampler, batch):
    """The call's input, when it is there."""
    kept = {}
    calls.run(lambda: kept.update(x=batch.x.cpu().numpy().copy()), sampler._flags, sampler._flags_host)
    return kept["x"]


def bits(array):
    return np.ascontiguousarray(array).view(np.int32)


class Pair:
    """Both samplers, given the same calls; what they return is compared."""

    def __init__(self, device, tolerance=0.0, **options):
        self.calls, self.device, self.tolerance = make_calls(device), device, tolerance
        self.host = BatchSampler(**options, num_threads=1)
        self.sampler = DeviceSampler(**options, device=device, calls=self.calls)
        self.guided = options["guided"]

    def same(self, have, want):
        if self.tolerance:
            np.testing.assert_allclose(have, want, rtol=0, atol=self.tolerance)
        else:
            assert np.array_equal(bits(have), bits(want))

    def both(self, name, *args, **kw):
        have, want = getattr(self.sampler, name)(*args, **kw), getattr(self.host, name)(*args, **kw)
        assert have == want, name
        return have

    def add(self, *args, **kw):
        handle = self.both("add_clip", *args, **kw)
        state = self.sampler._clips[handle]
        with self.calls.computing():
            for ring in (state.ring, state.x0, state.kept):
                if ring is not None:
                    ring.fill_(math.nan)
        assert self.sampler.clip_bytes(handle) == self.host.clip_bytes(handle)
        return handle

    def next_batch(self):
        have, want = self.sampler.next_batch(), self.host.next_batch()
        assert (have is None) == (want is None)
        if have is None:
            return None
        assert have.num_tasks == want.num_tasks
        for name in ("timesteps", "clips", "windows", "steps", "frames"):
            assert np.array_equal(getattr(have, name), getattr(want, name)), name
        if not self.tolerance:
            self.same(read(self.calls, self.sampler, have), want.x)
        return want

    def output(self, batch):
        """Of the host's input for both, and with NaN wherever nobody may look."""
        out = exact.denoise_rows(batch.x, batch.steps, batch.windows, self.guided)
        for row, clip in enumerate(batch.clips.tolist()):
            if clip in self.host._clips:
                plan = self.host.plan(clip)
                out[:, row, : plan.halo] = out[:, row, plan.halo + plan.window :] = np.nan
                if plan.num_frames is not None and not plan.loop:
                    out[:, row, plan.halo + plan.num_frames :] = np.nan
        return out

    def complete(self, out):
        on_device = torch.from_numpy(out).to(self.device)
        outcomes = []
        for sampler, output in ((self.sampler, on_device), (self.host, out)):
            try:
                sampler.complete(output)
                outcomes.append(None)
            except NonFiniteOutput as error:
                outcomes.append((str(error), error.clip, error.stage, error.step, error.window))
        assert outcomes[0] == outcomes[1]
        return outcomes[0]

    def take(self, handle):
        for name in ("frames_final", "is_finished"):
            self.both(name, handle)
        have, want = self.sampler.take_final(handle), self.host.take_final(handle)
        assert (have is None) == (want is None)
        if have is not None:
            assert have[0] == want[0]
            self.same(have[1], want[1])
        return want


def draw_cases(rng, count, allow_rescale=False):
    first = exact.random_case(rng)
    cases = [first]
    while len(cases) < count:
        case = exact.random_case(rng)
        case |= {key: first[key] for key in ("window", "halo", "multiple", "guidance")}
        case["overlap"] = rng.randint(0, case["window"] - 1)
        cases.append(case)
    for case in cases:
        if rng.random() < 0.2:
            case["coef"][0, 4] = 0.3  # there is no x0 before the first step
        if not allow_rescale or case["guidance"] == 1.0:
            case.pop("rescale", None)
    return cases


def drive(rng, device, tolerance=0.0, allow_rescale=False):
    """Clips join and go, rest and are taken late; lengths become known late; outputs are sometimes NaN."""
    cases = draw_cases(rng, rng.randint(1, 4), allow_rescale)
    pair = Pair(
        device, tolerance, frame_shape=SHAPE, call_frames=exact.plan_of(cases[0], 1).call_frames,
        guided=cases[0]["guidance"] != 1.0, capacity=rng.choice([1, 2, 3, 5]), fixed_batch=rng.random() < 0.5,
    )  # fmt: skip
    clips, resting, arriving = {}, set(), {}

    def remove(handle):
        pair.both("remove_clip", handle)
        clips.pop(handle)
        resting.discard(handle)
        arriving.pop(handle, None)

    def add():
        case = cases.pop()
        unknown = not case["loop"] and rng.random() < 0.3
        initial = None
        if rng.random() < 0.3:
            values = np.random.default_rng(rng.getrandbits(32)).standard_normal((case["num_frames"], *SHAPE))
            values = values.astype(np.float32)
            initial = (lambda frames, values=values: values[frames]) if unknown else values
        plan = exact.plan_of(case, None if unknown else case["num_frames"])
        handle = pair.add(plan, exact.table_of(case), **exact.settings_of(case), initial=initial)
        clips[handle] = case
        if unknown:
            arriving[handle] = 0

    def extend():
        for handle in list(arriving):
            wanted, length = pair.both("frames_wanted", handle), clips[handle]["num_frames"]
            if wanted:
                arriving[handle] = min(length, max(arriving[handle], wanted) + rng.randint(0, 2))
                ended = arriving[handle] == length
                pair.both("extend", handle, arriving[handle], ended)
                if ended:
                    del arriving[handle]
            pair.both("first_needed", handle)

    def rest(handle):
        """Rests, or goes on."""
        pair.both("set_paused", handle, handle not in resting)
        resting.symmetric_difference_update([handle])

    while cases or clips:
        if cases and (not clips or rng.random() < 0.3):
            add()
        extend()
        batch = pair.next_batch()
        if batch is not None:
            out = pair.output(batch)
            if rng.random() < 0.05:
                row = rng.randrange(batch.num_tasks)
                plan = pair.host.plan(int(batch.clips[row]))
                out[rng.randrange(len(out)), row, plan.halo, 0, 0, 1] = rng.choice([math.nan, math.inf, -math.inf])
            for event in (add, lambda: remove(rng.choice(list(clips))), lambda: rest(rng.choice(list(clips)))):
                if rng.random() < 0.05 and (cases if event is add else clips):
                    event()
            if clips and rng.random() < 0.3:
                pair.take(rng.choice(list(clips)))  # of the calls before
            while (failed := pair.complete(out)) is not None:
                remove(failed[1])
        elif resting:
            rest(resting.copy().pop())
        for handle in list(clips):
            if batch is None or rng.random() < 0.5 or pair.both("is_finished", handle):
                pair.take(handle)
            if pair.both("is_finished", handle) and handle not in arriving:
                remove(handle)


@settings(max_examples=150, deadline=None)
@given(st.randoms(use_true_random=False))
def test_bits_of_the_cpu_sampler(rng):
    drive(rng, "cpu")


@pytest.mark.parametrize("group", range(8))
def test_bits_of_the_cpu_sampler_over_more_clips(group):
    rng = random.Random(group)
    for _ in range(max(1, exact.CASES // 40)):
        drive(rng, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("group", range(8))
def test_bits_of_the_cpu_sampler_on_a_gpu(group):
    rng = random.Random(group)
    for _ in range(10):
        drive(rng, "cuda")


@pytest.mark.parametrize("device", DEVICES)
def test_with_guidance_rescale_equal_to_rounding(device):
    """Sums over a frame are added in another order, in double: the gain may differ in its last bit."""
    rng = random.Random(11)
    for _ in range(30):
        drive(rng, device, tolerance=2e-5, allow_rescale=True)


@pytest.mark.parametrize("device", DEVICES)
def test_the_kernel_itself_gives_these_bits(device, monkeypatch):
    """On a CPU in Triton's interpreter, which is slow: a few short clips."""
    if device == "cpu":
        from pylumiere.diffusion import device_sampler

        monkeypatch.setattr(device_sampler, "denoise_step_", denoise_step.launch_)
    rng = random.Random(3)
    for _ in range(3):
        drive(rng, device)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_outputs_of_sixteen_bits(dtype):
    case = exact.random_case(random.Random(0)) | {"num_frames": 20, "window": 8, "overlap": 3, "halo": 0, "loop": False}
    case |= {"guidance": 2.5}
    case.pop("rescale", None)
    plan = exact.plan_of(case, 20)
    options = dict(frame_shape=SHAPE, call_frames=plan.call_frames, guided=True, capacity=2)
    taken = []
    for sampler in (BatchSampler(**options), DeviceSampler(**options, out_dtype=dtype)):
        handle = sampler.add_clip(plan, exact.table_of(case), **exact.settings_of(case))
        frames = []
        while not sampler.is_finished(handle):
            batch = sampler.next_batch()
            out = exact.denoise_rows(np.asarray(batch.x), batch.steps, batch.windows, True)
            sampler.complete(torch.from_numpy(out).to(dtype))
            if final := sampler.take_final(handle):
                frames.append(final[1])
        taken.append(np.concatenate(frames))
        size = memory_bytes(plan, frame_shape=SHAPE, steps=len(case["coef"]), capacity=2, num_outputs=2,
                            multistep=bool(np.any(case["coef"][:, 4])), output_bytes=2)  # fmt: skip
        assert sampler.clip_bytes(handle) == size
    assert np.array_equal(bits(taken[0]), bits(taken[1]))


# ---- what fails ------------------------------------------------------------------------------------------------------


def small(capacity=2, **options):
    table = exact.Table(np.arange(3, dtype=np.float32), np.tile([0.5, 0.5, 0.5, 0.5, 0.0, 0.1], (3, 1)), 1.0, 0.0)
    sampler = DeviceSampler(frame_shape=SHAPE, call_frames=8, capacity=capacity, calls=LateCalls(), **options)
    return sampler, WindowPlan(20, 8, 2), table


@pytest.mark.parametrize("removed_first", [False, True])
def test_nothing_of_a_batch_with_a_nan_enters_any_clip(removed_first):
    """Not even of the clip beside it; that one's step is made up for, once the faulty clip has gone."""
    sampler, plan, table = small()
    good, faulty = (sampler.add_clip(plan, table, seed=seed) for seed in (1, 2))
    batch = sampler.next_batch()
    assert sorted(batch.clips.tolist()) == [good, faulty]
    out = torch.ones(1, 2, 8, *SHAPE)
    out[0, batch.clips.tolist().index(faulty), 3, 0, 0, 0] = math.nan
    sampler.run(lambda: None, out)
    before = sampler._clips[good].ring.clone(), sampler._clips[good].kept.clone()
    if not removed_first:
        with pytest.raises(NonFiniteOutput, match="stage 1, step 0, window 0") as caught:
            sampler.complete(out)
        assert caught.value.clip == faulty
        with pytest.raises(NonFiniteOutput):
            sampler.complete(out)
    after = sampler._clips[good].ring, sampler._clips[good].kept
    assert all(torch.equal(a.nan_to_num(7), b.nan_to_num(7)) for a, b in zip(before, after, strict=True))
    sampler.remove_clip(faulty)
    sampler.complete(out)
    assert not torch.equal(before[0].nan_to_num(7), sampler._clips[good].ring.nan_to_num(7))
    assert sampler.next_batch().clips.tolist() == [good, good]


def test_a_call_that_raised_ends_with_its_clips():
    sampler, plan, table = small()
    handle = sampler.add_clip(plan, table, seed=1)
    sampler.next_batch()

    def network():
        raise MemoryError("of the device")

    out = torch.zeros(1, 2, 8, *SHAPE)
    with pytest.raises(MemoryError):
        sampler.run(network, out)
    sampler.remove_clip(handle)
    sampler.complete(out)
    other = sampler.add_clip(plan, table, seed=1)
    assert sampler.next_batch().clips.tolist() == [other, other]


def test_a_removed_clip_frees_its_rings_while_its_call_runs():
    sampler, plan, table = small()
    handle = sampler.add_clip(plan, table, seed=1)
    sampler.next_batch()
    import weakref

    ring = weakref.ref(sampler._clips[handle].ring)
    sampler.remove_clip(handle)
    assert ring() is None
    sampler.complete(torch.zeros(1, 2, 8, *SHAPE))


def test_wrong_use_is_named():
    sampler, plan, table = small()
    with pytest.raises(ValueError, match="the plan's calls have 5 frames"):
        sampler.add_clip(WindowPlan(20, 5, 2), table, seed=1)
    with pytest.raises(ValueError, match="threshold=1.5"):
        sampler.add_clip(plan, table, seed=1, threshold=1.5)
    with pytest.raises(ValueError, match="finite clip"):
        sampler.add_clip(plan, table, seed=1, threshold=0.9, clip=None)
    with pytest.raises(RuntimeError, match="no batch"):
        sampler.complete(torch.zeros(1, 2, 8, *SHAPE))
    sampler.add_clip(plan, table, seed=1)
    sampler.next_batch()
    with pytest.raises(RuntimeError, match="has not been completed"):
        sampler.next_batch()
    with pytest.raises(ValueError, match="the denoiser returned shape"):
        sampler.complete(torch.zeros(1, 2, 7, *SHAPE))


@pytest.mark.parametrize("length, guided", [(1, False), (5, True), (8, False)])
def test_a_warm_sampler_uses_no_form_of_the_step_for_the_first_time(length, guided, monkeypatch):
    """Forms: what a kernel is compiled for. Buffers of the sampler do not grow either."""
    from pylumiere.diffusion import device_sampler

    forms = set()

    def noted(x, x0, out, kept, slots, rows, weights, coef, key, halt=None):
        forms.add((x0 is None, len(out), out.dtype, kept is None, rows.shape[1], halt is None))
        denoise_step.reference_(x, x0, out, kept, slots, rows, weights, coef, key, halt)

    monkeypatch.setattr(device_sampler, "denoise_step_", noted)
    sampler = DeviceSampler(frame_shape=SHAPE, call_frames=length, guided=guided, capacity=2)
    buffer = sampler._numbers._buffer
    sampler.warm_up()
    warm = set(forms)
    plans = [WindowPlan(40, length, overlap) for overlap in {0, length // 4, length // 2}]
    for plan, coef in ((plan, coef) for plan in plans for coef in ([0.5] * 4 + [0.0, 0.1], [0.5] * 6)):
        table = exact.Table(np.zeros(3, np.float32), np.array([coef] * 3), 1.0, 0.0)
        handle = sampler.add_clip(plan, table, seed=1, guidance_scale=2.0 if guided else 1.0)
        while not sampler.is_finished(handle):
            batch = sampler.next_batch()
            sampler.complete(torch.zeros(1 + guided, *batch.x.shape))
            sampler.take_final(handle)
        sampler.remove_clip(handle)
    assert forms == warm and sampler._numbers._buffer is buffer
