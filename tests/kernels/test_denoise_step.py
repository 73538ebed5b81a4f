"""denoise_step: kernel and CUDA twin give the bits of the reference; the noise against Random123 and float64."""

import ctypes
import math
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pylumiere.kernels import denoise_step as op
from pylumiere.kernels import launching
from support.testing import DTYPES, assert_close, shapes
from torch._subclasses.fake_tensor import FakeTensorMode

DEVICE = "cpu" if launching.interpreted() else "cuda"
SOURCE = Path(op.__file__).parent / "csrc"
SHAPES = shapes("F P G R K", [
    (1, 1, 1, 1, 1),          # one position: a quarter of a counter
    (3, 130, 2, 5, 3),        # nothing divides a block
    (5, 96, 1, 4, 2),
    (2, 16 * 16 * 3, 2, 3, 2),
])  # fmt: skip


def case(F, P, G, R, K, dtype=torch.float32, multistep=True, seed=0):
    """Frames at different steps: with and without clipping, noise and the multistep term; rows in ascending order."""
    generator = torch.Generator().manual_seed(seed)
    x, prev = (torch.randn(F, P, generator=generator) for _ in range(2))
    out = torch.randn(G, R, P, generator=generator).to(dtype)
    rows = torch.randint(-1, R, (F, K), generator=generator, dtype=torch.int32)
    rows[:, 0] = rows[:, 0].clamp(min=0)
    weights = torch.rand(F, K, generator=generator)
    coef = torch.randn(F, 10, generator=generator)
    coef[:, 8] = 1.0
    coef[::3, 8] = math.inf
    coef[::2, 4] = 0.0
    coef[1::3, 5] = 0.0
    key = torch.randint(-(2**62), 2**62, (F, 5), generator=generator)
    key[:, 1], key[:, 2] = 1, torch.arange(F) - 1
    return [x, prev if multistep else None, out, rows, weights, coef, key]


def to(tree, change):
    return [change(v) if isinstance(v, torch.Tensor) else v for v in tree]


def run(args):
    return [v.cpu() for v in op.launch(*to(args, lambda v: v.to(DEVICE)))]


def assert_same_bits(actual, expected):
    for name, a, e in zip(("x'", "x0"), actual, expected, strict=True):
        assert a.dtype == e.dtype == torch.float32
        different = (a.view(torch.int32) != e.view(torch.int32)).sum().item()
        assert different == 0, f"{name}: {different} of {a.numel()} values differ"


# ---- the step ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("multistep", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_kernel_gives_the_bits_of_the_reference(shape, dtype, multistep):
    args = case(*shape, dtype, multistep)
    assert_same_bits(run(args), op.reference(*args))


@settings(max_examples=15)
@given(
    st.integers(1, 4), st.integers(1, 200), st.integers(1, 2), st.integers(1, 5), st.integers(1, 4), st.integers(0, 99)
)
def test_any_shape(F, P, G, R, K, seed):
    args = case(F, P, G, R, K, seed=seed)
    assert_same_bits(run(args), op.reference(*args))


def test_zeros_keep_their_sign():
    args = case(2, 12, 2, 2, 2)
    args[0].zero_()
    args[2].copy_(-torch.zeros(()))
    args[5][:, 8] = 0.0
    assert_same_bits(run(args), op.reference(*args))


def test_reference_is_near_float64():
    args = case(4, 200, 2, 5, 3)
    exact = op.reference(*to(args, lambda v: v.double() if v.dtype == torch.float32 else v))
    for actual, expected in zip(op.reference(*args), exact, strict=True):
        assert_close(actual, expected)


