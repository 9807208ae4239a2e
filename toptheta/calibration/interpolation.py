"""From calibrated values to look-up tables by row length: interpolation to uncalibrated lengths, and
smoothing.

Pure numpy, all heads of a layer at once. Used for thresholds and SDC tables.
"""

from itertools import combinations

import numpy as np

from toptheta.util.errors import UsageError

MAX_FIT_LENGTH = 1 << 17  # 'fit' tables reach this row length at most: 512 KB a head
LEAST_POSITIVE = 1e-12  # minimum of values whose logarithm is fitted: lower ones would dominate the fit


def lookup_table(
    values: np.ndarray,
    samples: np.ndarray,
    k: int,
    below: float,
    interp: str = "nearest",
    smooth: int = 0,
    max_n: int = 0,
    within: tuple[float, float] = (-np.inf, np.inf),
) -> np.ndarray:
    """Fill a `[H, L]` table, NaN where not calibrated, for every row length; returns float32 `[H, L]`.

    samples: `[H, L]`, the number of samples of each value. Lengths up to `k`, whose rows stay dense, get
    `below`; look up lengths of L and more at L - 1. interp: 'nearest', 'linear' or 'fit', which extends the
    table to row length `max_n` (at most MAX_FIT_LENGTH) and keeps values within the open interval `within`;
    if that starts at 0, logarithms are fitted. smooth: see `smoothed`. Raises ValueError for a head without a
    calibrated length, UsageError for one without a length above `k` to fit.
    """
    empty = np.isnan(values).all(axis=1)
    if empty.any():
        raise ValueError(f"head {int(empty.argmax())} has no calibrated row length")
    if smooth > 0:
        values = smoothed(values, samples, smooth)
    if interp == "nearest":
        return nearest_lookup(values, k, below)
    if interp == "linear":
        return linear_lookup(values, k, below)
    length = max(values.shape[1], min(max_n, MAX_FIT_LENGTH) + 1)
    return fit_lookup(values, samples, k, below, length, within)


def smoothed(values: np.ndarray, samples: np.ndarray, width: int) -> np.ndarray:
    """Replace each calibrated value of `[H, L]` by the mean of those whose lengths differ by at most `width`,
    weighted by their samples."""
    known = ~np.isnan(values)
    weights = _weights(values, samples)
    window = np.arange(values.shape[1])
    first = (window - width).clip(min=0)
    stop = (window + width + 1).clip(max=values.shape[1])

    def window_sums(x: np.ndarray) -> np.ndarray:
        sums = np.concatenate([np.zeros((len(x), 1)), x.cumsum(axis=1)], axis=1)
        return sums[:, stop] - sums[:, first]

    total = window_sums(weights * np.where(known, values, 0.0))
    return np.divide(total, window_sums(weights), out=np.full(values.shape, np.nan), where=known)


def nearest_lookup(values: np.ndarray, k: int, below: float) -> np.ndarray:
    """Each length takes the value of the nearest calibrated length (the smaller in a tie); see
    `lookup_table`."""
    num_heads, length = values.shape
    wanted = np.arange(length)
    out = np.empty((num_heads, length), dtype=np.float32)
    for head in range(num_heads):
        known = np.flatnonzero(~np.isnan(values[head]))
        if known.size == 0:
            raise ValueError(f"head {head} has no calibrated row length")
        right = np.searchsorted(known, wanted).clip(max=known.size - 1)
        left = (right - 1).clip(min=0)
        nearer_left = np.abs(wanted - known[left]) <= np.abs(known[right] - wanted)
        out[head] = values[head, np.where(nearer_left, known[left], known[right])]
    out[:, : k + 1] = below
    return out


def linear_lookup(values: np.ndarray, k: int, below: float) -> np.ndarray:
    """Lengths between two calibrated ones are interpolated linearly, those beyond the ends take the nearest
    value; see `lookup_table`."""
    wanted = np.arange(values.shape[1])
    out = np.empty(values.shape, dtype=np.float32)
    for head, row in enumerate(values):
        known = np.flatnonzero(~np.isnan(row))
        out[head] = np.interp(wanted, known, row[known])
    out[:, : k + 1] = below
    return out


