"""The model run up to its language model only: what the image tokens are made of."""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call

from captum_mllm.adapters import Adapter
from captum_mllm.adapters.interrupts import uninterrupted
from captum_mllm.adapters.layout import LayoutError
from captum_mllm.model.attention import plain_attention
from captum_mllm.model.forward import evaluating
from captum_mllm.model.locality import LocalAttention


class _StopHere(Exception):  # noqa: N818 - it is no error
    """Ends a forward at the language model."""


@dataclass(frozen=True, eq=False)
class Embedded:
    """The embeddings of a prompt as they enter the language model, and their gradients.

    Args:
        embeddings: (tokens, dim), without gradient.
        mixed: what mixes positions in the vision encoder, by name, if it was run locally.
        pixels: the inputs that gradients are taken for.
        summary: (tokens,) a random projection of each embedding, with its graph.
    """

    embeddings: Float[Tensor, "tokens dim"]
    mixed: tuple[str, ...] = ()
    pixels: tuple[Tensor, ...] = ()
    summary: Float[Tensor, " tokens"] | None = None

    def gradient(self, weights: Float[Tensor, " tokens"]) -> Float[Tensor, " numbers"]:
        """Gradient of the weighted sum of the tokens' projections, flat over all pixels.

        Args:
            weights: one per token.
        """
        if self.summary is None:
            raise RuntimeError("run with gradients=True to take gradients.")
        with _gradients(True):
            total = (self.summary * weights.to(self.summary, copy=True)).sum()
            parts = torch.autograd.grad(total, self.pixels, retain_graph=True, allow_unused=True)
        return torch.cat(
            [
                (torch.zeros_like(pixels) if part is None else part).flatten()
                for pixels, part in zip(self.pixels, parts, strict=True)
            ]
        )


@dataclass(frozen=True, eq=False)
class Embedder:
    """Runs a model up to its language model, the vision encoder in float32.

    Args:
        adapter: the model's adapter; only its modules are used.
        inputs: the model's inputs of one sample.
    """

    adapter: Adapter
    inputs: Mapping[str, Tensor]

    def embed(
        self, pixels: Mapping[str, Tensor], *, local: bool = False, gradients: bool = False
    ) -> Embedded:
        """The embeddings of all tokens for other pixels.

        Args:
            pixels: the pixel inputs, float32.
            local: whether positions of the vision encoder hear themselves only, default False.
            gradients: whether gradients for the pixels are wanted, default False.

        Raises:
            LayoutError: no embeddings of the whole prompt enter the language model, or they can't
                be followed back to the pixels.
        """
        device = self.adapter.device
        mode = LocalAttention()
        with _gradients(gradients):
            leaves = {
                key: value.detach().to(device, torch.float32).clone().requires_grad_(gradients)
                for key, value in pixels.items()
            }
            with _up_to_decoder(self.adapter, mode if local else nullcontext()) as caught:
                self._run(leaves)
        with _gradients(gradients):
            embeddings = self._embeddings(caught)
            if not gradients:
                return Embedded(embeddings.detach().float(), tuple(mode.mixed))
            if not embeddings.requires_grad:
                raise LayoutError(
                    "the image tokens are no differentiable function of the pixels (discrete "
                    "codes?)."
                )
            direction = torch.randn(embeddings.shape[1], generator=torch.Generator().manual_seed(0))
            summary = embeddings.float() @ direction.to(embeddings.device)
        return Embedded(
            embeddings.detach().float(), tuple(mode.mixed), tuple(leaves.values()), summary
        )

    def _run(self, leaves: Mapping[str, Tensor]) -> None:
        model = self.adapter.model
        inputs: dict[str, Any] = {**self.inputs, **leaves}
        try:
            functional_call(
                model,
                _in_float32(self.adapter),
                kwargs={**inputs, "use_cache": False},
                strict=False,
            )
        except _StopHere:
            return
        except (RuntimeError, ValueError, IndexError, TypeError) as error:
            raise LayoutError(
                f"the model does not run on these inputs up to its language model "
                f"({type(error).__name__}: {str(error)[:300]})."
            ) from error

    def _embeddings(self, caught: list[dict[str, Any]]) -> Float[Tensor, "tokens dim"]:
        tokens = self.inputs["input_ids"].shape[1]
        if not caught:
            raise LayoutError(
                "no embeddings of the prompt enter the language model: pictures reach it another "
                "way (cross-attention, an encoder's states, codes)."
            )
        states = caught[0]["inputs_embeds"]
        if states.shape[:2] != (1, tokens):
            raise LayoutError(
                f"embeddings of {tuple(states.shape)} enter the language model, the prompt has "
                f"{tokens} tokens: image tokens that stand in no placeholders have no place."
            )
        states = states[0]
        return states + sum(_deeper(caught[0], states), torch.zeros_like(states))


def _deeper(caught: Mapping[str, Any], states: Float[Tensor, "tokens dim"]) -> list[Tensor]:
    """Image features that enter deeper layers only (deepstack), at their tokens' places."""
    masks = [
        value[0] if value.ndim == 2 else value[0, :, 0]
        for value in caught.values()
        if isinstance(value, Tensor)
        and value.dtype == torch.bool
        and value.ndim in (2, 3)
        and value.shape[:2] == (1, len(states))
    ]
    found = []
    for tensor in _tensors([value for name, value in caught.items() if name != "inputs_embeds"]):
        for mask in masks:
            if tensor.is_floating_point() and tensor.shape == (int(mask.sum()), states.shape[1]):
                found.append(torch.zeros_like(states).index_put((mask,), tensor.to(states)))
                break
    return found


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from _tensors(part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _tensors(part)


@uninterrupted
def _gradients(wanted: bool) -> Iterator[None]:
    """Gradients or none, whatever the caller's mode; inference mode, which it may be in, is off."""
    with torch.inference_mode(False), torch.set_grad_enabled(wanted):
        yield


@uninterrupted
def _up_to_decoder(
    adapter: Adapter, mode: AbstractContextManager[Any]
) -> Iterator[list[dict[str, Any]]]:
    """Let the model run up to its language model, in a mode of torch's functions."""
    with (
        evaluating(adapter, gradients=True),
        plain_attention(adapter.model),
        _stopped_at(adapter.decoder) as caught,
        mode,
    ):
        yield caught


@uninterrupted
def _stopped_at(decoder: nn.Module) -> Iterator[list[dict[str, Any]]]:
    """End a forward at the language model; what it was called with is kept."""
    caught: list[dict[str, Any]] = []

    def stop(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        states = kwargs.get("inputs_embeds")
        if states is None:
            floats = (a for a in args if isinstance(a, Tensor) and a.is_floating_point())
            states = next((a for a in floats if a.ndim == 3), None)
        if states is not None:
            caught.append({**kwargs, "inputs_embeds": states})
            raise _StopHere

    handle = decoder.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        yield caught
    finally:
        handle.remove()


def _in_float32(adapter: Adapter) -> dict[str, Tensor]:
    """The weights outside of the language model in float32: in half precision signs drown."""
    inside = {id(tensor) for tensor in (*adapter.decoder.parameters(), *adapter.decoder.buffers())}
    inside |= {id(tensor) for tensor in adapter.head.parameters()}
    named = (*adapter.model.named_parameters(), *adapter.model.named_buffers())
    return {
        name: tensor.detach().float()
        for name, tensor in named
        if tensor.dtype in (torch.float16, torch.bfloat16) and id(tensor) not in inside
    }
