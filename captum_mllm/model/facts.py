"""What a model does around its layers, read from traced runs: never from its class or config."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from inspect import signature
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from captum_mllm.adapters import Adapter
from captum_mllm.adapters.discovery import ModelFacts
from captum_mllm.adapters.head import head_matrix
from captum_mllm.adapters.interrupts import uninterrupted
from captum_mllm.adapters.layout import LayoutError
from captum_mllm.functional import lens_logits
from captum_mllm.model.forward import evaluating, selected_rows
from captum_mllm.model.inputs import cut

_ROWS = 4  # last positions of the prompt whose logits are looked at
_LARGE = 30.0  # size of logits at which a soft cap shows
_SIDE_INPUTS = ("mm_token_type_ids", "token_type_ids")


def find_facts(
    adapter: Adapter,
    inputs: Mapping[str, Tensor],
    placeholders: Int64[Tensor, " placeholders"],
) -> ModelFacts:
    """Run a prompt a few times and see what the model is made of.

    Args:
        adapter: the model's adapter; only its decoder and LM head are used.
        inputs: the model's inputs of one sample, on the model's device, without padding.
        placeholders: positions of the image tokens.

    Raises:
        LayoutError: the LM head reads no module's output, or its logits follow no known law.
    """
    with evaluating(adapter):
        norm, tower, calls = _final_norm(adapter, inputs)
        scale, cap = _head_law(adapter, inputs, norm)
        states = _states(adapter, inputs, norm)
        bidirectional = _reads_ahead(adapter, inputs, norm, states, placeholders)
        answer_type = _answer_type(adapter, inputs, norm, states) if bidirectional else 0
        whole = not _runs_up_to(adapter, inputs, int(placeholders.max()) + 1)
        required = _required(adapter, inputs, norm, states, placeholders)
    return ModelFacts(norm, tower, calls, scale, cap, bidirectional, whole, answer_type, required)


def _rows(inputs: Mapping[str, Tensor]) -> Tensor:
    length = inputs["input_ids"].shape[1]
    return torch.arange(max(0, length - _ROWS), length, device=inputs["input_ids"].device)


def _run(adapter: Adapter, inputs: Mapping[str, Tensor]) -> Tensor:
    with selected_rows(adapter.head, _rows(inputs)):
        return adapter.model(**inputs, use_cache=False, return_dict=True).logits[0]


def _final_norm(
    adapter: Adapter, inputs: Mapping[str, Tensor]
) -> tuple[nn.Module, nn.Module | None, int]:
    """The module whose output the LM head reads; the vision encoder, and how often it runs."""
    read: list[Tensor] = []
    made: list[tuple[nn.Module, Tensor]] = []
    tower = _tower(adapter)
    calls: list[None] = []
    hooks: list[tuple[nn.Module, Any]] = [
        (adapter.head, lambda _m, args, _o: read.append(args[0].detach())),
        (adapter.model if tower is None else tower, lambda *_: calls.append(None)),
        *((module, _keeper(made)) for module in adapter.decoder.modules()),
    ]
    with _hooked(hooks):
        _run(adapter, inputs)
    if len(read) != 1:
        raise LayoutError(f"the LM head runs {len(read)} times in one forward, expected once.")
    rows = _rows(inputs)
    for module, states in reversed(made):
        if states.shape[1] > rows[-1] and torch.equal(states[:, rows].to(read[0]), read[0]):
            return module, tower, len(calls)
    raise LayoutError(
        "the LM head reads the output of no module: states are changed after the last layer."
    )


@uninterrupted
def _hooked(hooks: Iterable[tuple[nn.Module, Any]]) -> Iterator[None]:
    """Forward hooks on some modules."""
    with ExitStack() as stack:
        for module, hook in hooks:
            stack.callback(module.register_forward_hook(hook).remove)
        yield


def _keeper(made: list[tuple[nn.Module, Tensor]]) -> Any:
    def keep(module: nn.Module, _args: Any, output: Any) -> None:
        if isinstance(output, Tensor) and output.ndim == 3 and output.is_floating_point():
            made.append((module, output))

    return keep


def _tower(adapter: Adapter) -> nn.Module | None:
    """The vision encoder; None where the model names none."""
    try:
        tower = adapter.model.get_encoder(modality="image")
    except (AttributeError, TypeError, ValueError, NotImplementedError):
        return None
    named = isinstance(tower, nn.Module) and tower is not adapter.model
    return tower if named else None


def _head_law(
    adapter: Adapter, inputs: Mapping[str, Tensor], norm: nn.Module
) -> tuple[float, float | None]:
    """Factor and soft cap that turn ``W h + b`` into the model's logits.

    The states are enlarged on the way, until a cap would show.
    """
    weight, bias = head_matrix(adapter.head)
    plain = _with_states(adapter, inputs, norm, 1.0)
    linear = lens_logits(plain[0], weight, bias).T
    factor = _LARGE / max(float(linear.abs().max()), 1e-9)
    states, logits = _with_states(adapter, inputs, norm, max(1.0, factor))
    linear = lens_logits(states, weight, bias).T.double()
    logits = logits.to(linear)
    if logits.shape != linear.shape:
        raise LayoutError(
            f"the model's logits are {tuple(logits.shape)}, its LM head makes "
            f"{tuple(linear.shape)}."
        )
    return head_law(
        linear.flatten(), logits.flatten(), exact=weight.dtype in (torch.float32, torch.float64)
    )


def head_law(
    linear: Float[Tensor, " values"], logits: Float[Tensor, " values"], *, exact: bool = True
) -> tuple[float, float | None]:
    """The factor s and cap c for which logits = s * linear, or c * tanh(s * linear / c).

    Args:
        linear: what the LM head's matrix makes.
        logits: what the model gives.
        exact: whether the model computes in float32; half precision agrees less.

    Returns:
        The factor, exactly 1.0 where the logits are the linear values; the cap or None.

    Raises:
        LayoutError: no such law holds.

    Example:
        >>> import torch
        >>> linear = torch.linspace(-40, 40, 101, dtype=torch.float64)
        >>> [round(x, 3) for x in head_law(linear, 30 * torch.tanh(0.5 * linear / 30))]
        [0.5, 30.0]
    """
    tolerance = 1e-3 if exact else 3e-2
    size = float(logits.abs().max())
    scale = float((linear * logits).sum() / linear.square().sum().clamp(min=1e-300))
    if float((logits - scale * linear).abs().max()) <= tolerance * size:
        return (1.0 if abs(scale - 1) <= tolerance else scale), None
    low, high, best = -20.0, 10.0, (torch.inf, 1.0, 1.0)
    for _ in range(4):  # ever finer
        steps = torch.linspace(low, high, 200).tolist()
        tried = [(*_fit_cap(linear, logits, size * (1 + 2**step)), step) for step in steps]
        *found, at = min(tried)
        best = min(best, tuple(found))  # type: ignore[assignment]
        width = (high - low) / 100
        low, high = at - width, at + width
    off, scale, cap = best
    if off > 2 * tolerance * size:
        raise LayoutError(
            "the model's logits are neither its LM head's output nor that output scaled and "
            "soft-capped, so words can't be read from states."
        )
    # caps are round numbers; the search is not
    cap = round(cap, 1) if abs(cap - round(cap, 1)) <= tolerance * cap else cap
    return (1.0 if abs(scale - 1) <= tolerance else scale), cap


def _fit_cap(linear: Tensor, logits: Tensor, cap: float) -> tuple[float, float, float]:
    """The worst error of a cap with the factor that suits it, the factor, the cap."""
    inner = logits.abs() < 0.98 * cap
    led_back = cap * torch.atanh(logits[inner] / cap)
    total = linear[inner].square().sum().clamp(min=1e-300)
    scale = float((led_back * linear[inner]).sum() / total)
    return float((cap * torch.tanh(scale * linear / cap) - logits).abs().max()), scale, cap


@uninterrupted
def _caught(norm: nn.Module, factor: float) -> Iterator[list[Tensor]]:
    """Keep the norm's output, times a factor."""
    kept: list[Tensor] = []

    def enlarge(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
        kept.append(output * factor)
        return kept[-1]

    with _hooked([(norm, enlarge)]):
        yield kept


def _with_states(
    adapter: Adapter, inputs: Mapping[str, Tensor], norm: nn.Module, factor: float
) -> tuple[Float[Tensor, "rows dim"], Float[Tensor, "rows vocabulary"]]:
    """Final states at the last positions, times a factor, and the logits made of them."""
    with _caught(norm, factor) as kept:
        logits = _run(adapter, inputs)
    return kept[-1][0, _rows(inputs)].to(adapter.device), logits.to(adapter.device)


def _states(
    adapter: Adapter, inputs: Mapping[str, Tensor], norm: nn.Module
) -> Float[Tensor, "tokens dim"]:
    with _caught(norm, 1.0) as kept:
        _run(adapter, inputs)
    return kept[-1][0].float()


def _reads_ahead(
    adapter: Adapter,
    inputs: Mapping[str, Tensor],
    norm: nn.Module,
    states: Float[Tensor, "tokens dim"],
    placeholders: Tensor,
) -> bool:
    """Whether another last token changes what earlier text becomes."""
    ids = inputs["input_ids"].clone()
    barred = set(ids[0, placeholders].tolist())
    ids[0, -1] = next(i for i in range(adapter.vocabulary) if i not in barred | {int(ids[0, -1])})
    other = _states(adapter, {**inputs, "input_ids": ids}, norm)
    return not _alike(other[:-1], states[:-1])


def _answer_type(
    adapter: Adapter,
    inputs: Mapping[str, Tensor],
    norm: nn.Module,
    states: Float[Tensor, "tokens dim"],
) -> int:
    """The entry of ``token_type_ids`` with which an answer leaves a prefix LM's prompt alone."""
    more = {
        name: torch.cat([inputs[name], inputs[name][:, -1:]], dim=1)
        for name in adapter.token_wise
        if name in inputs
    }
    for value in (0, 1) if "token_type_ids" in more else (0,):
        if "token_type_ids" in more:
            more["token_type_ids"][0, -1] = value
        if _alike(_states(adapter, {**inputs, **more}, norm)[: len(states)], states):
            return value
    raise LayoutError(
        "its prompt is read in both directions and changes with the answer after it: which input "
        "tells the answer apart is not known."
    )


def _runs_up_to(adapter: Adapter, inputs: Mapping[str, Tensor], length: int) -> bool:
    """Whether the model runs on the first tokens of a prompt, without what follows a picture."""
    try:
        _run(adapter, cut(inputs, length, adapter))
    except (ValueError, TypeError, RuntimeError, KeyError, IndexError):
        return False
    return True


def _required(
    adapter: Adapter,
    inputs: Mapping[str, Tensor],
    norm: nn.Module,
    states: Float[Tensor, "tokens dim"],
    placeholders: Tensor,
) -> dict[str, str]:
    """Side inputs of which the model says nothing when they are missing, but computes otherwise."""
    takes = signature(adapter.model.forward).parameters
    found = {}
    for name in _SIDE_INPUTS:
        if name not in takes:
            continue
        if name in inputs:
            tried = {key: value for key, value in inputs.items() if key != name}
        else:
            marks = torch.zeros_like(inputs["input_ids"])
            marks[0, placeholders] = 1
            tried = {**inputs, name: marks}
        try:
            other = _states(adapter, tried, norm)
        except (ValueError, TypeError, RuntimeError, KeyError, IndexError):
            continue  # not silent
        if not _alike(other, states):
            found[name] = "image tokens are not marked as such, and all hidden states are wrong"
    return found


def _alike(one: Float[Tensor, "tokens dim"], other: Float[Tensor, "tokens dim"]) -> bool:
    return bool((one - other).abs().max() <= 1e-3 * other.abs().max())
