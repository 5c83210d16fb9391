"""One forward of the user's model that gradients may flow through, and hooks to look into it."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from captum_mllm.adapters import Adapter, refuse_compiled
from captum_mllm.adapters.devices import tables_loaded
from captum_mllm.adapters.hooks import unchanged
from captum_mllm.batches import batched
from captum_mllm.inputs import Sample


def forward_logits(
    adapter: Adapter,
    sample: Sample,
    frames: tuple[Tensor, ...],
    n: int,
    rows: Tensor,
    *,
    layers: Sequence[Iterable[nn.Module]] = (),
    on_embeddings: Callable[[Tensor], Tensor] | None = None,
) -> Float[Tensor, "n rows vocabulary"]:
    """Logits of one forward of n copies of a sample, differentiable.

    Args:
        adapter: the model's adapter.
        sample: prompt and answer.
        frames: one per image, (n, ..., height, width); none for the sample's own pixels.
        n: number of copies.
        rows: positions whose logits are wanted.
        layers: per image and view, the module that its features are led through.
        on_embeddings: see :func:`hooked`.

    Returns:
        float32, or float64 of such a model.
    """
    own = [tuple(frame[k : k + 1] for frame in frames) for k in range(n if frames else 0)]
    pixels = [adapter.with_frames(sample.kwargs, sample.grids, one) for one in own]
    kwargs = batched(adapter, sample.kwargs, pixels, n)

    def lead(given: Tensor) -> Tensor:
        return led_through(layers, given, sample, adapter)

    with (
        differentiable(adapter),
        hooked(adapter, rows, on_embeddings=on_embeddings, on_decoder=lead),
    ):
        output = adapter.model(**kwargs, use_cache=False, return_dict=True)
    logits = output.logits.to(adapter.device)
    return logits if logits.dtype == torch.float64 else logits.float()


def led_through(
    layers: Sequence[Iterable[nn.Module]], embeddings: Tensor, sample: Sample, adapter: Adapter
) -> Tensor:
    """What the language model gets, its image features led through modules as (n, width, cells).

    Args:
        layers: per image, one module for each of its views; none leaves all as it is.
        embeddings: (n, tokens, width).
        sample: tells where the images' tokens are.
        adapter: tells the views.
    """
    for where, grid, own in zip(sample.image_positions, sample.grids, layers, strict=False):
        for view, layer in zip(adapter.views(grid), own, strict=True):
            at = where[view.tokens.flatten().to(where.device)].to(embeddings.device)
            cells = embeddings[:, at].transpose(1, 2).unflatten(2, view.tokens.shape)
            led = layer(cells).flatten(2).transpose(1, 2)
            embeddings = embeddings.index_copy(1, at, led.to(embeddings.dtype))
    return embeddings


@contextmanager
def differentiable(adapter: Adapter) -> Iterator[None]:
    """Evaluation mode and size hooks, under the caller's gradient mode; all is put back afterwards.

    Meanwhile no parameter asks for a gradient: none gets one from a graph that is built here, and
    the graph keeps only what gradients of inputs need.

    Args:
        adapter: the model's adapter.
    """
    model = adapter.model
    refuse_compiled(model)
    wanted = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with unchanged(model), adapter.size_hooks(), tables_loaded(adapter.tower):
        model.eval()
        for parameter in wanted:
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            for parameter in wanted:
                parameter.requires_grad_(True)


@contextmanager
def hooked(
    adapter: Adapter,
    rows: Tensor,
    *,
    on_embeddings: Callable[[Tensor], Tensor] | None = None,
    on_decoder: Callable[[Tensor], Tensor],
) -> Iterator[None]:
    """Hooks for one forward: the LM head sees some rows only, embeddings may be replaced.

    Args:
        adapter: the model's adapter.
        rows: positions whose logits are wanted.
        on_embeddings: takes the token embeddings (batch, tokens, width) and gives those to go on
            with; image features come into them later.
        on_decoder: the same for what the language model gets, image features included.

    Raises:
        ValueError: the token embeddings were not computed once.
    """
    calls = 0

    def before_head(_module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (args[0][:, rows.to(args[0].device)], *args[1:])

    def after_embedding(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return output if on_embeddings is None else on_embeddings(output)

    def before_decoder(
        _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        given = kwargs.get("inputs_embeds")
        if given is not None:
            kwargs = {**kwargs, "inputs_embeds": on_decoder(given)}
        return args, kwargs

    table = adapter.model.get_input_embeddings()
    with ExitStack() as stack:
        stack.callback(adapter.head.register_forward_pre_hook(before_head).remove)
        stack.callback(table.register_forward_hook(after_embedding).remove)
        hook = adapter.decoder.register_forward_pre_hook(before_decoder, with_kwargs=True)
        stack.callback(hook.remove)
        yield
    if calls != 1:
        raise ValueError(
            f"model: its token embeddings were computed {calls} times in one forward, expected "
            f"once, so they can't be replaced; pass the plain model."
        )


def replaced(given: Tensor, new: Tensor) -> Tensor:
    """Token embeddings in place of those that the model computed, checked.

    Args:
        given: the model's own, (n, tokens, width).
        new: the others.

    Raises:
        ValueError: they are of another shape.
    """
    if new.shape != given.shape:
        raise ValueError(
            f"inputs hold embeddings of shape {tuple(new.shape)}, but the model makes "
            f"{tuple(given.shape)} (batch, tokens, width); .embeddings gives them."
        )
    return new.to(given)
