"""How well a score tells two kinds of words apart, with intervals from resampled scenes.

The measures are not means over words, so :func:`captum_mllm.metrics.paired_bootstrap` does not
serve; the scheme is its own: whole scenes are drawn, for all scores the same ones.
"""

import numpy as np
from jaxtyping import Bool, Float64, Shaped

from captum_mllm.metrics import Interval

Scores = Float64[np.ndarray, " words"]
Truth = Bool[np.ndarray, " words"]
Weights = Float64[np.ndarray, "draws words"]


def auroc(scores: Scores, positive: Truth, weights: Weights) -> Float64[np.ndarray, " draws"]:
    """Area under the ROC curve: the chance that a positive outranks a negative, ties half.

    Args:
        scores: one per word, larger for positives.
        positive: what the word is.
        weights: (draws, words): how often each word counts.

    Returns:
        Per row of weights a value in [0, 1]; NaN without a positive or without a negative.

    Reference:
        Hanley and McNeil, Radiology 143, 1982.

    Example:
        >>> truth = np.array([False, True, False, True])
        >>> auroc(np.array([1.0, 2.0, 3.0, 3.0]), truth, np.ones((1, 4))).tolist()
        [0.625]
    """
    order = np.argsort(scores, kind="stable")
    ranked, truth, counts = scores[order], positive[order], weights[:, order]
    if not len(ranked):
        return np.full(len(weights), np.nan)
    starts = np.flatnonzero(np.append(True, ranked[1:] > ranked[:-1]))
    ups = np.add.reduceat(counts * truth, starts, axis=1)  # per distinct score
    downs = np.add.reduceat(counts * ~truth, starts, axis=1)
    below = downs.cumsum(1) - downs
    pairs = ups.sum(1) * downs.sum(1)
    wins = (ups * (below + 0.5 * downs)).sum(1)
    return np.divide(wins, pairs, out=np.full(len(weights), np.nan), where=pairs > 0)


def f1_at(
    scores: Scores, positive: Truth, weights: Weights, threshold: float
) -> Float64[np.ndarray, " draws"]:
    """F1 of calling positive what scores at least the threshold.

    Args:
        scores: one per word, larger for positives.
        positive: what the word is.
        weights: (draws, words): how often each word counts.
        threshold: the least score that is called positive.

    Returns:
        Per row of weights a value in [0, 1]; NaN without a positive.

    Example:
        >>> truth = np.array([False, True, True])
        >>> f1_at(np.array([1.0, 2.0, 0.0]), truth, np.ones((1, 3)), 1.0).tolist()
        [0.5]
    """
    called = scores >= threshold
    hits = weights @ (called & positive)
    wanted = weights @ positive.astype(np.float64)
    both = weights @ called.astype(np.float64) + wanted
    return np.divide(2 * hits, both, out=np.full(len(weights), np.nan), where=wanted > 0)


def best_threshold(scores: Scores, positive: Truth) -> float:
    """The threshold of the highest F1; of equally good ones the highest.

    Args:
        scores: one per word, larger for positives.
        positive: what the word is.

    Returns:
        One of the scores: words that score at least as much are called positive.

    Raises:
        ValueError: no word is positive.

    Example:
        >>> best_threshold(np.array([1.0, 2.0, 3.0]), np.array([False, True, True]))
        2.0
    """
    if not positive.any():
        raise ValueError("positive holds no True: F1 is not defined; take more examples.")
    order = np.argsort(-scores, kind="stable")
    ranked, hits = scores[order], positive[order].cumsum()
    last = np.append(ranked[1:] < ranked[:-1], True)  # equal scores can't be told apart
    f1 = 2 * hits / (np.arange(1, len(ranked) + 1) + positive.sum())
    return float(ranked[last][np.argmax(f1[last])])


def drawn_weights(
    scenes: Shaped[np.ndarray, " words"], *, seed: int, n_resamples: int = 2000
) -> Weights:
    """How often each word counts: as it is, then when whole scenes are drawn with replacement.

    Args:
        scenes: the scene of each word.
        seed: of the draws.
        n_resamples: number of draws, default 2000.

    Returns:
        (1 + draws, words): ones, then whole numbers that are equal for words of one scene.

    Example:
        >>> weights = drawn_weights(np.array([4, 4, 7]), seed=0)
        >>> weights.shape, weights[0].tolist(), bool((weights[:, 0] == weights[:, 1]).all())
        ((2001, 3), [1.0, 1.0, 1.0], True)
    """
    rng, (own, place) = np.random.default_rng(seed), np.unique(scenes, return_inverse=True)
    counts = np.ones((1 + n_resamples, len(own)))
    for row in counts[1:] if len(own) else ():
        row[:] = np.bincount(rng.integers(len(own), size=len(own)), minlength=len(own))
    return counts[:, place]


def interval(values: Float64[np.ndarray, " draws"], level: float = 0.95) -> Interval:
    """A statistic with its percentile interval.

    Args:
        values: the statistic, or the difference of two, under each row of
            :func:`drawn_weights`: first of all words as they are.
        level: coverage in (0, 1), default 0.95.

    Returns:
        The first value and the interval of the others. Draws without a value (no positive, or no
        negative) are left out; NaN where there is none at all.

    Reference:
        Efron and Tibshirani, "An Introduction to the Bootstrap", 1993, percentile interval.

    Example:
        >>> truth, scores = np.array([True, False] * 4), np.array([1.0, 0.0] * 4)
        >>> interval(auroc(scores, truth, drawn_weights(np.arange(8) // 2, seed=0)))
        Interval(mean=1.0, low=1.0, high=1.0)
    """
    draws = values[1:][~np.isnan(values[1:])]
    if not len(draws):
        return Interval(float(values[0]), float("nan"), float("nan"))
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(values[0]), float(low), float(high))
