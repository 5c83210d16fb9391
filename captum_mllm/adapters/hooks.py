"""Hooks on a user's model while we run it, and the model restored afterwards."""

import threading
from collections.abc import Collection, Iterator
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn

from captum_mllm.adapters.interrupts import acquire, uninterrupted


@uninterrupted
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


@uninterrupted
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


@uninterrupted
def without_gradients() -> Iterator[None]:
    """As ``torch.no_grad()``, which an interrupt can leave on for good."""
    with torch.no_grad():
        yield


_LOCKS: dict[int, tuple[Any, Any]] = {}  # of a config or model: (weak reference, re-entrant lock)
_MAKING = threading.Lock()


@uninterrupted
def one_thread(model: nn.Module) -> Iterator[None]:
    """Let one thread at a time run a model: a second waits, the same may enter again.

    Hooks, flags and the attention setting sit in the model while it runs; a thread between them
    would get another one's values. The setting sits in the config, so models that share theirs wait
    for each other. The lock is no part of the model: copies of it have their own.

    Args:
        model: the user's model.
    """
    config = getattr(model, "config", None)
    owner = config if type(config).__weakrefoffset__ else model
    with _MAKING:
        lock = _lock_of(owner)
    acquire(lock)
    try:
        yield
    finally:
        lock.release()


def _lock_of(owner: Any) -> Any:
    """Its lock. No weak dictionary: an interrupt is lost in what that calls when a key goes."""
    if id(owner) not in _LOCKS or _LOCKS[id(owner)][0]() is not owner:
        for number in [n for n, (reference, _) in _LOCKS.items() if reference() is None]:
            del _LOCKS[number]
        _LOCKS[id(owner)] = ref(owner), threading.RLock()
    return _LOCKS[id(owner)][1]


_KEPT: dict[int, "Snapshot"] = {}  # of the models that a thread runs now, which holds their locks


@uninterrupted
def unchanged(model: nn.Module) -> Iterator["Snapshot"]:
    """Run a model in one thread, and put it back as it was, also after an error or an interrupt.

    Only the outermost of several takes and restores the snapshot, so that a call that runs the
    model many times looks through its modules once.

    Args:
        model: the user's model.

    Returns:
        A context manager that yields what the model was like.
    """
    with one_thread(model):
        if (kept := _KEPT.get(id(model))) is not None:
            yield kept
            return
        kept = _KEPT[id(model)] = Snapshot(model)
        try:
            yield kept
        finally:
            try:
                kept.restore()
            finally:
                del _KEPT[id(model)]


class Snapshot:
    """What a model's modules and configs hold, and what is on in the thread: to be put back.

    Not only what we change ourselves: in the first forward that asks for the tower's hidden states,
    transformers sets hooks of its own and a flag, and leaves them in the model; Qwen's models keep
    the last prompt's position offsets (``rope_deltas``); torch replaces parameters for a call and
    can be interrupted in it. Kept is which objects there are, not what tensors hold.

    Args:
        model: the user's model.

    Example:
        >>> layer = nn.Linear(2, 3)
        >>> kept = Snapshot(layer)
        >>> layer.eval().weight.requires_grad_(False).shape
        torch.Size([3, 2])
        >>> kept.restore()
        >>> layer.training, layer.weight.requires_grad
        (True, True)
    """

    def __init__(self, model: nn.Module) -> None:
        self.modules = tuple(model.modules())
        self.parameters = tuple(model.parameters())
        of_modules = [vars(module) for module in self.modules]
        configs = {id(c): vars(c) for held in of_modules for c in _configs(held)}
        self._attributes = [(now, dict(now)) for now in (*of_modules, *configs.values())]
        self._parts = [(held[n], dict(held[n])) for held in of_modules for n in _PARTS]
        self._hooks = [(held[n], set(held[n])) for held in of_modules for n in _HOOKS if n in held]
        self._trained = [parameter.requires_grad for parameter in self.parameters]
        self._gradients = torch.is_grad_enabled()

    def restore(self) -> None:
        """Put everything back; hooks that the model itself took away stay away."""
        torch.set_grad_enabled(self._gradients)
        for now, before in self._attributes:
            _only(now, before)
            now.update(before)
        for now, before in self._parts:
            if len(now) != len(before) or any(now.get(k) is not v for k, v in before.items()):
                now.clear()  # in their order
                now.update(before)
        for table, keys in self._hooks:
            if table:
                _only(table, keys)
        for parameter, trained in zip(self.parameters, self._trained, strict=True):
            if parameter.requires_grad is not trained:
                parameter.requires_grad_(trained)


def _only(held: dict[Any, Any], keys: Collection[Any]) -> None:
    """Leave no other keys in a dictionary."""
    if len(held) != len(keys) or any(key not in keys for key in held):
        for key in [key for key in held if key not in keys]:
            del held[key]


_PARTS = ("_parameters", "_buffers", "_modules")
_HOOKS = tuple(  # the names of torch's tables of hooks
    name
    for name, value in vars(nn.Module()).items()
    if isinstance(value, dict) and name not in _PARTS
)


def _configs(held: dict[str, Any]) -> Iterator[Any]:
    """The config among a module's attributes, and those in it: the attention setting sits there."""
    config = held.get("config")
    if hasattr(config, "__dict__"):
        yield config
        yield from (c for c in vars(config).values() if hasattr(c, "attribute_map"))
