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
"""

import torch
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
    return torch.sqrt(log * -2.0)


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
        [len(frames), P], float32. Depends on nothing but the arguments: any subset, in any order, gives the same values.
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
    noisy = (n[:, 0] != 0).nonzero().squeeze(1)
    if noisy.numel():
        noise = noise_of_keys(key[noisy], x.shape[1]).to(dtype)
        new[noisy] = new[noisy] + n[noisy] * noise
    return new, x0
