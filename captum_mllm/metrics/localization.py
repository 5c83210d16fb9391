"""How well a map localises an object, measured against the object's mask."""

import numpy as np
from jaxtyping import Bool, Float64

from captum_mllm.metrics._arrays import (
    Maps,
    Masks,
    Scores,
    against_mask,
    as_maps,
    as_masks,
    extra,
    per_example,
)

OTSU_BINS = 256


ROUNDING = 1e-5  # how far interpolation in float32 may leave [0, 1]


def otsu_threshold(map: Maps) -> Scores:
    """Otsu's threshold over 256 bins on [0, 1]; the map is *not* rescaled on its own.

    The histogram's split that maximises the variance between the two classes; among equal splits
    the lowest. The value returned lies just below the upper edge of the last bin of the lower
    class, so that ``map > threshold`` is exactly the upper class (the bin's centre, as images
    with 256 integer levels use it, would put half of that bin into the wrong class).

    Args:
        map: values in [0, 1], as :func:`captum_mllm.functional.joint_min_max` makes them.

    Returns:
        Threshold per map. Where all values share one bin, the map's maximum: nothing lies above.

    Raises:
        ValueError: a value is NaN or outside [0, 1].
        ImportError: scikit-image is not installed.

    Reference:
        Otsu, "A threshold selection method from gray-level histograms", 1979; the bins are TAM's.

    Example:
        >>> import numpy as np
        >>> dark_and_bright = np.array([[0.1, 0.1, 0.9], [0.1, 0.9, 0.9]])
        >>> (dark_and_bright > otsu_threshold(dark_and_bright)).astype(int).tolist()
        [[0, 0, 1], [0, 1, 1]]
    """
    return per_example(_otsu, as_maps(map))


def iou(pred_mask: Masks, mask: Masks) -> Scores:
    """Intersection over union of two masks.

    Args:
        pred_mask: predicted mask, bool or 0/1.
        mask: true mask of the same shape.

    Returns:
        Value in [0, 1] per example; NaN where both masks are empty.

    Raises:
        ValueError: the shapes differ, or a mask holds other values than 0 and 1.

    Reference:
        Jaccard index.

    Example:
        >>> import numpy as np
        >>> iou(np.array([[1, 1, 0]]), np.array([[0, 1, 1]])) == 1 / 3
        True
    """
    truth = as_masks(mask, "mask")
    return per_example(_iou, as_masks(pred_mask, "pred_mask"), truth, names=("pred_mask", "mask"))


def obj_iou(map: Maps, mask: Masks) -> Scores:
    """IoU of the mask and the map above its Otsu threshold.

    Args:
        map: values in [0, 1], already at the mask's size
            (:func:`captum_mllm.functional.upsample`).
        mask: the object, bool or 0/1.

    Returns:
        Value in [0, 1] per example; 0 for a constant map, NaN for an empty mask.

    Raises:
        ValueError: see :func:`otsu_threshold` and :func:`iou`.
        ImportError: scikit-image is not installed.

    Reference:
        TAM's Obj-IoU for one map and one object.

    Example:
        >>> import numpy as np
        >>> float(obj_iou(np.array([[0.1, 0.8, 0.9, 0.9]]), np.array([[0, 0, 1, 1]])))
        0.6666666666666666
    """
    return against_mask(lambda m, k: _iou(m > _otsu(m), k), map, mask)


def oracle_iou(map: Maps, mask: Masks) -> Scores:
    """Best IoU over all thresholds on the map: its ranking without its calibration.

    Args:
        map: any values, larger is more.
        mask: the object, bool or 0/1.

    Returns:
        Value in [0, 1] per example, never below the mask's share of the area; NaN for an empty
        mask.

    Raises:
        ValueError: the shapes differ, the map is not finite, or the mask holds other values than
            0 and 1.

    Reference:
        Ours: separates a better ranking of cells from a better calibration.

    Example:
        >>> import numpy as np
        >>> oracle_iou(np.array([[0.1, 0.2, 0.3, 0.9]]), np.array([[0, 0, 1, 1]]))
        1.0
    """
    return against_mask(_oracle_iou, map, mask)


def average_precision(map: Maps, mask: Masks) -> Scores:
    """Average precision of the pixels, ranked by the map: no threshold, depends on object size.

    Args:
        map: any values, larger is more.
        mask: the object, bool or 0/1.

    Returns:
        Value in (0, 1] per example, the mask's share of the area for a constant map; NaN for an
        empty mask.

    Raises:
        ValueError: the shapes differ, the map is not finite, or the mask holds other values than
            0 and 1.
        ImportError: scikit-learn is not installed.

    Reference:
        ``sklearn.metrics.average_precision_score``.

    Example:
        >>> import numpy as np
        >>> round(average_precision(np.array([[0.9, 0.5, 0.4]]), np.array([[1, 0, 1]])), 4)
        0.8333
    """
    score = extra("sklearn.metrics", "average_precision").average_precision_score
    return against_mask(lambda m, k: float(score(k.ravel(), m.ravel())), map, mask)