def fit_lookup(
    values: np.ndarray,
    samples: np.ndarray,
    k: int,
    below: float,
    length: int,
    within: tuple[float, float] = (-np.inf, np.inf),
) -> np.ndarray:
    """A smooth monotone curve per head, at all lengths below `length`; see `lookup_table`.

    y(n) = a + b log(n) - c K/n + d log(1 - K/n) with b, c, d of the same sign: each term rises with n, so y
    is monotone. The last two terms model the steep start (at n = K + 1 the sample is the row's minimum), the
    first the growth at large n. Least squares over the calibrated lengths, weighted by their samples, with a
    ridge penalty of one sample on b, c and d: lengths that are close together do not determine a trend, and
    without the penalty their noise would be extrapolated.
    """
    low, high = within
    known = np.flatnonzero(~np.isnan(values).all(axis=0))
    known = known[known > k]
    weights = _weights(values, samples)[:, known]
    y = np.where(weights > 0.0, values[:, known], 0.0)
    if low == 0.0:
        y = np.log(np.maximum(y, LEAST_POSITIVE))
    total = weights.sum(axis=1, keepdims=True)
    if not total.all():
        raise UsageError(
            f"calib_interp fit needs a calibrated row length above K={k} for each head, and head "
            f"{int((total[:, 0] == 0).argmax())} has none: use calib_interp nearest, or calibrate again."
        )
    x = _rising(known, k)
    y_mean = (weights * y).sum(axis=1, keepdims=True) / total
    x_mean = weights @ x.T / total
    x_own = x[None] - x_mean[:, :, None]
    weighted = weights[:, None] * x_own
    gram = weighted @ x_own.transpose(0, 2, 1) + np.eye(len(x))
    moment = (weighted @ (y - y_mean)[:, :, None])[:, :, 0]
    slopes = _one_sign_slopes(gram, moment)
    start = y_mean - (slopes * x_mean).sum(axis=1, keepdims=True)

    out = np.full((len(values), length), below, dtype=np.float32)
    curve = start + slopes @ _rising(np.arange(k + 1, length), k)
    if low == 0.0:
        curve = np.exp(np.minimum(curve, 80.0))  # float32 ends at exp(88)
    limits = np.finfo(np.float32)
    highest = limits.max if np.isinf(high) else np.nextafter(np.float32(high), np.float32(low))
    out[:, k + 1 :] = curve.clip(limits.min if np.isinf(low) else limits.tiny, highest)
    return out


def _rising(n: np.ndarray, k: int) -> np.ndarray:
    """`[3, N]`: log(n), -K/n and log(1 - K/n) of lengths n > K."""
    return np.stack([np.log(n), -k / n, np.log1p(-k / n)])


def _one_sign_slopes(gram: np.ndarray, moment: np.ndarray) -> np.ndarray:
    """`[H, T]` minimisers of s G s / 2 - m s with all s >= 0 or all s <= 0; gram `[H, T, T]`, moment
    `[H, T]`.

    At the minimum some s are 0 and the others are unconstrained: all subsets of the few terms are tried.
    """
    terms = moment.shape[1]
    best, most = np.zeros_like(moment), np.zeros(len(moment))
    for size in range(1, terms + 1):
        for subset in map(list, combinations(range(terms), size)):
            free = np.linalg.solve(gram[:, subset][:, :, subset], moment[:, subset, None])[:, :, 0]
            gain = (free * moment[:, subset]).sum(axis=1)
            better = ((free >= 0.0).all(axis=1) | (free <= 0.0).all(axis=1)) & (gain > most)
            best[better] = 0.0
            best[np.ix_(better, subset)] = free[better]
            most = np.where(better, gain, most)
    return best


def _weights(values: np.ndarray, samples: np.ndarray) -> np.ndarray:
    """The number of samples of each calibrated value, at least 1; 0 where not calibrated."""
    return np.where(np.isnan(values), 0.0, np.maximum(samples, 1))
