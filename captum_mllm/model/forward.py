"""Every forward of the user's model except generation's: evaluating, hooks, rows of the LM head."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from captum_mllm.adapters import Adapter, refuse_compiled
from captum_mllm.adapters.devices import tables_loaded
from captum_mllm.adapters.hooks import contiguous_gradients, unchanged
from captum_mllm.adapters.interrupts import uninterrupted
from captum_mllm.functional import lens_logits, log_odds
from captum_mllm.geometry import ImageGrid
from captum_mllm.model.inputs import Sample, append_answer
from captum_mllm.validation import ArgumentError


@uninterrupted
def evaluating(adapter: Adapter, *, gradients: bool = False) -> Iterator[None]:
    """Run the user's model in evaluation mode; afterwards it is unchanged, also after an error.

    Meanwhile hooks let the vision encoder take other image sizes than its native one, and other
    threads that want to run the model wait.

    Args:
        adapter: the model's adapter.
        gradients: False (default): no gradients, and the LM head's matrix is kept, which may have
            to be loaded or computed. True: the caller's gradient mode applies, and no parameter
            requires a gradient, so the graph keeps only what gradients of inputs need.

    Raises:
        ValueError: the model or a part of it is compiled.
        ArgumentError: its vision encoder and its language model have dtypes that don't fit.
    """
    model = adapter.model
    refuse_compiled(model)
    with (
        unchanged(model) as kept,
        _dtypes_named(adapter),
        adapter.size_hooks(),
        tables_loaded(adapter.tower),
    ):
        if any(module.training for module in kept.modules):
            model.eval()
        if gradients:
            with _frozen(kept.parameters), contiguous_gradients(model):
                yield
        else:
            with torch.no_grad(), adapter.head_kept():
                yield


@uninterrupted
def _dtypes_named(adapter: Adapter) -> Iterator[None]:
    """Say of an error about dtypes that a part of the model has another than the language model."""
    try:
        yield
    except RuntimeError as error:
        tower, decoder, head = (
            sorted({str(p.dtype) for p in part.parameters() if p.is_floating_point()})
            for part in (adapter.tower, adapter.decoder, adapter.head)
        )
        part, found = ("vision encoder", tower) if tower != decoder else ("LM head", head)
        if found == decoder or not ("dtype" in str(error) or "scalar type" in str(error)):
            raise
        raise ArgumentError(
            "model",
            f"has its {part} in {', '.join(found)} and its language model in "
            f"{', '.join(decoder)}, which it can't run ({error}). Bring both to one: "
            f"model.to(torch.float32), or load it with one dtype.",
        ) from error


@uninterrupted
def _frozen(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """While it lasts, no parameter requires a gradient."""
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


@uninterrupted
def selected_rows(
    head: nn.Module, rows: Int64[Tensor, " rows"] | Int64[Tensor, "copies rows"]
) -> Iterator[list[None]]:
    """Let the LM head see only some positions: logits of a whole prompt would not fit in memory.

    Args:
        head: the LM head.
        rows: (rows,) positions of every copy in the batch, or (copies, rows) of each copy.

    Returns:
        A context manager that yields a list with one entry per call of the head.
    """
    calls: list[None] = []

    def before_head(_module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        calls.append(None)
        states = args[0]
        at = rows.to(states.device)
        if at.ndim == 1:
            return (states[:, at], *args[1:])
        return (states[torch.arange(len(at), device=at.device)[:, None], at], *args[1:])

    handle = head.register_forward_pre_hook(before_head)
    try:
        yield calls
    finally:
        handle.remove()


@dataclass
class Captured:
    """What the hooks saw in one forward.

    Args:
        final_hidden: states after the final norm, (positions, dim): what the LM head reads.
        lens_hidden: the same of the chosen layer; ``final_hidden`` itself for the last layer.
        logits: the model's logits at the selected rows, (rows, vocabulary), unprocessed.
    """

    final_hidden: Float[Tensor, "positions dim"]
    lens_hidden: Float[Tensor, "positions dim"]
    logits: Float[Tensor, "rows vocabulary"]


def captured_forward(
    adapter: Adapter,
    inputs: Mapping[str, Tensor],
    grids: Sequence[ImageGrid],
    *,
    rows: Int64[Tensor, " rows"],
    layer: int = -1,
) -> Captured:
    """One forward of the whole model under hooks; the LM head sees only the selected rows.

    Args:
        adapter: the model's adapter, already ``evaluating``.
        inputs: the model's inputs.
        grids: the images among them, for the check of the tower's features.
        rows: positions whose logits are wanted; may be empty.
        layer: LM layer of ``lens_hidden``; -1 is the last.

    Returns:
        States and logits of the sample, without a batch axis.

    Raises:
        ValueError: a hook fired another number of times than once (compiled or altered model),
            or states are not finite.
    """
    with selected_rows(adapter.head, rows) as head_calls, _watched(adapter, grids, layer) as states:
        output = adapter.model(**inputs, use_cache=False, return_dict=True)
    calls = {name: len(tensors) for name, tensors in states.items()} | {"LM head": len(head_calls)}
    expected = {"final norm": 1, "LM head": 1, "lens layer": 1}
    expected |= {"vision encoder": len(adapter.tower_calls(grids))}
    for name, times in expected.items():
        if calls.get(name, 0) != times:
            raise ValueError(
                f"model: the hook on the {name} fired {calls.get(name, 0)} times in one forward, "
                f"expected {times}. Is a part of the model compiled (torch.compile), or replaced? "
                f"Pass the plain model."
            )
    for name in ("final norm", "lens layer"):
        if not torch.isfinite(states[name][0]).all():
            raise ValueError(
                f"model: hidden states at the {name} hold NaN or infinite values; try another "
                f"dtype (float32 or bfloat16), or check the weights."
            )
    device = adapter.device  # a dispatched model's parts lie on several
    return Captured(
        final_hidden=states["final norm"][0][0].to(device),
        lens_hidden=states["lens layer"][0][0].to(device),
        logits=output.logits[0].to(device),
    )


@uninterrupted
def _watched(
    adapter: Adapter, grids: Sequence[ImageGrid], layer: int
) -> Iterator[dict[str, list[Any]]]:
    """Hooks that keep hidden states and check the tower's features; yields them call by call."""
    states: dict[str, list[Any]] = defaultdict(list)

    def on_tower(_module: nn.Module, _args: Any, output: Any) -> None:
        calls, done = adapter.tower_calls(grids), len(states["vision encoder"])
        if done < len(calls):
            adapter.check_features(output, calls[done])
        states["vision encoder"].append(None)

    def on_norm(_module: nn.Module, _args: Any, output: Tensor) -> None:
        states["final norm"].append(output)
        if layer == -1:
            states["lens layer"].append(output)

    def on_layer(_module: nn.Module, _args: Any, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        # The bare forward: hooks on the norm are meant for the model's last layer.
        states["lens layer"].append(adapter.final_norm.forward(hidden))

    with ExitStack() as stack:
        stack.callback(adapter.tower.register_forward_hook(on_tower).remove)
        stack.callback(adapter.final_norm.register_forward_hook(on_norm).remove)
        if layer != -1:
            stack.callback(adapter.layers[layer].register_forward_hook(on_layer).remove)
        yield states


def check_head(
    adapter: Adapter,
    hidden: Float[Tensor, "rows dim"],
    logits: Float[Tensor, "rows vocabulary"],
    class_ids: Int64[Tensor, " classes"],
) -> None:
    """Compare ``W[y] . h + b`` with the model's own logits.

    Args:
        adapter: the model's adapter.
        hidden: final hidden states of some rows.
        logits: the model's logits there.
        class_ids: ids to compare.

    Raises:
        ValueError: they differ by more than the dtype's rounding: soft-capping, a logit scale, a
            wrapped or quantised head.
    """
    ours = adapter.finish_logits(lens_logits(hidden, *adapter.class_weights(class_ids)).T)
    theirs = logits[:, class_ids].to(ours)
    largest = float(torch.maximum(theirs.abs().max(), ours.abs().max()))
    tolerance = 1e-4 if logits.dtype in (torch.float32, torch.float64) else 3e-2
    worst = float((ours - theirs).abs().max())
    if not worst <= tolerance * max(largest, 1e-6):
        raise ValueError(
            f"model: its LM head is not the plain linear map W h + b that the logit lens assumes "
            f"(logits differ by {worst:.3g} at a size of {largest:.3g}): soft-capping, a logit "
            f"scale, an adapter (merge it first) or quantised weights. Register an adapter whose "
            f"class_weights tells the true map."
        )


def full_logits(
    adapter: Adapter, hidden: Float[Tensor, "rows dim"], chunk: int = 16384
) -> Float[Tensor, "rows vocabulary"]:
    """Logits over the whole vocabulary in float32, whatever the model's dtype.

    bfloat16 logits tie within the first ranks; in float32 rankings don't depend on that noise.

    Args:
        adapter: the model's adapter.
        hidden: final hidden states of a few rows.
        chunk: vocabulary entries that are converted to float32 at a time.
    """
    weight, bias = adapter.class_weights(slice(None))
    hidden, device = hidden.to(weight.device), hidden.device
    parts = [
        lens_logits(hidden, weight[rows], None if bias is None else bias[rows]).T.to(device)
        for rows in (slice(at, at + chunk) for at in range(0, len(weight), chunk))
    ]
    return adapter.finish_logits(torch.cat(parts, dim=1))


def batched(
    adapter: Adapter,
    kwargs: Mapping[str, Tensor],
    pixels: Sequence[Mapping[str, Tensor]],
    n: int,
) -> dict[str, Tensor]:
    """A sample's inputs repeated for n copies, each with pixels of its own.

    Args:
        adapter: tells which inputs are token-wise.
        kwargs: the model's inputs of one sample.
        pixels: the pixel inputs of each copy; empty if they are all the sample's own.
        n: number of copies.
    """
    inputs = {}
    for name, value in kwargs.items():
        if pixels and name in pixels[0]:
            continue
        if name in adapter.token_wise:
            inputs[name] = value.expand(n, -1)
        else:  # images, tiles, rows of patches, sizes: one copy's follow the other's
            inputs[name] = value.repeat(n, *[1] * (value.ndim - 1))
    for name in pixels[0] if pixels else ():
        inputs[name] = torch.cat([copy[name] for copy in pixels])
    return inputs


def forward_logits(
    adapter: Adapter,
    sample: Sample,
    canvases: tuple[Tensor, ...],
    n: int,
    rows: Tensor,
    *,
    layers: Iterable[Iterable[nn.Module]] = (),
    on_embeddings: Callable[[Tensor], Tensor] | None = None,
) -> Float[Tensor, "n rows vocabulary"]:
    """Logits of one forward of n copies of a sample, differentiable.

    Args:
        adapter: the model's adapter.
        sample: prompt and answer.
        canvases: one per image, (n, ..., height, width); none for the sample's own pixels.
        n: number of copies.
        rows: positions whose logits are wanted.
        layers: per image and view, the module that its features are led through.
        on_embeddings: takes the token embeddings and gives those to go on with.

    Returns:
        float32, or float64 of such a model.
    """
    copies = [tuple(c[k : k + 1] for c in canvases) for k in range(n if canvases else 0)]
    pixels = [adapter.with_canvases(sample.kwargs, sample.grids, copy) for copy in copies]
    kwargs = batched(adapter, sample.kwargs, pixels, n)

    def lead(embeddings: Tensor) -> Tensor:
        return led_through(layers, embeddings, sample, adapter)

    with (
        evaluating(adapter, gradients=True),
        selected_rows(adapter.head, rows),
        _replacing(adapter, on_embeddings=on_embeddings, on_decoder=lead),
    ):
        output = adapter.model(**kwargs, use_cache=False, return_dict=True)
    logits = output.logits.to(adapter.device)
    return logits if logits.dtype == torch.float64 else logits.float()


def led_through(
    layers: Iterable[Iterable[nn.Module]], embeddings: Tensor, sample: Sample, adapter: Adapter
) -> Tensor:
    """What the language model gets, its image features led through modules as (n, width, cells).

    Args:
        layers: per image, one module for each of its views; none leaves all as it is.
        embeddings: (n, tokens, width).
        sample: tells where the images' tokens are.
        adapter: tells the views.
    """
    images = zip(sample.image_positions, sample.grids, layers, strict=False)
    for where, grid, per_view in images:
        for view, layer in zip(adapter.views(grid), per_view, strict=True):
            at = where[view.tokens.flatten().to(where.device)].to(embeddings.device)
            cells = embeddings[:, at].transpose(1, 2).unflatten(2, view.tokens.shape)
            led = layer(cells).flatten(2).transpose(1, 2)
            embeddings = embeddings.index_copy(1, at, led.to(embeddings.dtype))
    return embeddings


@uninterrupted
def _replacing(
    adapter: Adapter,
    *,
    on_embeddings: Callable[[Tensor], Tensor] | None = None,
    on_decoder: Callable[[Tensor], Tensor],
) -> Iterator[None]:
    """Hooks for one forward in which embeddings may be replaced.

    Args:
        adapter: the model's adapter.
        on_embeddings: takes the token embeddings (batch, tokens, width) and gives those to go on
            with; image features come into them later.
        on_decoder: the same for what the language model gets, image features included.

    Raises:
        ValueError: the token embeddings were not computed once.
    """
    calls = 0

    def after_embedding(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return output if on_embeddings is None else on_embeddings(output)

    def before_decoder(
        _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        embeddings = kwargs.get("inputs_embeds")
        if embeddings is not None:
            kwargs = {**kwargs, "inputs_embeds": on_decoder(embeddings)}
        return args, kwargs

    table = adapter.model.get_input_embeddings()
    with ExitStack() as stack:
        stack.callback(table.register_forward_hook(after_embedding).remove)
        hook = adapter.decoder.register_forward_pre_hook(before_decoder, with_kwargs=True)
        stack.callback(hook.remove)
        yield
    if calls != 1:
        raise ValueError(
            f"model: its token embeddings were computed {calls} times in one forward, expected "
            f"once, so they can't be replaced; pass the plain model."
        )


def replaced(embeddings: Tensor, new: Tensor) -> Tensor:
    """Token embeddings in place of those that the model computed, checked.

    Args:
        embeddings: the model's own, (n, tokens, width).
        new: those to go on with.

    Raises:
        ValueError: they are of another shape.
    """
    if new.shape != embeddings.shape:
        raise ValueError(
            f"inputs hold embeddings of shape {tuple(new.shape)}, but the model makes "
            f"{tuple(embeddings.shape)} (batch, tokens, width); .embeddings gives them."
        )
    return new.to(embeddings)


def answer_log_probs(
    adapter: Adapter,
    sample: Sample,
    answer: Int64[Tensor, " answer"],
    versions: Sequence[Mapping[str, Tensor]],
    tokens: Sequence[Sequence[int]],
) -> Float[Tensor, "versions tokens"]:
    """Log-probability of tokens of one answer, given versions of the images: one forward.

    Args:
        adapter: the model's adapter, already ``evaluating``.
        sample: the prompt.
        answer: ids of the answer, fixed.
        versions: per version, the inputs that hold its pixels.
        tokens: per version, positions in the answer; of one length.

    Returns:
        ``log p(y_t | version, prompt, y_<t)`` of the model's own logits, softmax in float32.

    Raises:
        ValueError: the LM head did not run once (a replaced part of the model), or NaN.
    """
    logits, ids = _answer_logits(adapter, sample, answer, versions, tokens)
    dtype = torch.promote_types(logits.dtype, torch.float32)
    return _without_nan(logits.to(dtype).log_softmax(-1).gather(-1, ids[..., None])[..., 0])


def answer_log_odds(
    adapter: Adapter,
    sample: Sample,
    answer: Int64[Tensor, " answer"],
    versions: Sequence[Mapping[str, Tensor]],
    tokens: Sequence[Sequence[int]],
) -> Float[Tensor, "versions tokens"]:
    """Log-odds of tokens of one answer, given versions of the images: one forward.

    Args:
        adapter: see :func:`answer_log_probs`.
        sample: see there.
        answer: see there.
        versions: see there.
        tokens: see there.

    Returns:
        ``log p - log(1 - p)`` by :func:`captum_mllm.functional.log_odds`.

    Raises:
        ValueError: see :func:`answer_log_probs`.
    """
    return _without_nan(log_odds(*_answer_logits(adapter, sample, answer, versions, tokens)))


def _answer_logits(
    adapter: Adapter,
    sample: Sample,
    answer: Int64[Tensor, " answer"],
    versions: Sequence[Mapping[str, Tensor]],
    tokens: Sequence[Sequence[int]],
) -> tuple[Float[Tensor, "versions tokens vocabulary"], Int64[Tensor, "versions tokens"]]:
    """Logits that predict the tokens, and the tokens' ids."""
    full = append_answer(sample, answer, adapter)
    batch = batched(adapter, full, versions, len(versions))
    where = torch.tensor([list(positions) for positions in tokens])
    rows = where + len(sample.prompt_ids) - 1  # the position that predicts the token
    with selected_rows(adapter.head, rows) as calls:
        logits = adapter.model(**batch, use_cache=False, return_dict=True).logits
    if len(calls) != 1 or logits.shape[:2] != rows.shape:
        raise ValueError(
            f"model: its LM head ran {len(calls)} times in one forward and gave logits of shape "
            f"{tuple(logits.shape)}, expected once and {tuple(rows.shape)} rows. Is a part of the "
            f"model compiled, or replaced? Pass the plain model."
        )
    return logits, answer[where.to(answer.device)].to(logits.device)


def _without_nan(values: Tensor) -> Tensor:
    if bool(values.isnan().any()):
        raise ValueError("model: its logits hold NaN; try another dtype (float32 or bfloat16).")
    return values


def teacher_forced_output(adapter: Adapter, inputs: Mapping[str, Tensor]) -> Any:
    """The model's own output over a prompt and an answer, under the caller's gradient mode.

    Args:
        adapter: the model's adapter.
        inputs: the model's inputs, the answer appended.

    Returns:
        What the model returns, ``logits`` (batch, tokens, vocabulary) among it.
    """
    with evaluating(adapter, gradients=True):
        return adapter.model(**inputs, use_cache=False, return_dict=True)
