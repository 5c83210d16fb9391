"""Looks into a user's model that explain nothing: what checks of the model compare."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from captum_mllm.adapters import Adapter
from captum_mllm.adapters.interrupts import uninterrupted
from captum_mllm.model.forward import evaluating, selected_rows


class _ReachedError(Exception):
    """The language model was about to run: nothing after that is of interest."""


def language_inputs(
    adapter: Adapter, inputs: Mapping[str, Tensor]
) -> Float[Tensor, "tokens width"]:
    """What the language model gets for each token, image features included; it does not run.

    Where weights are offloaded, the forward runs to its end: stopped in between, accelerate would
    leave weights behind on the device.

    Args:
        adapter: the model's adapter.
        inputs: the model's inputs of one sample.

    Returns:
        The embeddings (tokens, width), float32, on the CPU.

    Raises:
        ValueError: the language model got no embeddings.
    """
    found: list[Tensor] = []
    stop = not any(hasattr(module, "_hf_hook") for module in adapter.model.modules())

    def before(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = kwargs.get("inputs_embeds")
        floats = [a for a in args if isinstance(a, Tensor) and a.is_floating_point()]
        given = floats[0] if given is None and floats else given
        if given is not None:
            found.append(given[0].detach().float().cpu())
        if stop:
            raise _ReachedError

    none = torch.zeros(0, dtype=torch.int64)
    with (
        evaluating(adapter),
        _before_decoder(adapter, before),
        selected_rows(adapter.head, none),
        suppress(_ReachedError),
    ):
        adapter.model(**inputs, use_cache=False, return_dict=True)
    if not found:
        raise ValueError(
            "model: its language model got no embeddings, so that it can't be seen which token "
            "shows which part of the picture."
        )
    return found[0]


def last_logits(adapter: Adapter, inputs: Mapping[str, Tensor]) -> Float[Tensor, " vocabulary"]:
    """The model's logits for the first token of the answer, of inputs taken as they are.

    Args:
        adapter: the model's adapter.
        inputs: the model's inputs; nothing is checked, added or left out.

    Returns:
        The logits, float32, on the CPU.
    """
    last = torch.tensor([inputs["input_ids"].shape[1] - 1])
    with evaluating(adapter), selected_rows(adapter.head, last):
        output = adapter.model(**inputs, use_cache=False, return_dict=True)
    return output.logits[0, -1].detach().float().cpu()


@uninterrupted
def counted_forwards(adapter: Adapter) -> Iterator[list[int]]:
    """Count the calls of the language model.

    Args:
        adapter: the model's adapter.

    Returns:
        A context manager that yields a list; it gets the number of tokens of each call.
    """
    lengths: list[int] = []

    def before(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = kwargs.get("inputs_embeds", kwargs.get("input_ids", args[0] if args else None))
        lengths.append(0 if given is None else int(given.shape[1]))

    with _before_decoder(adapter, before):
        yield lengths


@uninterrupted
def _before_decoder(adapter: Adapter, hook: Callable[..., None]) -> Iterator[None]:
    """A hook on the language model's calls."""
    handle = adapter.decoder.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