def test_reference_is_a_loop_over_positions():
    args = case(3, 9, 2, 4, 3)
    x, prev, out, rows, weights, coef, key = to(args, lambda v: v.double() if v.is_floating_point() else v)
    new, x0s = op.reference(x, prev, out, rows, weights, coef, key)
    for f in range(3):
        u, v, p, q, r, n, guidance, gain, clip, scale = coef[f].tolist()
        noise = op.noise_of_keys(key[f : f + 1], 9)[0].double()
        for i in range(9):
            avg = 0.0
            for k in range(3):
                row = int(rows[f, k])
                if row >= 0:
                    cond, uncond = out[0, row, i].item(), out[1, row, i].item()
                    avg += weights[f, k].item() * (uncond + guidance * (cond - uncond))
            x0 = min(max(u * x[f, i].item() + v * avg * gain, -clip), clip) * scale
            expected = p * x[f, i].item() + q * x0 + r * prev[f, i].item() + n * noise[i].item()
            assert x0s[f, i].item() == pytest.approx(x0, rel=1e-12, abs=1e-12)
            assert new[f, i].item() == pytest.approx(expected, rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("order", [[3, 1, 4, 0, 2], [4, 3, 2, 1, 0]])
def test_order_in_which_windows_arrive_changes_no_bit(order):
    """The outputs stand in another order in memory; each frame still adds its windows in ascending order."""
    args = case(3, 70, 2, 5, 3)
    expected = run(args)
    place = torch.empty(6, dtype=torch.int32)
    place[order] = torch.arange(5, dtype=torch.int32)
    place[5] = -1
    args[2] = args[2][:, order].contiguous()
    args[3] = place[args[3].long()]
    assert_same_bits(run(args), expected)


def test_frames_in_another_order_change_no_bit():
    args = case(5, 70, 2, 5, 3)
    order = torch.tensor([3, 1, 4, 0, 2])
    expected = [v[order] for v in run(args)]
    args = [v if i == 2 or v is None else v[order].contiguous() for i, v in enumerate(args)]
    assert_same_bits(run(args), expected)


def test_previous_x0_is_not_read_where_its_factor_is_zero():
    args = case(2, 20, 1, 2, 1)
    args[5][:, 4] = 0.0
    args[1].fill_(math.nan)
    assert all(torch.isfinite(v).all() for v in run(args))


# ---- in place, in rings -------------------------------------------------------------------------------------------


def ring_case(F, P, G, R, K, dtype=torch.float32, multistep=True, seed=0, slots=7, kept=3):
    """As `case`, in rings of `slots` more slots than frames, which hold NaN; some rows are kept ones."""
    x, prev, out, rows, weights, coef, key = case(F, P, G, R, K, dtype, multistep, seed)
    generator = torch.Generator().manual_seed(seed)
    at = torch.randperm(F + slots, generator=generator)[:F].to(torch.int32)
    rings = [torch.full((F + slots, P), math.nan) for _ in range(2)]
    rings[0][at.long()] = x
    rings[1][at.long()] = torch.where(coef[:, 4:5] == 0, math.nan, x if prev is None else prev)
    extra = torch.randn(G, kept, P, generator=generator).to(dtype)
    if kept:
        chosen = torch.rand(rows.shape, generator=generator) < 0.3
        rows = torch.where(chosen, -2 - torch.randint(0, kept, rows.shape, generator=generator), rows).to(torch.int32)
    return [rings[0], rings[1] if multistep else None, out, extra, at, rows, weights, coef, key]


def by_definition(args):
    """What must stand in the rings: the step on new tensors, for outputs joined with the kept rows."""
    x, prev, out, kept, at, rows, weights, coef, key = args
    rows = torch.where(rows < -1, out.shape[1] - 2 - rows, rows)
    place = at.long()
    before = None if prev is None else prev[place]
    new = op.reference(x[place], before, torch.cat([out, kept], 1), rows, weights, coef, key)
    expected = [x.clone(), None if prev is None else prev.clone()]
    for ring, value in zip(expected, new, strict=True):
        if ring is not None:
            ring[place] = value.to(ring.dtype)
    return [ring for ring in expected if ring is not None]


def run_in_place(function, args, halt=None):
    args = to([*args, halt], lambda v: v.clone().to(DEVICE if function is op.launch_ else "cpu"))
    function(*args)
    return [v.cpu() for v in args[:2] if v is not None]


def assert_same_rings(actual, expected):
    assert len(actual) == len(expected)
    for a, e in zip(actual, expected, strict=True):
        assert torch.equal(a.isnan(), e.isnan()), "slots of other frames are not touched"
        assert torch.equal(a.view(torch.int32)[~e.isnan()], e.view(torch.int32)[~e.isnan()])


@pytest.mark.parametrize("function", [op.launch_, op.reference_, op.denoise_step_])
@pytest.mark.parametrize("multistep", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_step_in_rings_gives_the_bits_of_the_step(shape, dtype, multistep, function):
    args = ring_case(*shape, dtype, multistep)
    assert_same_rings(run_in_place(function, args), by_definition(args))


@settings(max_examples=15)
@given(
    st.integers(1, 4), st.integers(1, 200), st.integers(1, 2), st.integers(1, 5), st.integers(1, 4), st.integers(0, 99)
)
def test_a_step_in_rings_of_any_shape(F, P, G, R, K, seed):
    args = ring_case(F, P, G, R, K, seed=seed, slots=seed % 3, kept=seed % 4)
    assert_same_rings(run_in_place(op.launch_, args), by_definition(args))


@pytest.mark.parametrize("multistep", [False, True])
def test_a_step_in_rings_is_near_float64(multistep):
    args = ring_case(4, 200, 2, 5, 3, multistep=multistep)
    exact = by_definition(to(args, lambda v: v.double() if v.dtype == torch.float32 else v))
    place = args[4].long()
    for actual, expected in zip(run_in_place(op.launch_, args), exact, strict=True):
        assert_close(actual[place], expected[place])


@pytest.mark.parametrize("function", [op.launch_, op.reference_])
def test_a_halted_step_changes_nothing(function):
    args = ring_case(3, 130, 2, 5, 3)
    untouched = [v.clone() for v in args[:2]]
    assert_same_rings(run_in_place(function, args, torch.ones(1, dtype=torch.int32)), untouched)
    assert_same_rings(run_in_place(function, args, torch.zeros(1, dtype=torch.int32)), by_definition(args))


@pytest.mark.parametrize("alpha", [None, 0.0, 0.7])
def test_the_initial_state_is_a_step(alpha):
    """alpha clean + sigma noise; without a clean frame sigma noise alone. Zeros keep their sign."""
    F, P, sigma = 3, 130, 1.3
    clean = torch.full((F, P), -0.0) if alpha is None else torch.randn(F, P)
    clean[:, :4] = -0.0
    if alpha is not None:
        clean[:, 4:8] = 0.0
    key = torch.tensor([[9, 1, -1, frame, 0] for frame in range(F)])
    coef = torch.tensor([op.initial_coef(1.0 if alpha is None else alpha, sigma)] * F)
    args = [clean, None, torch.full((1, 1, P), math.nan), None, torch.arange(F, dtype=torch.int32)]
    args += [torch.full((F, 2), -1, dtype=torch.int32), torch.zeros(F, 2), coef, key]
    noise = torch.tensor(sigma) * op.noise_of_keys(key, P)
    expected = noise if alpha is None else torch.tensor(alpha) * clean + noise
    for function in (op.launch_, op.reference_):
        assert_same_rings(run_in_place(function, args), [expected])
    coef[:, 5] = 0.0  # no noise: the sign of a zero is seen
    zero = clean if alpha is None else torch.tensor(alpha) * clean
    for function in (op.launch_, op.reference_):
        assert_same_rings(run_in_place(function, args), [zero])


# ---- the noise -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("counter, key, words", [
    ((0, 0, 0, 0), (0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0), "d16cfe09 94fdcceb 5001e420 24126ea1"),
])  # fmt: skip
def test_philox_gives_the_known_answers_of_random123(counter, key, words):
    result = op.philox4x32(tuple(torch.tensor(c) for c in counter), tuple(torch.tensor(k) for k in key))
    assert " ".join(f"{int(word):08x}" for word in result) == words


