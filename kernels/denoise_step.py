"""One sampler step in one pass: guidance, window average, x0, clip, update, and the noise that belongs to the frame.

    o_k  = uncond_k + guidance * (cond_k - uncond_k)            for each window k that covers the frame
    avg  = (w_0 o_0 + w_1 o_1 + ...) * gain
    x0   = clamp(u x + v avg, -clip, clip) * scale
    x'   = ((p x + q x0) + r x0_prev) + n noise(seed, stage, step, frame, position)

Each product and each sum is rounded to fp32 by itself, in the order written, so the reference, the Triton kernel, the
CUDA kernel in `csrc/denoise_step.cuh` and the C++ runtime give the same bits. The windows are added in ascending
order whatever the order in which they were computed.

The noise: Philox4x32-10 (Salmon et al. 2011) with key = seed and counter = (position // 4, frame, step + 1, stage);
Box-Muller on the words (0, 1) and (2, 3); logarithm, cosine and sine are the polynomials below. Over all 2^24 inputs
the radius is within 2.2 * 2^-24 of its value, relative; cosine and sine within 1.5 * 2^-24, absolute.

Bound by memory: x, the outputs of the covering windows and x0_prev are read once, x' and x0 written once.

`denoise_step` gives new tensors. `denoise_step_` works in place on rings of frame states: a frame is named by its slot,
and outputs may also lie among rows that were kept from earlier calls.
"""

import torch
import triton
import triton.language as tl
from pylumiere.kernels import launching, tuning
from pylumiere.kernels.cost import Cost
from pylumiere.kernels.launching import recorded
from torch import Tensor

# Philox4x32: multipliers and key increments.
_PHILOX_M0, _PHILOX_M1 = 0xD2511F53, 0xCD9E8D57
_PHILOX_W0, _PHILOX_W1 = 0x9E3779B9, 0xBB67AE85
_MASK = 0xFFFFFFFF

# log(1 + f) = f - f^2/2 + f^3 P(f) for 1 + f in [sqrt(1/2), sqrt(2)); P by ascending power. Minimax, rounded to fp32.
_LOG = (
    0.3333333134651184, -0.250008225440979, 0.20001234114170074, -0.16623298823833466,
    0.14201553165912628, -0.1316058188676834, 0.12763327360153198, -0.07635655254125595,
)  # fmt: skip
_LN2_HI, _LN2_LO = 0.693359375, -2.1219444170128554e-4
# sin(2 pi x) = x S(x^2), cos(2 pi x) = 1 + x^2 C(x^2) for x in [-1/8, 1/8].
_SIN = (6.2831854820251465, -41.34186553955078, 81.62535095214844, -76.76246643066406)
_COS = (-19.739208221435547, 64.93932342529297, -85.4432373046875, 59.22924041748047)

# Columns of `coef` and of `key`.
COEF = ("u", "v", "p", "q", "r", "n", "guidance", "gain", "clip", "scale")
KEY = ("seed", "stage", "step", "frame", "unused")

# ---- reference: noise ----------------------------------------------------------------------------------------------


