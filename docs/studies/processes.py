"""A study's examples shared out among processes, and their values put together again.

A study's ``measure(model_name, examples, first, split, ...)`` gives *columns*: nested mappings
whose leaves are lists with one value per example (or per word). Columns of consecutive parts,
joined, are those of the whole.
"""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from typing import Any

import torch
from tqdm import tqdm

Columns = dict[str, Any]


def joined(parts: Sequence[Mapping[str, Any]]) -> Columns:
    """Columns of all parts, end to end.

    Args:
        parts: columns with the same names, in order; an empty part found nothing.

    Returns:
        The lists of all parts joined, name by name; empty where all parts are.

    Raises:
        ValueError: parts with other names than the first.

    Example:
        >>> joined([{"a": [1], "b": {"c": [2]}}, {"a": [3], "b": {"c": []}}])
        {'a': [1, 3], 'b': {'c': [2]}}
    """
    parts = [part for part in parts if part]
    if any(set(part) != set(parts[0]) for part in parts):
        raise ValueError(f"parts must hold the same columns, got {[list(p) for p in parts]}.")
    out: Columns = {}
    for name, first in parts[0].items() if parts else ():
        own = [part[name] for part in parts]
        out[name] = joined(own) if isinstance(first, Mapping) else [x for part in own for x in part]
    return out


def shares(examples: int, first: int, size: int) -> list[tuple[int, int]]:
    """Consecutive parts of some examples.

    Args:
        examples: number of examples, at least 1.
        first: number of the first one.
        size: examples per part, at least 1; the last part may be smaller.

    Returns:
        Pairs (examples, first) as ``measure`` takes them.

    Raises:
        ValueError: ``examples`` or ``size`` < 1.

    Example:
        >>> shares(5, 10, 2)
        [(2, 10), (2, 12), (1, 14)]
    """
    if examples < 1 or size < 1:
        raise ValueError(f"examples and size must be at least 1, got {examples} and {size}.")
    starts = range(0, examples, size)
    return [(min(size, examples - at), first + at) for at in starts]


def measured(
    measure: Callable[..., Columns],
    name: str,
    examples: int,
    first: int,
    split: str,
    *,
    processes: int = 1,
    size: int = 10,
    **settings: Any,
) -> Columns:
    """What ``measure`` finds on all examples, by several processes.

    Args:
        measure: called as ``measure(name, examples, first, split, **settings)``; a function of a
            module, so that other processes find it.
        name: of the model.
        examples: number of examples.
        first: number of the first one.
        split: "test" or "validation".
        processes: how many at a time, default 1: in this one. Each takes one thread.
        size: examples per call, default 10.
        settings: further keyword arguments of ``measure``.

    Returns:
        The joined columns, in the order of the examples whatever finished first.

    Raises:
        ValueError: ``processes`` < 1, or see :func:`shares`.
    """
    if processes < 1:
        raise ValueError(f"processes must be at least 1, got {processes}.")
    parts = shares(examples, first, size)
    call = partial(_call, measure, name, split, settings)
    bar = partial(tqdm, total=len(parts), desc=f"{name}, {split}", unit="part")
    if processes == 1:
        return joined(list(bar(map(call, parts))))
    with ProcessPoolExecutor(processes, get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        return joined(list(bar(pool.map(call, parts))))


def _call(
    measure: Callable[..., Columns],
    name: str,
    split: str,
    settings: Mapping[str, Any],
    part: tuple[int, int],
) -> Columns:
    return measure(name, *part, split, **settings)
