"""Hooks on a user's model while we run it, and the model restored afterwards."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn


@contextmanager
def interpolated_positions(tower: nn.Module) -> Iterator[None]:
    """Make a CLIP or SigLIP tower interpolate its position embeddings; no effect at native size.

    Args:
        tower: the vision encoder.

    Returns:
        A context manager; afterwards the tower is unchanged.
    """

    def interpolate(
        _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return args, {**kwargs, "interpolate_pos_encoding": True}

    handle = tower.register_forward_pre_hook(interpolate, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def contiguous_gradients(model: nn.Module) -> Iterator[None]:
    """Give batch norms gradients whose layout in memory torch reads correctly.

    On the CPU (torch 2.13), the gradient of a batch norm in evaluation mode is wrong where the
    gradient that comes in is a transposed one, as attention over a map of features gives: its
    channels are taken for its cells. Of the models we know, FastViT towers (FastVLM) have both.

    Args:
        model: the user's model.
    """

    def straighten(_module: nn.Module, _args: Any, output: Any) -> None:
        if isinstance(output, Tensor) and output.requires_grad:
            output.register_hook(lambda gradient: gradient.contiguous())

    kinds = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
    handles = [
        module.register_forward_hook(straighten)
        for module in model.modules()
        if isinstance(module, kinds)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


_LOCKS: WeakKeyDictionary[nn.Module, Any] = WeakKeyDictionary()  # a re-entrant lock per model
_MAKING = threading.Lock()


@contextmanager
def one_thread(model: nn.Module) -> Iterator[None]:
    """Let one thread at a time run a model: a second waits, the same may enter again.

    Hooks, flags and the attention setting sit in the model while it runs; a thread between them
    would get another one's values.

    Args:
        model: the user's model.
    """
    with _MAKING:
        lock = _LOCKS.setdefault(model, threading.RLock())
    with lock:
        yield


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Restore every module's plain attributes and forward hooks, also after an error.

    Not only ours: in the first forward that asks for the tower's hidden states, transformers sets
    hooks of its own and a flag, and leaves them in the model; Qwen's models keep the last prompt's
    position offsets (``rope_deltas``).

    Args:
        model: the user's model.
    """
    before = [(module, _plain(module), _hook_tables(module)) for module in model.modules()]
    try:
        yield
    finally:
        for module, plain, tables in before:
            for name in _plain(module).keys() - plain.keys():
                delattr(module, name)
            vars(module).update(plain)
            for name, table in tables.items():
                now = vars(module)[name]
                for key in now.keys() - table.keys():
                    del now[key]


def _plain(module: nn.Module) -> dict[str, Any]:
    """Attributes other than parameters, buffers, modules and tables: flags, numbers, tensors."""
    kinds = (bool, int, float, str, Tensor, type(None))
    return {name: value for name, value in vars(module).items() if isinstance(value, kinds)}


def _hook_tables(module: nn.Module) -> dict[str, dict[int, Any]]:
    return {
        name: dict(value)
        for name, value in vars(module).items()
        if name.startswith("_forward_") and isinstance(value, dict)
    }