def _mulhilo(multiplier: int, x: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of multiplier * x, for x in [0, 2^32) held in int64."""
    high = (multiplier * (x >> 16) + (multiplier * (x & 0xFFFF) >> 16)) >> 16
    low = (((multiplier & 0xFFFF) * x) + (((multiplier >> 16) * (x & 0xFFFF)) << 16)) & _MASK
    return high, low


def philox4x32(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Ten rounds of Philox4x32. Words are in [0, 2^32), held in int64 and broadcast together."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        high0, low0 = _mulhilo(_PHILOX_M0, c0)
        high1, low1 = _mulhilo(_PHILOX_M1, c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _PHILOX_W0) & _MASK, (k1 + _PHILOX_W1) & _MASK
    return c0, c1, c2, c3


def _radius(word: Tensor) -> Tensor:
    """sqrt(-2 log(u)) for u = ((word >> 8) + 1) / 2^24."""
    u = ((word >> 8) + 1).to(torch.float32) * 2.0**-24
    bits = u.view(torch.int32)
    exponent = (bits - 0x3F3504F3) >> 23
    f = (bits - (exponent << 23)).view(torch.float32) - 1.0
    e = exponent.to(torch.float32)
    poly = torch.full_like(f, _LOG[7])
    for coefficient in _LOG[6::-1]:
        poly = poly * f + coefficient
    z = f * f
    tail = (poly * f) * z
    tail = tail + e * _LN2_LO
    tail = tail - z * 0.5
    log = (f + tail) + e * _LN2_HI
    # The fp32 square root of PyTorch on CPU is not correctly rounded; the one in fp64, rounded to fp32, is.
    return torch.sqrt((log * -2.0).double()).to(torch.float32)


def _cos_sin(word: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin of 2 pi u for u = (word >> 8) / 2^24."""
    k = (word >> 8).to(torch.int32)
    quarter = (k + (1 << 21)) >> 22
    x = (k - (quarter << 22)).to(torch.float32) * 2.0**-24
    z = x * x
    sin = ((z * _SIN[3] + _SIN[2]) * z + _SIN[1]) * z + _SIN[0]
    sin = sin * x
    cos = ((z * _COS[3] + _COS[2]) * z + _COS[1]) * z + _COS[0]
    cos = cos * z + 1.0
    odd = (quarter & 1) != 0
    first, second = torch.where(odd, sin, cos), torch.where(odd, cos, sin)
    return (
        torch.where(((quarter + 1) & 2) != 0, -first, first),
        torch.where((quarter & 2) != 0, -second, second),
    )


def _noise_of_counters(key: Tensor, counter: Tensor) -> Tensor:
    """fp32 normals [F, len(counter), 4] for `key` [F, 5] int64 and counter words c0 [..., n]."""
    seed, stage, step, frame = (key[:, column, None] for column in range(4))
    words = philox4x32(
        (counter, frame & _MASK, (step + 1) & _MASK, stage & _MASK), (seed & _MASK, (seed >> 32) & _MASK)
    )
    normals = []
    for a, b in ((words[0], words[1]), (words[2], words[3])):
        radius = _radius(a)
        cos, sin = _cos_sin(b)
        normals += [radius * cos, radius * sin]
    return torch.stack(normals, -1)


def noise_of_keys(key: Tensor, num_positions: int) -> Tensor:
    """Standard normals, fp32 [F, num_positions], of the rows (seed, stage, step, frame, 0) of `key`."""
    counter = torch.arange((num_positions + 3) // 4, device=key.device)
    return _noise_of_counters(key, counter).flatten(1)[:, :num_positions]


def frame_noise(seed: int, stage: int, step: int, frames: Tensor | list[int], positions: int | Tensor) -> Tensor:
    """The noise of whole frames, or of chosen positions in them.

    Args:
        seed: 0 to 2^64 - 1.
        stage: 0 base, 1 SSR, 2 noise augmentation of the SSR's low-resolution input.
        step: index of the sampler step; -1 for the initial noise.
        frames: indices of the frames in the clip.
        positions: number of positions H*W*C of a frame, or an int64 tensor [P] of positions in its flattened [H, W, C].

    Returns:
        [len(frames), P], float32. Any subset of frames and positions, in any order, gives the same values.
    """
    frames = torch.as_tensor(frames, dtype=torch.int64)
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed={seed} is outside [0, 2^64)")
    if step < -1:
        raise ValueError(f"step={step} is below -1, the step of the initial noise")
    if frames.dim() != 1:
        raise ValueError(f"frames must be a list or a tensor of rank 1, got shape {tuple(frames.shape)}")
    signed = seed - 2**64 if seed >= 2**63 else seed
    key = torch.tensor([[signed, stage, step, 0, 0]], dtype=torch.int64, device=frames.device).repeat(len(frames), 1)
    key[:, 3] = frames
    if isinstance(positions, int):
        return noise_of_keys(key, positions)
    normals = _noise_of_counters(key, positions // 4)  # [F, P, 4]
    return normals.gather(-1, (positions % 4)[None, :, None].expand(len(frames), -1, 1)).squeeze(-1)


# ---- reference: step -----------------------------------------------------------------------------------------------


def reference(
    x: Tensor, x0_prev: Tensor | None, out: Tensor, rows: Tensor, weights: Tensor, coef: Tensor, key: Tensor
) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(x.dtype, torch.float32)
    x, weights = x.to(dtype), weights.to(dtype)
    u, v, p, q, r, n, guidance, gain, clip, scale = coef.to(dtype)[:, :, None].unbind(1)
    avg = torch.full_like(x, -0.0)  # -0 is the neutral element: -0 + y = y for every y, also for y = -0
    for k in range(rows.shape[1]):
        row = rows[:, k].clamp(min=0).long()
        o = out[0, row].to(dtype)
        if out.shape[0] == 2:
            uncond = out[1, row].to(dtype)
            o = uncond + guidance * (o - uncond)
        avg = torch.where(rows[:, k, None] >= 0, avg + weights[:, k, None] * o, avg)
    avg = avg * gain
    x0 = u * x + v * avg
    x0 = torch.where(x0 < -clip, -clip, x0)
    x0 = torch.where(x0 > clip, clip, x0) * scale
    new = p * x + q * x0
    if x0_prev is not None:
        new = torch.where(r != 0, new + r * x0_prev.to(dtype), new)
    if torch.compiler.is_compiling():  # a graph cannot depend on values: noise for all frames, kept where wanted
        return torch.where(n != 0, new + n * noise_of_keys(key, x.shape[1]).to(dtype), new), x0
    noisy = (n[:, 0] != 0).nonzero().squeeze(1)
    if noisy.numel():
        noise = noise_of_keys(key[noisy], x.shape[1]).to(dtype)
        new[noisy] = new[noisy] + n[noisy] * noise
    return new, x0


def reference_(
    x: Tensor, x0: Tensor | None, out: Tensor, kept: Tensor | None, slots: Tensor, rows: Tensor, weights: Tensor,
    coef: Tensor, key: Tensor, halt: Tensor | None = None,
) -> None:  # fmt: skip
    if halt is not None and bool(halt):
        return
    at = slots.long()
    rows = torch.where(rows < -1, out.shape[1] - 2 - rows, rows)  # kept rows stand after those of the call
    every = out if kept is None else torch.cat([out, kept], 1)
    new, clean = reference(x[at], None if x0 is None else x0[at], every, rows, weights, coef, key)
    x[at] = new
    if x0 is not None:
        x0[at] = clean


def initial_coef(alpha: float, sigma: float) -> tuple[float, ...]:
    """Coefficients of the step, without windows and with step -1 in its key, that makes alpha x + sigma noise of x.

    Its x0 is a zero with the sign of x, so that no bit is lost. For sigma noise alone take alpha = 1 and x = -0.
    """
    return (0.0, 1.0, alpha, 1.0, 0.0, sigma, 1.0, 1.0, float("inf"), 1.0)


# ---- kernel --------------------------------------------------------------------------------------------------------

_LOG_POLY, _SIN_POLY, _COS_POLY = tl.constexpr(_LOG), tl.constexpr(_SIN), tl.constexpr(_COS)
_LOG2_HI, _LOG2_LO = tl.constexpr(_LN2_HI), tl.constexpr(_LN2_LO)
_M0, _M1, _W0, _W1 = (tl.constexpr(word) for word in (_PHILOX_M0, _PHILOX_M1, _PHILOX_W0, _PHILOX_W1))


@triton.jit
def _philox4x32(c0, c1, c2, c3, k0, k1):
    for _ in tl.static_range(10):
        high0, low0 = tl.umulhi(c0, tl.full(c0.shape, _M0, tl.uint32)), c0 * tl.full(c0.shape, _M0, tl.uint32)
        high1, low1 = tl.umulhi(c2, tl.full(c2.shape, _M1, tl.uint32)), c2 * tl.full(c2.shape, _M1, tl.uint32)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = tl.add(k0, _W0, sanitize_overflow=False), tl.add(k1, _W1, sanitize_overflow=False)
    return c0, c1, c2, c3


@triton.jit
def _radius_of(word):
    u = ((word >> 8) + 1).to(tl.int32).to(tl.float32) * 5.9604644775390625e-08
    bits = u.to(tl.int32, bitcast=True)
    exponent = (bits - 0x3F3504F3) >> 23
    f = (bits - (exponent << 23)).to(tl.float32, bitcast=True) - 1.0
    e = exponent.to(tl.float32)
    poly = f * _LOG_POLY[7] + _LOG_POLY[6]
    for power in tl.static_range(6):
        poly = poly * f + _LOG_POLY[5 - power]
    z = f * f
    tail = (poly * f) * z
    tail = tail + e * _LOG2_LO
    tail = tail - z * 0.5
    log = (f + tail) + e * _LOG2_HI
    return tl.sqrt_rn(log * -2.0)


@triton.jit
def _cos_sin_of(word):
    k = (word >> 8).to(tl.int32)
    quarter = (k + (1 << 21)) >> 22
    x = (k - (quarter << 22)).to(tl.float32) * 5.9604644775390625e-08
    z = x * x
    sin = ((z * _SIN_POLY[3] + _SIN_POLY[2]) * z + _SIN_POLY[1]) * z + _SIN_POLY[0]
    sin = sin * x
    cos = ((z * _COS_POLY[3] + _COS_POLY[2]) * z + _COS_POLY[1]) * z + _COS_POLY[0]
    cos = cos * z + 1.0
    odd = (quarter & 1) != 0
    first, second = tl.where(odd, sin, cos), tl.where(odd, cos, sin)
    # A product with -1 also negates a zero, which 0 - x does not.
    return first * tl.where(((quarter + 1) & 2) != 0, -1.0, 1.0), second * tl.where((quarter & 2) != 0, -1.0, 1.0)


@triton.jit
def _noise_tile(key_ptr, counter):
    """Normals of the positions 4 * counter[0] ... 4 * counter[-1] + 3, in order."""
    seed, stage, step, frame = tl.load(key_ptr), tl.load(key_ptr + 1), tl.load(key_ptr + 2), tl.load(key_ptr + 3)
    zero = counter.to(tl.uint32) * 0
    w0, w1, w2, w3 = _philox4x32(
        counter.to(tl.uint32), zero + frame.to(tl.uint32), zero + (step + 1).to(tl.uint32), zero + stage.to(tl.uint32),
        zero + seed.to(tl.uint32), zero + (seed >> 32).to(tl.uint32),
    )  # fmt: skip
    radius0, radius1 = _radius_of(w0), _radius_of(w2)
    cos0, sin0 = _cos_sin_of(w1)
    cos1, sin1 = _cos_sin_of(w3)
    even = tl.interleave(radius0 * cos0, radius1 * cos1)
    odd = tl.interleave(radius0 * sin0, radius1 * sin1)
    return tl.interleave(even, odd)  # [4 * len(counter)]


@triton.jit
def _denoise_step_kernel(
    x_ptr, prev_ptr, out_ptr, kept_ptr, slots_ptr, rows_ptr, weights_ptr, coef_ptr, key_ptr, halt_ptr, new_ptr, x0_ptr,
    P, stride_g, stride_kept,
    G: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(P, BLOCK)
    pid = tl.program_id(0)
    frame, tile = (pid // tiles).to(tl.int64), pid % tiles
    offs = tile * BLOCK + tl.arange(0, BLOCK)
    mask = offs < P
    if halt_ptr is not None:
        mask = offs < tl.where(tl.load(halt_ptr) != 0, 0, P)
    slot = frame
    if slots_ptr is not None:
        slot = tl.load(slots_ptr + frame).to(tl.int64)
    coef_ptr += frame * 10
    u, v, p, q, r, n = (
        tl.load(coef_ptr), tl.load(coef_ptr + 1), tl.load(coef_ptr + 2),
        tl.load(coef_ptr + 3), tl.load(coef_ptr + 4), tl.load(coef_ptr + 5),
    )  # fmt: skip
    guidance, gain, clip, scale = (
        tl.load(coef_ptr + 6), tl.load(coef_ptr + 7), tl.load(coef_ptr + 8), tl.load(coef_ptr + 9),
    )  # fmt: skip
    x = tl.load(x_ptr + slot * P + offs, mask=mask, other=0.0)
    avg = tl.zeros([BLOCK], tl.float32) * -1.0  # -0: neutral in a sum, sign of zero included
    for k in tl.static_range(K):
        row = tl.load(rows_ptr + frame * K + k)
        weight = tl.load(weights_ptr + frame * K + k)
        covered = offs < tl.where(row != -1, P, 0)
        base = out_ptr + row.to(tl.int64) * P
        stride = stride_g
        if kept_ptr is not None:
            base = tl.where(row >= 0, base, kept_ptr + (-2 - row).to(tl.int64) * P)
            stride = tl.where(row >= 0, stride_g, stride_kept)
        o = tl.load(base + offs, mask=covered, other=0.0).to(tl.float32)
        if G == 2:
            uncond = tl.load(base + stride + offs, mask=covered, other=0.0).to(tl.float32)
            o = uncond + guidance * (o - uncond)
        avg = tl.where(row != -1, avg + weight * o, avg)
    avg = avg * gain
    x0 = u * x + v * avg
    low = clip * -1.0
    x0 = tl.where(x0 < low, low, x0)
    x0 = tl.where(x0 > clip, clip, x0) * scale
    new = p * x + q * x0
    if prev_ptr is not None:  # noqa: SIM102 (decided by the compiler; the next for each frame)
        if r != 0:
            new = new + r * tl.load(prev_ptr + slot * P + offs, mask=mask, other=0.0)
    if n != 0:
        counter = tile * (BLOCK // 4) + tl.arange(0, BLOCK // 4)
        new = new + n * _noise_tile(key_ptr + frame * 5, counter)
    tl.store(new_ptr + slot * P + offs, new, mask=mask)
    if x0_ptr is not None:
        tl.store(x0_ptr + slot * P + offs, x0, mask=mask)


# ---- launch --------------------------------------------------------------------------------------------------------


@recorded("denoise_step", reference)
def launch(
    x: Tensor, x0_prev: Tensor | None, out: Tensor, rows: Tensor, weights: Tensor, coef: Tensor, key: Tensor
) -> tuple[Tensor, Tensor]:
    new, x0 = (torch.empty(x.shape, dtype=torch.float32, device=x.device) for _ in range(2))
    _launch(x, x0_prev, out, None, None, rows, weights, coef, key, None, new, x0)
    return new, x0


@recorded("denoise_step_", reference_)
def launch_(
    x: Tensor, x0: Tensor | None, out: Tensor, kept: Tensor | None, slots: Tensor, rows: Tensor, weights: Tensor,
    coef: Tensor, key: Tensor, halt: Tensor | None = None,
) -> None:  # fmt: skip
    _launch(x, x0, out, kept, slots, rows, weights, coef, key, halt, x, x0)


def _launch(x, prev, out, kept, slots, rows, weights, coef, key, halt, new, x0) -> None:
    F, P = rows.shape[0], x.shape[1]
    config = tuning.choose("denoise_step", launching.arch_of(x), P=P, dtype=out.dtype)
    launching.launch(
        _denoise_step_kernel,
        (F * triton.cdiv(P, config.constants["BLOCK"]),),
        dict(
            x_ptr=x, prev_ptr=prev, out_ptr=out, kept_ptr=kept, slots_ptr=slots, rows_ptr=rows, weights_ptr=weights,
            coef_ptr=coef, key_ptr=key, halt_ptr=halt, new_ptr=new, x0_ptr=x0, P=P, stride_g=out.stride(0),
            stride_kept=0 if kept is None else kept.stride(0),
        ),
        dict(G=out.shape[0], K=rows.shape[1], **config.constants),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        fp_fusion=False,
    )  # fmt: skip


# ---- op ------------------------------------------------------------------------------------------------------------


@torch.library.custom_op("pylumiere::denoise_step", mutates_args=())
def denoise_step(
    x: Tensor, x0_prev: Tensor | None, out: Tensor, rows: Tensor, weights: Tensor, coef: Tensor, key: Tensor
) -> tuple[Tensor, Tensor]:
    """One sampler step for F frames, which may belong to different requests and stand at different steps.

    Args:
        x: [F, P] float32, the states; P = H*W*C.
        x0_prev: [F, P] float32, x0 of the step before, or None. Not read in frames with r = 0.
        out: [G, R, P] float32, float16 or bfloat16, the network's outputs, one row per frame of a window. G = 2: with
            the prompt, then without.
        rows: [F, K] int32, rows of `out` that show the frame, in ascending order of the windows; -1 for none.
        weights: [F, K] float32, weight of each row.
        coef: [F, 10] float32: u, v, p, q, r, n, guidance, gain, clip, scale; clip = inf switches clipping off.
        key: [F, 5] int64: seed (as two's complement), stage, step, frame, unused. Read in frames with n != 0.

    Returns:
        The next state and x0 (clipped and scaled), both [F, P] float32.

    Raises:
        ValueError: shapes or dtypes that do not fit, or a tensor that is not contiguous.
    """
    _check(x, x0_prev, out, rows, weights, coef, key)
    return (launch if x.is_cuda else reference)(x, x0_prev, out, rows, weights, coef, key)


@denoise_step.register_fake
def _(x, x0_prev, out, rows, weights, coef, key):
    _check(x, x0_prev, out, rows, weights, coef, key)
    return torch.empty_like(x), torch.empty_like(x)


@torch.library.custom_op("pylumiere::denoise_step_", mutates_args=("x", "x0"))
def denoise_step_(
    x: Tensor, x0: Tensor | None, out: Tensor, kept: Tensor | None, slots: Tensor, rows: Tensor, weights: Tensor,
    coef: Tensor, key: Tensor, halt: Tensor | None = None,
) -> None:  # fmt: skip
    """One sampler step of F frames in place: of those in `slots` of the rings x and x0. Others are not touched.

    Args:
        x: [S, P] float32, the states; P = H*W*C.
        x0: [S, P] float32, x0 of the step before, replaced by this step's; None where no step needs it.
        out: [G, R, P] as in `denoise_step`.
        kept: [G, M, P] in the type of `out`, rows of earlier calls, or None.
        slots: [F] int32, each at most once.
        rows: [F, K] int32; r >= 0 is row r of `out`, -1 none, and -2 - r row r of `kept`.
        weights, coef, key: one row a frame, as in `denoise_step`.
        halt: [1] int32; where it is not 0, nothing is done. For a caller who learns later that `out` is of no use.

    Raises:
        ValueError: shapes or dtypes that do not fit, or a tensor that is not contiguous.
    """
    _check(x, x0, out, rows, weights, coef, key, slots, kept, halt)
    (launch_ if x.is_cuda else reference_)(x, x0, out, kept, slots, rows, weights, coef, key, halt)


@denoise_step_.register_fake
def _(x, x0, out, kept, slots, rows, weights, coef, key, halt=None):
    _check(x, x0, out, rows, weights, coef, key, slots, kept, halt)


def _check(x, x0_prev, out, rows, weights, coef, key, slots=None, kept=None, halt=None) -> None:
    if x.dim() != 2:
        raise ValueError(f"denoise_step: x has shape {tuple(x.shape)}, expected [F, P]")
    if out.dim() != 3 or out.shape[0] not in (1, 2) or out.shape[2] != x.shape[1]:
        raise ValueError(f"denoise_step: out has shape {tuple(out.shape)}, expected [1 or 2, R, {x.shape[1]}]")
    frames = x.shape[0] if slots is None else slots.numel()
    if rows.dim() != 2 or rows.shape[0] != frames or rows.shape[1] < 1:
        raise ValueError(f"denoise_step: rows has shape {tuple(rows.shape)}, expected [{frames}, K]")
    kept_rows = 0 if kept is None or kept.dim() != 3 else kept.shape[1]
    wanted = {
        "x": (x, x.shape, (torch.float32,)),
        "x0_prev": (x0_prev, x.shape, (torch.float32,)),
        "out": (out, out.shape, (torch.float32, torch.float16, torch.bfloat16)),
        "rows": (rows, rows.shape, (torch.int32,)),
        "weights": (weights, rows.shape, (torch.float32,)),
        "coef": (coef, (frames, len(COEF)), (torch.float32,)),
        "key": (key, (frames, len(KEY)), (torch.int64,)),
        "slots": (slots, (frames,), (torch.int32,)),
        "kept": (kept, (out.shape[0], kept_rows, out.shape[2]), (out.dtype,)),
        "halt": (halt, (1,), (torch.int32,)),
    }
    for name, (value, shape, dtypes) in wanted.items():
        if value is None:
            continue
        if tuple(value.shape) != tuple(shape):
            raise ValueError(f"denoise_step: {name} has shape {tuple(value.shape)}, expected {tuple(shape)}")
        if value.dtype not in dtypes:
            raise ValueError(f"denoise_step: {name} has dtype {value.dtype}, expected {' or '.join(map(str, dtypes))}")
        if value.device != x.device:
            raise ValueError(f"denoise_step: {name} is on {value.device}, x on {x.device}")
        if not value.is_contiguous():
            raise ValueError(f"denoise_step: {name} has stride {tuple(value.stride())}; it must be contiguous")


def cost(
    x: Tensor, x0_prev: Tensor | None, out: Tensor, rows: Tensor, weights: Tensor, coef: Tensor, key: Tensor
) -> Cost:
    """As if every row of `out` covers one frame once; the integer work of the noise is not counted."""
    states = 3 if x0_prev is None else 4
    return Cost(
        flops=x.numel() * 8 + out.numel() * 4,
        bytes=states * x.numel() * 4 + out.numel() * out.element_size(),
    )


def aot_cases(dtype: torch.dtype) -> list:
    """With guidance and without, for one window a frame and for two, the first step and a later one."""

    def case(G: int, K: int, multistep: bool):
        F, P = 80, 128 * 128 * 3
        x = torch.empty(F, P, device="meta")
        rows = torch.empty(F, K, dtype=torch.int32, device="meta")
        return lambda: launch(
            x, torch.empty_like(x) if multistep else None, torch.empty(G, F, P, dtype=dtype, device="meta"), rows,
            torch.empty(F, K, device="meta"), torch.empty(F, 10, device="meta"),
            torch.empty(F, 5, dtype=torch.int64, device="meta"),
        )  # fmt: skip

    def in_ring(G: int, K: int, multistep: bool):
        F, P = 80, 128 * 128 * 3
        x = torch.empty(F, P, device="meta")
        out = torch.empty(G, F, P, dtype=dtype, device="meta")
        slots = torch.empty(F, dtype=torch.int32, device="meta")
        return lambda: launch_(
            x, torch.empty_like(x) if multistep else None, out, torch.empty_like(out), slots,
            torch.empty(F, K, dtype=torch.int32, device="meta"), torch.empty(F, K, device="meta"),
            torch.empty(F, 10, device="meta"), torch.empty(F, 5, dtype=torch.int64, device="meta"), slots[:1],
        )  # fmt: skip

    return [
        (f"{form}G{G}-K{K}-{'multistep' if multistep else 'single'}", function(G, K, multistep))
        for form, function, counts in (("", case, ((2, 1), (1, 2))), ("ring-", in_ring, ((2, 2), (1, 4))))
        for G, K in counts
        for multistep in (False, True)
    ]