def test_polynomials_are_near_float64_for_every_input():
    word = torch.arange(0, 2**24, 5) << 8
    turns = (word >> 8).double() * 2.0**-24
    radius = torch.sqrt(-2 * torch.log(turns + 2.0**-24))
    assert ((op._radius(word).double() - radius).abs() <= 2.2 * 2.0**-24 * radius).all()
    cos, sin = op._cos_sin(word)
    assert (cos.double() - torch.cos(2 * math.pi * turns)).abs().max() < 1.5 * 2.0**-24
    assert (sin.double() - torch.sin(2 * math.pi * turns)).abs().max() < 1.5 * 2.0**-24
    assert op._radius(torch.tensor([0xFFFFFFFF])).item() == 0


def test_noise_by_numpy_step_by_step():
    """The documented arithmetic written out in numpy's float32: same bits."""
    f32 = np.float32
    noise = op.frame_noise(0xFEDCBA9876543210, 2, 7, [3], 4096)[0].numpy()

    def mulhilo(a, b):
        product = a.astype(np.uint64) * np.uint64(b)
        return (product >> np.uint64(32)).astype(np.uint32), product.astype(np.uint32)

    c = [np.arange(1024, dtype=np.uint32), *(np.full(1024, v, np.uint32) for v in (3, 8, 2))]
    k = [0x76543210, 0xFEDCBA98]
    for _ in range(10):
        (high0, low0), (high1, low1) = mulhilo(c[0], 0xD2511F53), mulhilo(c[2], 0xCD9E8D57)
        c = [high1 ^ c[1] ^ np.uint32(k[0]), low1, high0 ^ c[3] ^ np.uint32(k[1]), low0]
        k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
    columns = []
    for a, b in ((c[0], c[1]), (c[2], c[3])):
        bits = (((a >> 8) + 1).astype(f32) * f32(2.0**-24)).view(np.int32)
        exponent = (bits - np.int32(0x3F3504F3)) >> 23
        f, e = (bits - (exponent << 23)).view(f32) - f32(1), exponent.astype(f32)
        poly = np.zeros_like(f)
        for coefficient in op._LOG[::-1]:
            poly = poly * f + f32(coefficient)
        z = f * f
        tail = (poly * f) * z + e * f32(op._LN2_LO) - z * f32(0.5)
        radius = np.sqrt(((f + tail) + e * f32(op._LN2_HI)) * f32(-2))
        turn = (b >> 8).astype(np.int32)
        quarter = (turn + 2**21) // 2**22
        x = (turn - quarter * 2**22).astype(f32) * f32(2.0**-24)
        z = x * x
        sin, cos = np.zeros_like(x), np.zeros_like(x)
        for coefficient in op._SIN[::-1]:
            sin = sin * z + f32(coefficient)
        for coefficient in op._COS[::-1]:
            cos = cos * z + f32(coefficient)
        sin, cos = sin * x, cos * z + f32(1)
        columns.append(radius * np.choose(quarter % 4, [cos, -sin, -cos, sin]))
        columns.append(radius * np.choose(quarter % 4, [sin, cos, -sin, -cos]))
    assert np.array_equal(np.stack(columns, 1).ravel(), noise)


