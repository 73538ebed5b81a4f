"""Step by step over the whole clip in plain numpy: what the runtime must give bit for bit. Shares no code with it.

Windows, weights, noise and the step are written anew from their definitions, for frames held as [T, P] arrays.
"""

from __future__ import annotations

import math

import numpy as np

F32 = np.float32

# ---- windows ---------------------------------------------------------------------------------------------------------


def window_starts(num_frames, window, overlap, loop):
    stride = window - overlap
    if loop:
        return list(range(0, num_frames, stride))
    starts = [0]
    while starts[-1] + window < num_frames:
        starts.append(min(starts[-1] + stride, num_frames - window))
    return starts


def window_frames(start, num_frames, window, halo, multiple, loop):
    """(frames read at each position, {frame: position} that the window writes)."""
    length = -(-(window + 2 * halo) // multiple) * multiple
    wanted = [start - halo + i for i in range(length)]
    read = [f % num_frames if loop else min(max(f, 0), num_frames - 1) for f in wanted]
    written = {}
    for i in range(halo, halo + window):
        if loop or wanted[i] < num_frames:
            written.setdefault(read[i], i)
    return read, written


def profile(weights, window):
    centre = (window - 1) / 2
    if weights == "flat":
        return [1.0] * window
    if weights == "linear":
        return [(window + 1) / 2 - abs(i - centre) for i in range(window)]
    return [math.exp(-0.5 * ((i - centre) / (0.25 * window)) ** 2) for i in range(window)]


# ---- noise -----------------------------------------------------------------------------------------------------------


def normals(seed, stage, step, frame, count):
    n = (count + 3) // 4
    c = [np.arange(n, dtype=np.uint64)] + [np.full(n, v % 2**32, np.uint64) for v in (frame, step + 1, stage)]
    k0, k1 = seed % 2**32, seed >> 32
    low = np.uint64(0xFFFFFFFF)
    for _ in range(10):
        a, b = c[0] * np.uint64(0xD2511F53), c[2] * np.uint64(0xCD9E8D57)
        c = [(b >> np.uint64(32)) ^ c[1] ^ np.uint64(k0), b & low, (a >> np.uint64(32)) ^ c[3] ^ np.uint64(k1), a & low]
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    out = np.empty((n, 4), F32)
    for pair in (0, 2):
        mantissa, exponent = np.frexp(((c[pair] >> np.uint64(8)) + np.uint64(1)).astype(F32) * F32(2.0**-24))
        # mantissa in [1/2, 1): the series is around 1, in [sqrt(1/2), sqrt(2))
        small = mantissa < np.sqrt(F32(0.5))
        mantissa, exponent = np.where(small, mantissa * F32(2), mantissa), np.where(small, exponent - 1, exponent)
        f, e = mantissa - F32(1), exponent.astype(F32)
        poly = np.full_like(f, F32(-0.07635655254125595))
        for term in (
            0.12763327360153198,
            -0.1316058188676834,
            0.14201553165912628,
            -0.16623298823833466,
            0.20001234114170074,
            -0.250008225440979,
            0.3333333134651184,
        ):
            poly = poly * f + F32(term)
        z = f * f
        tail = (poly * f) * z + e * F32(-2.1219444170128554e-4) - z * F32(0.5)
        radius = np.sqrt(((f + tail) + e * F32(0.693359375)) * F32(-2))
        turn = (c[pair + 1] >> np.uint64(8)).astype(np.int64)
        quarter = (turn + 2**21) >> 22
        x = (turn - (quarter << 22)).astype(F32) * F32(2.0**-24)
        y = x * x
        sine = (
            ((y * F32(-76.76246643066406) + F32(81.62535095214844)) * y + F32(-41.34186553955078)) * y
            + F32(6.2831854820251465)
        ) * x
        cosine = (
            ((y * F32(59.22924041748047) + F32(-85.4432373046875)) * y + F32(64.93932342529297)) * y
            + F32(-19.739208221435547)
        ) * y + F32(1)
        quarter %= 4
        out[:, pair] = radius * np.choose(quarter, [cosine, -sine, -cosine, sine])
        out[:, pair + 1] = radius * np.choose(quarter, [sine, cosine, -sine, -cosine])
    return out.ravel()[:count]


# ---- the loop --------------------------------------------------------------------------------------------------------


def lane_sum(values):
    """Lane i % 16 adds in ascending order, then the lanes are added in order; all in float64."""
    lanes = np.zeros(16)
    padded = np.concatenate([values.astype(np.float64), np.zeros(-len(values) % 16)]).reshape(-1, 16)
    for row in padded:
        lanes = lanes + row
    total = lanes[0]
    for lane in lanes[1:]:
        total = total + lane
    return total


def lane_square_sum(values):
    return lane_sum(values.astype(np.float64) ** 2)


def deviation(values):
    n = float(len(values))
    mean = lane_sum(values) / n
    return math.sqrt(max(0.0, lane_square_sum(values) / n - mean * mean))


def quantile(values, q):
    ordered = np.sort(values).astype(np.float64)
    place = q * (len(ordered) - 1)
    low = math.floor(place)
    if low + 1 >= len(ordered):
        return ordered[low]
    return ordered[low] + (ordered[low + 1] - ordered[low]) * (place - low)


def sample_offline(
    denoise,
    *,
    num_frames,
    num_values,
    coef,
    init_sigma,
    init_alpha,
    window,
    overlap,
    weights,
    loop,
    halo,
    multiple,
    seed,
    stage,
    guidance,
    clip,
    threshold=None,
    threshold_max=0.0,
    rescale=0.0,
    initial=None,
):
    """denoise(x [L, P], step, window, frames) -> [G, L, P]. Returns [T, P]."""
    starts = window_starts(num_frames, window, overlap, loop)
    spans = [window_frames(start, num_frames, window, halo, multiple, loop) for start in starts]
    shape = profile(weights, window)
    coef = np.asarray(coef, F32)
    x = np.stack([F32(init_sigma) * normals(seed, stage, -1, f, num_values) for f in range(num_frames)])
    if initial is not None:
        x = F32(init_alpha) * initial + x
    x0_prev = np.zeros_like(x)
    for step in range(len(coef)):
        outputs = [denoise(x[read], step, w, read) for w, (read, _) in enumerate(spans)]
        u, v, p, q, r, n = coef[step]
        new_x, new_x0 = np.empty_like(x), np.empty_like(x)
        for f in range(num_frames):
            covering = [w for w, (_, written) in enumerate(spans) if f in written]
            raw = [shape[spans[w][1][f] - halo] for w in covering]
            total = 0.0
            for value in raw:
                total = total + value
            average = cond_average = None
            for w, value in zip(covering, raw, strict=True):
                out = outputs[w][:, spans[w][1][f]]
                weight = F32(value / total)
                o = out[0] if len(out) == 1 else out[1] + F32(guidance) * (out[0] - out[1])
                average = weight * o if average is None else average + weight * o
                cond_average = weight * out[0] if cond_average is None else cond_average + weight * out[0]
            gain, bound, scale = F32(1), F32(math.inf if clip is None else clip), F32(1)
            if rescale and len(out) == 2 and deviation(average) > 0:
                phi = float(F32(rescale))
                gain = F32(phi * (deviation(cond_average) / deviation(average)) + (1 - phi))
            average = average * gain
            x0 = u * x[f] + v * average
            if threshold:
                s = max(float(bound), quantile(np.abs(x0), threshold))
                if threshold_max:
                    s = min(s, max(float(bound), threshold_max))
                scale = F32(float(bound) / float(F32(s)))
                bound = F32(s)
            x0 = np.minimum(np.maximum(x0, -bound), bound) * scale
            value = p * x[f] + q * x0
            if r != 0 and step > 0:
                value = value + r * x0_prev[f]
            if n != 0:
                value = value + n * normals(seed, stage, step, f, num_values)
            new_x[f], new_x0[f] = value, x0
        x, x0_prev = new_x, new_x0
    return x
