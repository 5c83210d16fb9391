"""What the metrics take and give: checked arrays, one value per example, optional packages."""

import importlib
from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Float64, Shaped
from torch import Tensor

Maps = Float[np.ndarray, "*examples height width"] | Float[Tensor, "*examples height width"]
Masks = Shaped[np.ndarray, "*examples height width"] | Shaped[Tensor, "*examples height width"]
Scores = float | Float64[np.ndarray, "*examples"]


def as_maps(map: Any) -> Float64[np.ndarray, "*examples height width"]:
    array = _numpy(map).astype(np.float64)
    _check_grid(array, "map")
    if np.isnan(array).any():
        raise ValueError(f"map must not hold NaN, got {int(np.isnan(array).sum())} of them.")
    if np.isinf(array).any():
        raise ValueError(f"map must be finite, got {int(np.isinf(array).sum())} infinite values.")
    return array


def as_masks(mask: Any, name: str) -> Bool[np.ndarray, "*examples height width"]:
    array = _numpy(mask)
    _check_grid(array, name)
    if not np.isin(array, (0, 1)).all():
        raise ValueError(f"{name} must be bool or hold only 0 and 1; pass {name} > 0 instead.")
    return array.astype(bool)


def _check_grid(array: np.ndarray, name: str) -> None:
    if array.ndim < 2 or 0 in array.shape[-2:]:
        raise ValueError(f"{name} must be (..., height, width), got shape {array.shape}.")


def _numpy(values: Any) -> np.ndarray:
    if not isinstance(values, Tensor):
        return np.asarray(values)
    values = values.detach().cpu()
    return (values.double() if values.is_floating_point() else values).numpy()


def against_mask(one: Callable[[np.ndarray, np.ndarray], float], map: Any, mask: Any) -> Scores:
    """``one(map, mask)`` per example, NaN where the mask is empty."""

    def guarded(values: np.ndarray, truth: np.ndarray) -> float:
        return one(values, truth) if truth.any() else float("nan")

    return per_example(guarded, as_maps(map), as_masks(mask, "mask"))


def per_example(
    one: Callable[..., float], *arrays: np.ndarray, names: tuple[str, ...] = ("map", "mask")
) -> Scores:
    """``one`` of each example: a float for a single map, an array for a batch."""
    shape = arrays[0].shape
    if any(array.shape != shape for array in arrays):
        came = ", ".join(f"{n} {a.shape}" for n, a in zip(names, arrays, strict=True))
        raise ValueError(
            f"{' and '.join(names)} must have the same shape, got {came}; bring the map to the "
            "mask's size with captum_mllm.functional.upsample."
        )
    if len(shape) == 2:
        return one(*arrays)
    examples = zip(*(array.reshape(-1, *shape[-2:]) for array in arrays), strict=True)
    return np.array([one(*e) for e in examples], dtype=np.float64).reshape(shape[:-2])


def extra(module: str, who: str) -> Any:
    """A module of the optional extra, or an error that names the extra."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f'{who} needs {module}: pip install "captum-mllm[metrics]" (scikit-learn and '
            "scikit-image)."
        ) from error