def test_noise_does_not_depend_on_what_is_asked_for_with_it():
    whole = op.frame_noise(7, 0, 3, list(range(6)), 101)
    assert torch.equal(op.frame_noise(7, 0, 3, [4, 1], 101), whole[[4, 1]])
    positions = torch.tensor([100, 0, 57, 58])
    assert torch.equal(op.frame_noise(7, 0, 3, [5], positions)[0], whole[5, positions])


def test_each_part_of_the_key_changes_the_noise():
    base = (7, 0, 3, [1], 64)
    others = [(8, *base[1:]), (7 + 2**32, *base[1:]), (7, 1, *base[2:]), (7, 0, 4, *base[3:]), (7, 0, 3, [2], 64)]
    first = op.frame_noise(*base)
    for other in others:
        assert (op.frame_noise(*other) == first).float().mean() < 0.05


def test_noise_is_standard_normal():
    from scipy import stats

    noise = op.frame_noise(3, 0, -1, list(range(8)), 2**15)
    count = noise.numel()
    for power, moment in ((1, 0.0), (2, 1.0), (3, 0.0), (4, 3.0)):
        spread = math.sqrt(math.prod(range(1, 2 * power, 2)) / count)  # of the mean of x^power, an upper bound
        assert abs(noise.double().pow(power).mean().item() - moment) < 4.5 * spread
    assert stats.kstest(noise.flatten().numpy(), "norm").pvalue > 1e-3
    flat = noise.double()
    for lag in (1, 2, 3, 4):
        assert abs((flat[:, lag:] * flat[:, :-lag]).mean().item()) < 4.5 / math.sqrt(count)
    assert abs((flat[1:] * flat[:-1]).mean().item()) < 4.5 / math.sqrt(count)


def test_frame_noise_rejects():
    with pytest.raises(ValueError, match="seed=-1"):
        op.frame_noise(-1, 0, 0, [0], 4)
    with pytest.raises(ValueError, match="step=-2"):
        op.frame_noise(0, 0, -2, [0], 4)
    with pytest.raises(ValueError, match=r"shape \(1, 1\)"):
        op.frame_noise(0, 0, 0, torch.zeros(1, 1), 4)


# ---- the CUDA twin -------------------------------------------------------------------------------------------------

