"""A vision encoder in which every position hears itself only, whatever its class.

Where a token comes from can be read off gradients once nothing mixes positions any more. What
mixes them is caught where it is computed, in torch's own functions, so no module is known by name.
"""

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode


class LocalAttention(TorchFunctionMode):
    """While it lasts, torch's functions mix positions as little as they can.

    - Attention with as many queries as keys gives each position its own value.
    - A convolution whose kernel is larger than its stride keeps the taps of the stride's own cell.
    - A pool over the whole picture gives 0, a norm over it becomes a norm per position.

    Attention of a few queries to many keys (resamplers, Q-formers) is left alone: its outputs have
    no place of their own.

    After use, ``mixed`` counts what was caught or left alone, by name.
    """

    def __init__(self) -> None:
        super().__init__()
        self.mixed: Counter[str] = Counter()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Replace a function that mixes positions.

        Args:
            func: torch's function.
            types: of the arguments.
            args: positional arguments.
            kwargs: keyword arguments.
        """
        del types
        kwargs = kwargs or {}
        rule = _RULES.get(getattr(func, "__name__", ""))
        return func(*args, **kwargs) if rule is None else rule(self, func, args, kwargs)


_Rule = Callable[[LocalAttention, Any, tuple[Any, ...], dict[str, Any]], Any]


def _argument(args: Any, kwargs: Any, at: int, name: str, default: Any) -> Any:
    return args[at] if len(args) > at else kwargs.get(name, default)


def _attention(mode: LocalAttention, func: Any, args: Any, kwargs: Any) -> Any:
    query, key, value = (
        _argument(args, kwargs, at, name, None) for at, name in enumerate(("query", "key", "value"))
    )
    if query.shape[-2] != key.shape[-2]:
        mode.mixed[f"{query.shape[-2]} queries to {key.shape[-2]} keys"] += 1
        return func(*args, **kwargs)
    mode.mixed["self-attention"] += 1
    if value.shape[-3] != query.shape[-3]:  # grouped values
        value = value.repeat_interleave(query.shape[-3] // value.shape[-3], -3)
    return value.expand(*query.shape[:-1], value.shape[-1]).clone()


def _softmax(mode: LocalAttention, func: Any, args: Any, kwargs: Any) -> Any:
    scores = _argument(args, kwargs, 0, "input", None)
    dim = _argument(args, kwargs, 1, "dim", None)
    square = scores.ndim >= 3 and scores.shape[-1] == scores.shape[-2] > 1
    if not square or dim not in (-1, scores.ndim - 1):
        if scores.ndim >= 3:
            mode.mixed["softmax over " + " x ".join(map(str, scores.shape[-2:]))] += 1
        return func(*args, **kwargs)
    mode.mixed["self-attention"] += 1
    dtype = kwargs.get("dtype") or scores.dtype
    return torch.eye(scores.shape[-1], dtype=dtype, device=scores.device).expand(scores.shape)


def _multi_head(mode: LocalAttention, func: Any, args: Any, kwargs: Any) -> Any:
    """Torch's own layer, whose inner functions are not seen here one by one."""
    names = ["query", "key", "value", "embed_dim_to_check", "num_heads", "in_proj_weight"]
    names += ["in_proj_bias", "bias_k", "bias_v", "add_zero_attn", "dropout_p"]
    names += ["out_proj_weight", "out_proj_bias"]
    given = dict(zip(names, args, strict=False)) | kwargs
    query, value = given["query"], given["value"]
    if query.shape != given["key"].shape or given.get("bias_k") is not None:
        mode.mixed[f"{query.shape[0]} queries to {given['key'].shape[0]} keys"] += 1
        return func(*args, **kwargs)
    mode.mixed["self-attention"] += 1
    weight, bias = given["in_proj_weight"], given["in_proj_bias"]
    weight = given.get("v_proj_weight") if weight is None else weight.chunk(3)[2]
    own = F.linear(value, weight, None if bias is None else bias.chunk(3)[2])
    return F.linear(own, given["out_proj_weight"], given["out_proj_bias"]), None


