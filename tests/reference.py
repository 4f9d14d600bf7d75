"""Slow and obvious: every default metric in NumPy float64, from whole maps and token sequences."""

from __future__ import annotations

import itertools

import numpy as np
from scipy import optimize, special


def cosine(a, b):
    """Cosine of two vectors; NaN where one is zero."""
    length = np.linalg.norm(a) * np.linalg.norm(b)
    return np.nan if length == 0 else float(a @ b / length)


def vectors(maps, axis, centred):
    """maps [L, H, N, N] -> unit vectors [L, H, tokens, length]."""
    x = maps if axis == "row" else np.swapaxes(maps, -1, -2)
    if centred:
        x = x - x.mean(-1, keepdims=True)
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def similarity(maps, axis="column", centred=False):
    """maps [B, L, H, N, N] -> real, other_token, other_head, other_image [L, L] and per-image real [B, L, L]."""
    B, L, H, N, _ = maps.shape
    x = np.stack([vectors(m, axis, centred) for m in maps])  # [B, L, H, N, length]
    real = np.einsum("bphtv,bqhtv->bpq", x, x) / (H * N)
    token = np.zeros((B, L, L))
    for b, h in itertools.product(range(B), range(H)):
        cosines = np.einsum("psv,qtv->pqst", x[b, :, h], x[b, :, h])
        token[b] += cosines.sum((-1, -2)) - np.trace(cosines, axis1=-2, axis2=-1)
    token /= H * N * (N - 1)
    head = np.zeros((B, L, L))
    for g, h in itertools.permutations(range(H), 2):
        head += np.einsum("bptv,bqtv->bpq", x[:, :, g], x[:, :, h])
    head /= max(N * H * (H - 1), 1)
    image = np.zeros((L, L))
    for a, b in itertools.permutations(range(B), 2):
        image += np.einsum("phtv,qhtv->pq", x[a], x[b])
    image /= max(B * (B - 1), 1) * H * N
    return {
        "real": real.mean(0),
        "other_token": token.mean(0),
        "other_head": head.mean(0),
        "other_image": image,
        "per_image": real,
        "stderr": real.std(0, ddof=1) / np.sqrt(B) if B > 1 else np.full((L, L), np.nan),
    }


def entropy(maps):
    """maps [B, L, H, N, N] -> [L, H], nats."""
    terms = np.where(maps > 0, maps * np.log(np.where(maps > 0, maps, 1.0)), 0.0)
    return -terms.sum(-1).mean((0, 3))


def patch_cosine(patches):
    """P of one image's patches [P, D], pair by pair."""
    n = len(patches)
    found = [abs(cosine(patches[i], patches[j])) for i in range(n) for j in range(n) if i != j]
    return float(np.nanmean(found))


def patch_diversity(tokens):
    """tokens [B, depth, P, D] -> [depth]."""
    unit = tokens / np.linalg.norm(tokens, axis=-1, keepdims=True)
    n = tokens.shape[2]
    gram = np.abs(np.einsum("bdpv,bdqv->bdpq", unit, unit))
    off = gram.sum((-1, -2)) - np.trace(gram, axis1=-2, axis2=-1)
    return 1 - (off / (n * (n - 1))).mean(0)


def feature_similarity(tokens):
    """tokens [B, depth, P, D] -> [depth, depth]."""
    unit = tokens / np.linalg.norm(tokens, axis=-1, keepdims=True)
    return np.einsum("bptv,bqtv->pq", unit, unit) / (len(tokens) * tokens.shape[2])


def one_sided(values, mean, sign=1):
    """p that the mean is above (sign 1) or below (−1) `mean`: the larger of Student's and Hall's, one sample at a time."""
    x = sign * (np.asarray(values) - mean)
    n, middle = len(x), sum(x) / len(x)
    second, third = (sum((each - middle) ** power for each in x) / n for power in (2, 3))
    skewness, u = third / second**1.5, middle / np.sqrt(second * n / (n - 1))
    hall = u + skewness * u**2 / 3 + skewness**2 * u**3 / 27 + skewness / (6 * n)
    return special.stdtr(n - 1, -np.sqrt(n) * min(u, hall))


def interval_ends(values, tail=0.025):
    """Where the one-sided tests just reject, by halving; the mean twice where all values are the same."""
    if np.ptp(values) == 0:
        return [values[0]] * 2
    middle, ends = np.mean(values), []
    for sign in (1, -1):
        far = middle - sign * 1e3 * np.std(values)
        ends.append(optimize.brentq(lambda mean, sign=sign: one_sided(values, mean, sign) - tail, far, middle))
    return ends