HOST = r"""
#include "denoise_step.cuh"
extern "C" void run(const float* x, const float* prev, const void* out, const int32_t* rows, const float* weights,
                    const float* coef, const int64_t* key, float* x_new, float* x0_new, int64_t frames,
                    int64_t positions, int64_t out_rows, int32_t windows, int32_t outputs) {
    const lumiere::DenoiseStepArgs args{x, prev, out, rows, weights, coef, key, x_new, x0_new,
                                        frames, positions, out_rows, windows, outputs};
    const bool vector = positions % 4 == 0;
    for (int64_t frame = 0; frame < frames; ++frame)
        for (int64_t counter = 0; 4 * counter < positions; ++counter)
            vector ? lumiere::denoise_quad<float, true>(args, frame, counter)
                   : lumiere::denoise_quad<float, false>(args, frame, counter);
}
extern "C" void run_in_ring(float* x, float* x0, const void* out, const void* kept, const int32_t* slots,
                            const int32_t* rows, const float* weights, const float* coef, const int64_t* key,
                            const int32_t* halt, int64_t frames, int64_t positions, int64_t out_rows,
                            int64_t kept_rows, int32_t windows, int32_t outputs) {
    const lumiere::DenoiseStepArgs args{x, x0, out, rows, weights, coef, key, x, x0, frames, positions, out_rows,
                                        windows, outputs, slots, kept, kept_rows, halt};
    const bool vector = positions % 4 == 0;
    for (int64_t frame = 0; frame < frames; ++frame)
        for (int64_t counter = 0; 4 * counter < positions; ++counter)
            vector ? lumiere::denoise_quad<float, true>(args, frame, counter)
                   : lumiere::denoise_quad<float, false>(args, frame, counter);
}
"""


@pytest.fixture(scope="module")
def twin(tmp_path_factory):
    """The arithmetic of the CUDA kernel, compiled for the host."""
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("needs a C++ compiler: neither g++ nor clang++ is on the path")
    folder = tmp_path_factory.mktemp("twin")
    (folder / "host.cpp").write_text(HOST)
    command = [compiler, "-std=c++20", "-O2", "-march=native", "-ffp-contract=off", "-shared", "-fPIC", f"-I{SOURCE}"]
    subprocess.run([*command, str(folder / "host.cpp"), "-o", str(folder / "host.so")], check=True)
    return ctypes.CDLL(str(folder / "host.so"))


