"""How sure a mean is: intervals by resampling whole scenes."""

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Shaped
from torch import Tensor

Values = (
    Shaped[np.ndarray, " scenes"]
    | Shaped[np.ndarray, "scenes values"]
    | Shaped[Tensor, " scenes"]
    | Shaped[Tensor, "scenes values"]
    | list
)


class Interval(NamedTuple):
    """A mean (or a mean difference) and the ends of its interval."""

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
    if not 0.0 < level < 1.0:
        raise ValueError(f"level must lie strictly between 0 and 1, got {level}.")
    if n_resamples < 1:
        raise ValueError(f"n_resamples must be at least 1, got {n_resamples}.")
    values = _values(a, "a")
    if b is not None:
        others = _values(b, "b")
        if values.shape != others.shape:
            raise ValueError(
                f"a and b must have the same shape, got {values.shape} and {others.shape}; give "
                "both the same scenes and pad missing values with NaN."
            )
        values = values - others
    counts = (~np.isnan(values)).sum(1)
    sums, counts = np.nansum(values, axis=1)[counts > 0], counts[counts > 0]
    n_scenes = len(sums)
    if n_scenes == 0:
        return Interval(float("nan"), float("nan"), float("nan"))
    rng = np.random.default_rng(seed)
    means = np.empty(n_resamples)
    for i in range(n_resamples):
        drawn = rng.integers(n_scenes, size=n_scenes)
        means[i] = sums[drawn].sum() / counts[drawn].sum()
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(sums.sum() / counts.sum()), float(low), float(high))


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