def _convolution(mode: LocalAttention, func: Any, args: Any, kwargs: Any) -> Any:
    weight = _argument(args, kwargs, 1, "weight", None)
    axes = weight.ndim - 2
    kernel = tuple(weight.shape[2:])
    stride = _per_axis(_argument(args, kwargs, 3, "stride", 1), axes)
    padding = _argument(args, kwargs, 4, "padding", 0)
    if all(size <= step for size, step in zip(kernel, stride, strict=True)):
        return func(*args, **kwargs)
    if isinstance(padding, str):
        padding = tuple((size - 1) // 2 if padding == "same" else 0 for size in kernel)
    mode.mixed["overlapping convolution"] += 1
    kept = torch.ones(kernel, dtype=torch.bool, device=weight.device)
    for axis, (size, step, pad) in enumerate(
        zip(kernel, stride, _per_axis(padding, axes), strict=True)
    ):
        if size > step:
            first = min(pad or (size - step) // 2, size - step)
            taps = torch.arange(size, device=weight.device)
            own = (taps >= first) & (taps < first + step)
            kept &= own.reshape([-1 if axis == other else 1 for other in range(axes)])
    if len(args) > 1:
        return func(args[0], weight * kept, *args[2:], **kwargs)
    return func(*args, **{**kwargs, "weight": weight * kept})


def _per_axis(value: int | tuple[int, ...], axes: int) -> tuple[int, ...]:
    if isinstance(value, int):
        return (value,) * axes
    return tuple(value) * (axes if len(value) == 1 else 1)


def _global_pool(mode: LocalAttention, func: Any, args: Any, kwargs: Any) -> Any:
    size = _argument(args, kwargs, 1, "output_size", None)
    result = func(*args, **kwargs)
    if size not in (1, (1, 1), [1, 1]):
        return result
    mode.mixed["pool over the whole picture"] += 1
    return torch.zeros_like(result)


def _mean(mode: LocalAttention, func: Any, args: Any, kwargs: Any) -> Any:
    result = func(*args, **kwargs)
    states = _argument(args, kwargs, 0, "input", None)
    dim = _argument(args, kwargs, 1, "dim", None)
    if states.ndim != 4 or not isinstance(dim, tuple | list):
        return result
    if sorted(d % 4 for d in dim) != [2, 3]:
        return result
    mode.mixed["pool over the whole picture"] += 1
    return torch.zeros_like(result)


def _group_norm(mode: LocalAttention, func: Any, args: Any, kwargs: Any) -> Any:
    del func
    given = dict(zip(("input", "num_groups", "weight", "bias", "eps"), args, strict=False)) | kwargs
    states = given["input"]
    mode.mixed["norm over the whole picture"] += 1
    grouped = states.unflatten(1, (given["num_groups"], -1))
    centred = grouped - grouped.mean(2, keepdim=True)
    variance = centred.square().mean(2, keepdim=True)
    normed = (centred / (variance + given.get("eps", 1e-5)).sqrt()).flatten(1, 2)
    per_channel = [-1, *[1] * (states.ndim - 2)]
    if (weight := given.get("weight")) is not None:
        normed = normed * weight.reshape(per_channel)
    if (bias := given.get("bias")) is not None:
        normed = normed + bias.reshape(per_channel)
    return normed


_RULES: dict[str, _Rule] = {
    "scaled_dot_product_attention": _attention,
    "softmax": _softmax,
    "_softmax": _softmax,
    "multi_head_attention_forward": _multi_head,
    "conv1d": _convolution,
    "conv2d": _convolution,
    "conv3d": _convolution,
    "adaptive_avg_pool2d": _global_pool,
    "adaptive_max_pool2d": _global_pool,
    "mean": _mean,
    "group_norm": _group_norm,
}
