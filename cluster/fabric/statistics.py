"""Statistics of noisy measurements: robust spread, Student tails, least squares, change points. Pure numpy.

Few repeats underestimate noise. All tests here therefore use Student's t with the degrees of freedom that the estimate of
the noise really has, never the normal distribution, and share a false alarm rate between all questions asked of one data set.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]

_MAD_TO_SIGMA = 1.4826
"""Standard deviation of a normal distribution over its median absolute deviation."""


def robust_spread(values: ArrayLike) -> float:
    """Standard deviation by the median absolute deviation, corrected for small samples; 0 for fewer than two values.

    The correction n / (n - 0.8) is that of Croux and Rousseeuw (1992), Time-efficient algorithms for two highly robust
    estimators of scale.
    """
    data = np.asarray(values, dtype=np.float64)
    if data.size < 2:
        return 0.0
    deviation = float(np.median(np.abs(data - np.median(data))))
    return _MAD_TO_SIGMA * deviation * data.size / (data.size - 0.8)


def noise_from_repeats(values: ArrayLike, groups: ArrayLike) -> float:
    """Standard deviation of one measurement about its group's median, robust to outliers; nan where nothing was repeated.

    Args:
        values: (N,) measurements, of the logarithm where noise is a share.
        groups: (N,) whole numbers; values with the same one are repeats of the same thing.
    """
    data = np.asarray(values, dtype=np.float64)
    _, place, counts = np.unique(np.asarray(groups), return_inverse=True, return_counts=True)
    deviations: list[Array] = []
    for index in np.flatnonzero(counts >= 2):
        members = data[place == index]
        # The median of a few values lies among them, so distances to it are too small by about this factor; one of an
        # odd number of distances is always zero and says nothing.
        away = np.sort(np.abs(members - np.median(members)))[members.size % 2 :]
        deviations.append(away * math.sqrt(members.size / max(members.size - 1, 1)))
    if not deviations:
        return math.nan
    return _MAD_TO_SIGMA * float(np.median(np.concatenate(deviations)))


def student_tail(t: float, dof: float) -> float:
    """P(T > t) for Student's t with `dof` degrees of freedom, by the incomplete beta function.

    Source: Abramowitz and Stegun (1964), Handbook of Mathematical Functions, 26.7.1 and 26.5.8.
    """
    if math.isnan(t):
        return 1.0
    if math.isinf(t):
        return 0.0 if t > 0 else 1.0
    half = 0.5 * _incomplete_beta(0.5 * dof, 0.5, dof / (dof + t * t))
    return half if t >= 0 else 1.0 - half


def student_quantile(tail: float, dof: float) -> float:
    """The t with P(T > t) = `tail`, for 0 < tail <= 0.5.

    Raises:
        ValueError: `tail` is outside that range.
    """
    if not 0.0 < tail <= 0.5:
        raise ValueError(f"tail must lie above 0 and at most at 0.5, and is {tail}")
    low, high = 0.0, 1.0
    while student_tail(high, dof) > tail:
        low, high = high, high * 2.0
    for _ in range(80):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if student_tail(middle, dof) > tail else (low, middle)
    return 0.5 * (low + high)


def _incomplete_beta(a: float, b: float, x: float) -> float:
    """Regularised I_x(a, b), by Lentz's evaluation of its continued fraction."""
    if x <= 0.0 or x >= 1.0:
        return float(x >= 1.0)
    if x > (a + 1.0) / (a + b + 2.0):
        return 1.0 - _incomplete_beta(b, a, 1.0 - x)
    front = math.exp(
        math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x) - math.log(a)
    )
    tiny = 1e-300
    c, d = 1.0, 1.0 / max(1.0 - (a + b) * x / (a + 1.0), tiny)
    fraction = d
    for m in range(1, 300):
        for numerator in (
            m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m)),
            -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1)),
        ):
            d = 1.0 + numerator * d
            d = 1.0 / (d if abs(d) > tiny else tiny)
            c = 1.0 + numerator / (c if abs(c) > tiny else tiny)
            fraction *= c * d
        if abs(c * d - 1.0) < 1e-13:
            break
    return front * fraction