@pytest.mark.parametrize("multistep", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_twin_gives_the_bits_of_the_reference(twin, shape, multistep):
    args = case(*shape, torch.float32, multistep)
    x, prev, out, rows = args[:4]
    results = [torch.full_like(x, math.nan) for _ in range(2)]
    pointers = [ctypes.c_void_p(None if v is None else v.data_ptr()) for v in (*args, *results)]
    sizes = [ctypes.c_int64(v) for v in (*x.shape, out.shape[1])]
    twin.run(*pointers, *sizes, ctypes.c_int32(rows.shape[1]), ctypes.c_int32(out.shape[0]))
    assert_same_bits(results, op.reference(*args))


@pytest.mark.parametrize("multistep", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_twin_steps_in_rings(twin, shape, multistep):
    args = ring_case(*shape, torch.float32, multistep)
    expected = by_definition(args)
    untouched = [v.clone() for v in args[:2] if v is not None]
    x, _, out, kept, _, rows = args[:6]
    sizes = [ctypes.c_int64(v) for v in (len(rows), x.shape[1], out.shape[1], kept.shape[1])]
    for halt, want in ((1, untouched), (0, expected)):
        tensors = [*args, torch.tensor([halt], dtype=torch.int32)]
        pointers = [ctypes.c_void_p(None if v is None else v.data_ptr()) for v in tensors]
        twin.run_in_ring(*pointers, *sizes, ctypes.c_int32(rows.shape[1]), ctypes.c_int32(out.shape[0]))
        assert_same_rings([v for v in args[:2] if v is not None], want)


@pytest.fixture(scope="module")
def nvcc():
    found = shutil.which("nvcc")
    if found is None:
        pytest.skip("needs nvcc, which is not on the path")
    return found


def test_twin_compiles_without_contraction(nvcc, tmp_path):
    """PTX for the oldest chip: each product and sum carries its rounding, and there is no fused multiply-add."""
    target = tmp_path / "denoise_step.ptx"
    command = [nvcc, "-std=c++20", "-ptx", "-arch=compute_75", str(SOURCE / "denoise_step.cu"), "-o", str(target)]
    subprocess.run(command, check=True)
    arithmetic = set(re.findall(r"\b(?:mul|add|sub|fma|mad|sqrt|div)(?:\.[a-z]+)*\.f32\b", target.read_text()))
    assert arithmetic == {"mul.rn.f32", "add.rn.f32", "sub.rn.f32", "sqrt.rn.f32"}


def test_twin_compiles_for_oldest_and_newest_chips_without_spills(nvcc, tmp_path):
    targets = [f"-gencode=arch=compute_{sm},code=sm_{sm}" for sm in (75, 120)]
    command = [nvcc, "-std=c++20", "-c", "-Xptxas=-v", "-Xcompiler=-Wall,-Wextra,-Werror", *targets]
    command += [str(SOURCE / "denoise_step.cu"), "-o", str(tmp_path / "denoise_step.o")]
    report = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    used = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", report)
    assert len(used) >= 2 * 6 and set(used) == {("0", "0", "0")}


# ---- registration --------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("multistep", [False, True])
def test_opcheck(multistep):
    torch.library.opcheck(op.denoise_step, tuple(case(2, 6, 2, 3, 2, multistep=multistep)))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("multistep", [False, True])
def test_opcheck_in_rings(multistep):
    args = [v if v is None or not v.is_floating_point() else v.nan_to_num() for v in ring_case(2, 6, 2, 3, 2)]
    if not multistep:
        args[1] = None
    torch.library.opcheck(op.denoise_step_, tuple(args))


@pytest.mark.parametrize("index, change, message", [
    (3, lambda v: v[:1], r"kept has shape \(1, 3, 6\), expected \(2, 3, 6\)"),
    (3, lambda v: v.half(), "kept has dtype torch.float16"),
    (4, lambda v: v.long(), "slots has dtype torch.int64"),
    (4, lambda v: v[:1], r"rows has shape \(2, 2\), expected \[1, K\]"),
    (9, lambda v: v.long(), "halt has dtype torch.int64"),
])  # fmt: skip
def test_rings_that_do_not_fit_are_rejected_in_the_op_and_in_the_fake(index, change, message):
    args = [*ring_case(2, 6, 2, 3, 2), torch.zeros(1, dtype=torch.int32)]
    args[index] = change(args[index])
    with pytest.raises(ValueError, match=message):
        op.denoise_step_(*args)
    with FakeTensorMode() as mode, pytest.raises(ValueError, match=message):
        op.denoise_step_(*to(args, mode.from_tensor))


REJECTED = {
    "x": (0, lambda v: v[0], r"x has shape \(6,\)"),
    "x dtype": (0, lambda v: v.double(), "x has dtype torch.float64"),
    "x0_prev": (1, lambda v: v[:1], r"x0_prev has shape \(1, 6\), expected \(2, 6\)"),
    "out": (2, lambda v: v[:, :, :5], r"out has shape \(2, 3, 5\)"),
    "out count": (2, lambda v: v.repeat(2, 1, 1), r"out has shape \(4, 3, 6\)"),
    "out stride": (2, lambda v: v.transpose(1, 2).contiguous().transpose(1, 2), "out has stride"),
    "rows": (3, lambda v: v[:, 0], r"rows has shape \(2,\)"),
    "rows dtype": (3, lambda v: v.long(), "rows has dtype torch.int64"),
    "weights": (4, lambda v: v[:, :1], r"weights has shape \(2, 1\), expected \(2, 2\)"),
    "coef": (5, lambda v: v[:, :9], r"coef has shape \(2, 9\), expected \(2, 10\)"),
    "key": (6, lambda v: v.int(), "key has dtype torch.int32"),
}


@pytest.mark.parametrize("name", REJECTED)
def test_rejects_in_the_op_and_in_the_fake(name):
    index, change, message = REJECTED[name]
    args = case(2, 6, 2, 3, 2)
    args[index] = change(args[index])
    with pytest.raises(ValueError, match=message):
        op.denoise_step(*args)
    with FakeTensorMode() as mode, pytest.raises(ValueError, match=message):
        op.denoise_step(*to(args, mode.from_tensor))


@pytest.mark.gpu
@pytest.mark.slow
def test_beyond_int32_elements():
    F, P = 80, 30_000_000  # 2.4e9 positions
    x = torch.zeros(F, P, device="cuda")
    args = case(F, 1, 1, 1, 1, multistep=False)
    args[0], args[2] = x, torch.zeros(1, 1, P, device="cuda")
    args[5][:, 5] = 1.5  # noise in every frame
    new, _ = op.launch(*to(args, lambda v: v.to("cuda")))
    tail = args[6][-1:].cuda()
    args[5] = args[5].cuda()
    assert torch.equal(new[-1], args[5][-1, 5] * op.noise_of_keys(tail, P)[0])
