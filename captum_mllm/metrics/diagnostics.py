"""Signs that a map shows where models park attention rather than an object."""

import numpy as np
from jaxtyping import Float64

from captum_mllm.metrics._arrays import Maps, Masks, Scores, against_mask, as_maps, per_example
from captum_mllm.validation import ArgumentError


def border_mass(map: Maps, width: int = 1) -> Scores:
    """Share of the map's positive values that lies in the outermost cells.

    Attention sinks often sit in corners and along edges. Compare with the border's share of the
    area: 52 of 14 x 14 cells are 27 %.

    Args:
        map: any values, on the model's grid; negative ones count as 0.
        width: cells from each edge, default 1.

    Returns:
        Value in [0, 1] per example; a map without a positive value counts as constant.

    Raises:
        ValueError: the map is not finite, or ``width`` is not a whole number of at least 1.

    Reference:
        Ours; attention sinks: arXiv 2309.17453.

    Example:
        >>> import numpy as np
        >>> border_mass(np.array([[0.0, 1.0, 0.0], [0.0, 3.0, 0.0], [0.0, 0.0, 0.0]]))
        0.25
    """
    if isinstance(width, bool) or not isinstance(width, int) or width < 1:
        raise ArgumentError("width", f"must be a whole number of at least 1, got {width!r}.")

    def one(values: np.ndarray) -> float:
        shares = _shares(values)
        return float(shares.sum() - shares[width:-width, width:-width].sum())

    return per_example(one, as_maps(map), names=("map",))


def centroid_distance(map: Maps, mask: Masks) -> Scores:
    """Distance from the centroid of the map's positive values to that of the mask.

    Args:
        map: any values, at the mask's size; negative ones count as 0.
        mask: the object, bool or 0/1.

    Returns:
        Per example, in diagonals of the map, in [0, 1]; lower is better. NaN for an empty mask; a
        map without a positive value counts as constant: its centroid is the centre.

    Raises:
        ValueError: the shapes differ, the map is not finite, or the mask holds other values than
            0 and 1.

    Reference:
        Ours.

    Example:
        >>> import numpy as np
        >>> values, mask = np.zeros((3, 4)), np.zeros((3, 4), dtype=bool)
        >>> values[0, 0] = mask[0, 1] = 1
        >>> centroid_distance(values, mask)  # one cell of a diagonal of five
        0.2
    """

    def one(values: np.ndarray, truth: np.ndarray) -> float:
        apart = _centroid(_shares(values)) - _centroid(truth / truth.sum())
        return float(np.hypot(*apart) / np.hypot(*values.shape))

    return against_mask(one, map, mask)


def _shares(values: np.ndarray) -> Float64[np.ndarray, "height width"]:
    """Share of each cell in the positive values."""
    positive = values.clip(min=0)
    largest = positive.max()
    if largest == 0:
        return np.full(values.shape, 1 / values.size)
    positive = positive / largest  # sums of the largest floats overflow
    return positive / positive.sum()


def _centroid(shares: np.ndarray) -> Float64[np.ndarray, " axes"]:
    """(row, column), from shares that sum to 1."""
    return np.array(
        [shares.sum(1) @ np.arange(shares.shape[0]), shares.sum(0) @ np.arange(shares.shape[1])]
    )