@dataclass(frozen=True, kw_only=True)
class Contrast:
    """How far the mean of some values lies from zero, and how sure that is."""

    mean: float
    standard_error: float
    dof: float
    count: int

    @property
    def t(self) -> float:
        """Distance from zero in standard errors."""
        if self.standard_error > 0:
            return self.mean / self.standard_error
        return math.copysign(math.inf, self.mean) if self.mean else 0.0

    def tail_beyond(self, bound: float) -> float:
        """Probability of a mean this high or higher if the true one were `bound`."""
        if self.count < 2:
            return 1.0
        gap = self.mean - bound
        if self.standard_error > 0:
            return student_tail(gap / self.standard_error, self.dof)
        return 0.0 if gap > 0 else 1.0


def contrast(values: ArrayLike, *, known_spread: float = 0.0, known_dof: float = 0.0) -> Contrast:
    """Trimmed mean and its moderated standard error: a fifth is trimmed from each end where there are five or more.

    Args:
        values: independent comparisons, such as differences of logarithms of suspect and control.
        known_spread: standard deviation of one value as known from elsewhere, since a few values may agree by chance.
        known_dof: as how many values' worth that knowledge counts beside these. Where these vary more than all that, their
            own spread counts alone.

    Sources: Yuen (1974), The two-sample trimmed t for unequal population variances, for the trimming; Smyth (2004), Linear
    models and empirical Bayes methods, equation 7, for the moderation.
    """
    data = np.sort(np.asarray(values, dtype=np.float64))
    count = data.size
    if count == 0:
        return Contrast(mean=math.nan, standard_error=math.inf, dof=1.0, count=0)
    cut = int(0.2 * count)
    kept = data[cut : count - cut]
    own_dof = kept.size - 1
    dof = own_dof + known_dof
    if dof <= 0:
        return Contrast(mean=float(kept.mean()), standard_error=math.inf, dof=1.0, count=count)
    winsorised = np.clip(data, kept[0], kept[-1])
    own = float(np.var(winsorised, ddof=1)) * (count / kept.size) ** 2 if own_dof else 0.0
    variance = (own_dof * own + known_dof * known_spread**2) / dof
    if own > variance and own_dof >= 3:
        variance, dof = own, own_dof
    return Contrast(mean=float(kept.mean()), standard_error=math.sqrt(variance / count), dof=float(dof), count=count)


def binomial_tail(successes: int, trials: int, probability: float) -> float:
    """P(X >= successes) of `trials` with `probability` each."""
    return math.fsum(
        math.comb(trials, count) * probability**count * (1.0 - probability) ** (trials - count)
        for count in range(successes, trials + 1)
    )


@dataclass(frozen=True, kw_only=True)
class LeastSquares:
    """A weighted linear fit. All arrays (P,): one entry a coefficient."""

    coefficients: Array
    standard_errors: Array
    low: Array
    high: Array
    """Ends of the confidence interval. Infinite where there are no more points than coefficients."""
    dof: int
    residual_spread: float
    """Standard deviation of a point of weight 1 about the fit."""


def least_squares(
    design: ArrayLike, values: ArrayLike, weights: ArrayLike | None = None, *, confidence: float = 0.95
) -> LeastSquares:
    """Weighted least squares: minimises sum w (y - X b)^2, with confidence intervals by Student's t.

    Args:
        design: (N, P) matrix X, of full column rank.
        values: (N,) y.
        weights: (N,) w, in inverse variances up to one common factor; all equal without it.
        confidence: probability that one interval holds the true coefficient.

    Raises:
        ValueError: the columns of the design do not determine the coefficients.
    """
    x = np.asarray(design, dtype=np.float64)
    y = np.asarray(values, dtype=np.float64)
    root = np.sqrt(np.ones(len(y)) if weights is None else np.asarray(weights, dtype=np.float64))
    scaled = x * root[:, None]
    # Columns of very different size (one of ones, one of bytes) would otherwise look dependent.
    size = np.linalg.norm(scaled, axis=0)
    if len(y) < x.shape[1] or not np.all(size > 0) or np.linalg.matrix_rank(scaled / size) < x.shape[1]:
        raise ValueError(f"{len(y)} points do not determine {x.shape[1]} coefficients")
    solution, *_ = np.linalg.lstsq(scaled / size, y * root, rcond=None)
    coefficients = solution / size
    dof = len(y) - x.shape[1]
    left = root * (y - x @ coefficients)
    spread = math.sqrt(float(left @ left) / dof) if dof else math.inf
    inverse = np.linalg.inv((scaled / size).T @ (scaled / size))
    errors = spread * np.sqrt(np.diag(inverse)) / size if dof else np.full(x.shape[1], math.inf)
    reach = student_quantile(0.5 * (1.0 - confidence), dof) * errors if dof else errors
    return LeastSquares(
        coefficients=coefficients,
        standard_errors=errors,
        low=coefficients - reach,
        high=coefficients + reach,
        dof=dof,
        residual_spread=spread,
    )


