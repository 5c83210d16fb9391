"""How certain a mean is: intervals by resampling whole scenes; and how often who wins."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Shaped
from torch import Tensor

from captum_mllm.validation import check_number

Values = (
    Shaped[np.ndarray, " scenes"]
    | Shaped[np.ndarray, "scenes values"]
    | Shaped[Tensor, " scenes"]
    | Shaped[Tensor, "scenes values"]
    | list
)


class Interval(NamedTuple):
    """A mean (or a mean difference) and the ends of its interval.

    Args:
        mean: of the value, or of the paired difference.
        low: lower end of the interval.
        high: upper end.
    """

    mean: float
    low: float
    high: float


def paired_bootstrap(
    a: Values,
    b: Values | None = None,
    *,
    n_resamples: int = 2000,
    seed: int,
    level: float = 0.95,
) -> Interval:
    """Mean of ``a``, or of ``a - b``, with a percentile interval from resampled scenes.

    Scenes (rows) are drawn with replacement, for ``a`` and ``b`` the same ones: values of one
    scene depend on each other, and so do two methods on one scene. The mean is over values, so
    that a scene with more values weighs more.

    Args:
        a: one value per scene, (scenes,), or several, (scenes, values), padded with NaN.
        b: the values of another method at the same places, or None (default) for ``a`` alone.
        n_resamples: number of resamples, default 2000.
        seed: seed of the draws; the same seed draws the same scenes.
        level: coverage of the interval in (0, 1), default 0.95.

    Returns:
        ``(mean, low, high)``. A value that is NaN in ``a`` or ``b`` is left out in both, and a
        scene without any value is not drawn; without any scene all three are NaN.

    Raises:
        ValueError: ``a`` is not 1- or 2-dimensional or holds an infinity, the shapes differ,
            ``n_resamples`` < 1 or ``level`` outside (0, 1).

    Reference:
        Efron and Tibshirani, "An Introduction to the Bootstrap", 1993, percentile interval.

    Example:
        >>> interval = paired_bootstrap([0.5, 0.7, 0.6], [0.4, 0.6, 0.5], seed=0)
        >>> [round(x, 3) for x in interval]  # the difference is 0.1 in every scene
        [0.1, 0.1, 0.1]
    """
    values = _values(a, "a")
    if b is not None:
        values = values - _paired(values, b, "a", "b")
    return _interval([values], lambda means: means[..., 0], n_resamples, seed, level)


def paired_bootstrap_f1(
    a: tuple[Values, Values],
    b: tuple[Values, Values] | None = None,
    *,
    n_resamples: int = 2000,
    seed: int,
    level: float = 0.95,
) -> Interval:
    """F1-IoU of ``a``, or that of ``a`` minus that of ``b``, with an interval as above.

    F1-IoU is not a mean but the harmonic mean of two means over all words of all scenes. So both
    means, and their harmonic mean, are computed again for each resample of scenes.

    Args:
        a: Obj-IoU and Func-IoU of one method, each (scenes, values) padded with NaN; the two may
            differ in their number of values, not of scenes.
        b: the same of another method at the same places, or None (default) for ``a`` alone.
        n_resamples: number of resamples, default 2000.
        seed: seed of the draws; the same seed draws the same scenes.
        level: coverage of the interval in (0, 1), default 0.95.

    Returns:
        ``(mean, low, high)``, of which ``mean`` is the F1-IoU (or the difference) of all scenes.
        Values that are NaN in one method are left out in both. All three are NaN where one of the
        two has no value at all; a resample without one is left out.

    Raises:
        ValueError: see :func:`paired_bootstrap`; numbers of scenes that differ.

    Reference:
        The estimator is TAM's F1-IoU (:func:`captum_mllm.metrics.f1_iou`); its interval is ours.

    Example:
        >>> obj, func = [[0.2, 0.4], [0.3, float("nan")]], [[0.6], [0.6]]
        >>> round(paired_bootstrap_f1((obj, func), seed=0).mean, 3)  # of 0.3 and 0.6
        0.4
    """
    names = ("Obj-IoU", "Func-IoU")
    parts = [_values(values, f"a's {name}") for values, name in zip(a, names, strict=True)]
    if len(parts[0]) != len(parts[1]):
        raise ValueError(
            f"a must hold both values of the same scenes, got {len(parts[0])} and {len(parts[1])}."
        )
    if b is None:
        return _interval(parts, _f1, n_resamples, seed, level)
    others = [
        _paired(part, values, f"a's {name}", f"b's {name}")
        for part, values, name in zip(parts, b, names, strict=True)
    ]
    gaps = [np.isnan(part - other) for part, other in zip(parts, others, strict=True)]
    kept = [np.where(gap, np.nan, v) for gap, v in zip(gaps * 2, parts + others, strict=True)]
    return _interval(kept, lambda m: _f1(m[..., :2]) - _f1(m[..., 2:]), n_resamples, seed, level)


class WinsTiesLosses(NamedTuple):
    """How often one method beats another on the same value.

    Args:
        wins: number of values at which the first is larger by more than the tolerance.
        ties: number of values that differ by at most the tolerance.
        losses: number of values at which the first is smaller by more than the tolerance.
    """

    wins: int
    ties: int
    losses: int


def wins_ties_losses(a: Values, b: Values, *, tolerance: float = 0.0) -> WinsTiesLosses:
    """Count where ``a`` is larger than ``b``, equal, or smaller.

    A mean can come from a few scenes; this says in how many of them a method is ahead.

    Args:
        a: one value per scene, (scenes,), or several, (scenes, values), padded with NaN; the
            larger one wins.
        b: the values of another method at the same places.
        tolerance: differences up to this are ties, default 0.

    Returns:
        Counts; a value that is NaN in ``a`` or ``b`` is in none of them.

    Raises:
        ValueError: ``a`` is not 1- or 2-dimensional or holds an infinity, the shapes differ, or
            ``tolerance`` is below 0.

    Reference:
        Demšar, "Statistical comparisons of classifiers over multiple data sets", JMLR 2006.

    Example:
        >>> wins_ties_losses([0.5, 0.7, 0.6], [0.4, 0.7, float("nan")])
        WinsTiesLosses(wins=1, ties=1, losses=0)
    """
    tolerance = check_number("tolerance", tolerance, "from 0", lambda t: 0 <= t < float("inf"))
    values = _values(a, "a")
    gap = values - _paired(values, b, "a", "b")
    wins, losses = int((gap > tolerance).sum()), int((gap < -tolerance).sum())
    return WinsTiesLosses(wins, int((~np.isnan(gap)).sum()) - wins - losses, losses)


def _f1(means: np.ndarray) -> np.ndarray:
    """Harmonic mean over the last axis of two; 0 where both are 0."""
    total = means.sum(-1)
    return 2 * means.prod(-1) / np.where(total == 0, 1.0, total)


def _paired(values: np.ndarray, other: Any, name: str, other_name: str) -> np.ndarray:
    others = _values(other, other_name)
    if values.shape != others.shape:
        raise ValueError(
            f"{name} and {other_name} must have the same shape, got {values.shape} and "
            f"{others.shape}; give both the same scenes and pad missing values with NaN."
        )
    return others


def _interval(
    parts: list[np.ndarray],
    statistic: Callable[[np.ndarray], np.ndarray],
    n_resamples: int,
    seed: int,
    level: float,
) -> Interval:
    """``statistic`` of the parts' pooled means, (..., parts), over all scenes and resampled."""
    if not 0.0 < level < 1.0:
        raise ValueError(f"level must lie strictly between 0 and 1, got {level}.")
    if n_resamples < 1:
        raise ValueError(f"n_resamples must be at least 1, got {n_resamples}.")
    counts = np.stack([(~np.isnan(values)).sum(1) for values in parts], axis=1)
    sums = np.stack([np.nansum(values, axis=1) for values in parts], axis=1)
    sums, counts = sums[counts.any(1)], counts[counts.any(1)]
    n_scenes = len(sums)
    if not counts.any(0).all():
        return Interval(float("nan"), float("nan"), float("nan"))
    rng = np.random.default_rng(seed)
    means = np.full((n_resamples, len(parts)), np.nan)
    for i in range(n_resamples):
        drawn = rng.integers(n_scenes, size=n_scenes)
        total = counts[drawn].sum(0)
        np.divide(sums[drawn].sum(0), total, out=means[i], where=total > 0)
    resampled = statistic(means)
    resampled = resampled[~np.isnan(resampled)]
    ends = [(1 - level) / 2, (1 + level) / 2]
    low, high = np.quantile(resampled, ends) if len(resampled) else (np.nan, np.nan)
    return Interval(float(statistic(sums.sum(0) / counts.sum(0))), float(low), float(high))


def _values(values: Any, name: str) -> np.ndarray:
    """(scenes, values) in float64."""
    if isinstance(values, Tensor):
        values = values.detach().cpu().double().numpy()
    array = np.asarray(values, dtype=np.float64)
    if array.ndim not in (1, 2):
        raise ValueError(f"{name} must be (scenes,) or (scenes, values), got shape {array.shape}.")
    if np.isinf(array).any():
        raise ValueError(f"{name} must be finite or NaN (no value), got an infinity.")
    return array.reshape(len(array), -1) if array.size else array.reshape(len(array), 0)