def auc(map: Maps, mask: Masks) -> Scores:
    """Area under the ROC curve of the pixels: the chance that the object outranks background.

    Args:
        map: any values, larger is more.
        mask: the object, bool or 0/1.

    Returns:
        Value in [0, 1] per example, 0.5 for a constant map; NaN where the mask is empty or full.

    Raises:
        ValueError: the shapes differ, the map is not finite, or the mask holds other values than
            0 and 1.
        ImportError: scikit-learn is not installed.

    Reference:
        ``sklearn.metrics.roc_auc_score``.

    Example:
        >>> import numpy as np
        >>> auc(np.array([[0.9, 0.5, 0.4]]), np.array([[1, 0, 1]]))
        0.5
    """
    score = extra("sklearn.metrics", "auc").roc_auc_score

    def one(values: np.ndarray, truth: np.ndarray) -> float:
        return float("nan") if truth.all() else float(score(truth.ravel(), values.ravel()))

    return against_mask(one, map, mask)


def pointing_game(map: Maps, mask: Masks) -> Scores:
    """Whether the map's peak lies in the mask.

    Args:
        map: any values, larger is more.
        mask: the object, bool or 0/1.

    Returns:
        1 or 0 per example; where several pixels share the peak, the share of them inside (the
        expected hit of a random one: a constant map gets the mask's share of the area). NaN for
        an empty mask.

    Raises:
        ValueError: the shapes differ, the map is not finite, or the mask holds other values than
            0 and 1.

    Reference:
        Zhang et al., "Top-down neural attention by excitation backprop", ECCV 2016, without the
        margin of 15 pixels.

    Example:
        >>> import numpy as np
        >>> pointing_game(np.array([[0.1, 0.9], [0.2, 0.3]]), np.array([[0, 1], [0, 1]]))
        1.0
    """
    return against_mask(lambda m, k: float(k[m == m.max()].mean()), map, mask)


def energy_in_mask(map: Maps, mask: Masks) -> Scores:
    """Share of the map's positive values that lies in the mask.

    Args:
        map: any values; negative ones count as 0.
        mask: the object, bool or 0/1.

    Returns:
        Value in [0, 1] per example; 0 where the map has no positive value, NaN for an empty mask.

    Raises:
        ValueError: the shapes differ, the map is not finite, or the mask holds other values than
            0 and 1.

    Reference:
        Wang et al., "Score-CAM", CVPR workshops 2020, energy-based pointing game.

    Example:
        >>> import numpy as np
        >>> energy_in_mask(np.array([[1.0, 3.0]]), np.array([[0, 1]]))
        0.75
    """

    def one(values: np.ndarray, truth: np.ndarray) -> float:
        positive = values.clip(min=0)
        total = positive.sum()
        return float(positive[truth].sum() / total) if total > 0 else 0.0

    return against_mask(one, map, mask)


def precision_recall(map: Maps, mask: Masks) -> tuple[Scores, Scores]:
    """Precision and recall of the pixels above the map's Otsu threshold.

    Args:
        map: values in [0, 1], already at the mask's size.
        mask: the object, bool or 0/1.

    Returns:
        Precision and recall, each in [0, 1] per example; both 0 for a constant map, NaN for an
        empty mask.

    Raises:
        ValueError: see :func:`otsu_threshold` and :func:`iou`.
        ImportError: scikit-image is not installed.

    Reference:
        The threshold is Obj-IoU's (TAM); the rest is their definition.

    Example:
        >>> import numpy as np
        >>> precision_recall(np.array([[0.1, 0.9, 0.9, 0.1]]), np.array([[0, 0, 1, 0]]))
        (0.5, 1.0)
    """

    def precision(values: np.ndarray, truth: np.ndarray) -> float:
        predicted = values > _otsu(values)
        return float(truth[predicted].mean()) if predicted.any() else 0.0

    def recall(values: np.ndarray, truth: np.ndarray) -> float:
        return float((values > _otsu(values))[truth].mean())

    return against_mask(precision, map, mask), against_mask(recall, map, mask)


def _otsu(values: Float64[np.ndarray, "height width"]) -> float:
    if values.min() < -ROUNDING or values.max() > 1 + ROUNDING:
        raise ValueError(
            f"map must lie in [0, 1], got {values.min():.4g}..{values.max():.4g}; normalise it, "
            "jointly with the other maps (captum_mllm.functional.joint_min_max)."
        )
    threshold_otsu = extra("skimage.filters", "otsu_threshold").threshold_otsu
    counts, edges = np.histogram(values.clip(0, 1), bins=OTSU_BINS, range=(0, 1))
    if (counts > 0).sum() == 1:
        return float(values.max())
    # Upper edges instead of centres: every mean moves by the same half bin, so the split stays.
    upper_edge = threshold_otsu(hist=(counts, edges[1:]))
    return float(np.nextafter(np.float32(upper_edge), np.float32(0)))


def _iou(predicted: Bool[np.ndarray, "*shape"], truth: Bool[np.ndarray, "*shape"]) -> float:
    union = (predicted | truth).sum()
    return float((predicted & truth).sum() / union) if union else float("nan")


def _oracle_iou(values: np.ndarray, truth: np.ndarray) -> float:
    order = np.argsort(-values, axis=None)
    ranked, hits = values.ravel()[order], truth.ravel()[order].cumsum()
    cut = np.append(ranked[1:] < ranked[:-1], True)  # no threshold separates equal values
    predicted = np.arange(1, values.size + 1)
    return float((hits / (predicted + truth.sum() - hits))[cut].max())