@dataclass(frozen=True, kw_only=True)
class ChangePoint:
    """From one window on, a series stays at another level."""

    index: int
    """Of the first value at the new level."""
    before: float
    after: float
    """Medians of the stretches on either side, up to the next change, in the series' unit."""
    confidence: float

    @property
    def effect(self) -> float:
        """Growth as a share of the level before; negative where it fell."""
        return self.after / self.before - 1.0


def change_points(
    series: Sequence[float] | Array,
    *,
    min_effect: float = 0.10,
    persistence: int = 3,
    false_alarm_rate: float = 1e-3,
) -> tuple[ChangePoint, ...]:
    """Where the level of a series changes for good, in the order of time.

    Binary segmentation of the logarithm's CUSUM. The noise is that of neighbouring differences, which a change of level
    hardly touches. A running median erases whatever lasts for fewer than `persistence` values.

    Args:
        series: (N,) values above zero, such as durations of windows; one a window.
        min_effect: smallest change of interest, as a share.
        persistence: values that a level must last for.
        false_alarm_rate: of a whole series without a change.

    Raises:
        ValueError: a value is not above zero, or not finite.

    Source: Page (1954), Continuous inspection schemes; Scott and Knott (1974) for the segmentation.
    """
    data = np.asarray(series, dtype=np.float64)
    if data.size and not (np.all(np.isfinite(data)) and np.all(data > 0)):
        raise ValueError("a series whose change points are sought must be finite and above zero")
    if data.size < 2 * persistence:
        return ()
    logs = np.log(data)
    noise = robust_spread(np.diff(logs)) / math.sqrt(2.0)
    smooth = _without_blips(logs, persistence)
    cuts: dict[int, float] = {}
    waiting = [(0, data.size)]
    while waiting:
        start, stop = waiting.pop()
        found = _strongest_cut(smooth[start:stop], noise, persistence, math.log1p(min_effect))
        if found is None:
            continue
        offset, t = found
        tail = 2.0 * (stop - start) * student_tail(t, max(0.4 * (data.size - 1), 1.0))
        if tail < false_alarm_rate:
            cuts[start + offset] = tail
            waiting += [(start, start + offset), (start + offset, stop)]
    return _described(data, cuts, min_effect)


def _without_blips(logs: Array, persistence: int) -> Array:
    """Running median over 2 p - 1 values, which keeps steps; the ends take that of the first and last whole window."""
    width = min(2 * persistence - 1, logs.size)
    middle = np.median(np.lib.stride_tricks.sliding_window_view(logs, width), axis=1)
    return np.pad(middle, (width // 2, logs.size - middle.size - width // 2), mode="edge")


def _strongest_cut(logs: Array, noise: float, persistence: int, least: float) -> tuple[int, float] | None:
    """The cut with the greatest CUSUM among those whose sides differ by `least` in median, and its t."""
    count = logs.size
    if count < 2 * persistence:
        return None
    places = np.arange(persistence, count - persistence + 1)
    sums = np.cumsum(logs)
    before = sums[places - 1] / places
    after = (sums[-1] - sums[places - 1]) / (count - places)
    # With a noise of zero any step counts: the floor stands for the resolution of floating point.
    statistic = np.abs(after - before) * np.sqrt(places * (count - places) / count) / max(noise, 1e-9)
    for index in np.argsort(-statistic):
        place = int(places[index])
        step = float(np.median(logs[place:]) - np.median(logs[:place]))
        if abs(step) >= least:
            return place, float(statistic[index])
    return None


def _described(data: Array, cuts: dict[int, float], min_effect: float) -> tuple[ChangePoint, ...]:
    """Cuts as change points, without those that turn out too small between their final neighbours."""
    places = sorted(cuts)
    while True:
        edges = [0, *places, data.size]
        levels = [float(np.median(data[a:b])) for a, b in pairwise(edges)]
        steps = [abs(math.log(after / before)) for before, after in pairwise(levels)]
        if not steps or min(steps) >= math.log1p(min_effect):
            break
        del places[int(np.argmin(steps))]
    return tuple(
        ChangePoint(index=place, before=before, after=after, confidence=1.0 - cuts[place])
        for place, before, after in zip(places, levels, levels[1:])
    )
