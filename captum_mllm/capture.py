"""Hooks in the vision encoder, the final norm and the LM head, set only while we run."""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from captum_mllm.adapters import Adapter
from captum_mllm.functional import lens_logits
from captum_mllm.geometry import ImageGrid


@dataclass
class Captured:
    """What the hooks saw in one forward.

    Args:
        final_hidden: states after the final norm, (positions, dim): what the LM head reads.
        lens_hidden: the same of the chosen layer; ``final_hidden`` itself for the last layer.
        logits: the model's logits at the asked rows, (rows, vocabulary), unprocessed.
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
    """One forward of the whole model under hooks; the LM head sees only the asked rows.

    Args:
        adapter: the model's adapter, already ``running()``.
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
    with _hooks(adapter, grids, rows, layer) as seen:
        output = adapter.model(**inputs, use_cache=False, return_dict=True)
    expected = {"final norm": 1, "LM head": 1, "lens layer": 1}
    expected |= {"vision encoder": len(adapter.tower_calls(grids))}
    for name, times in expected.items():
        if len(seen[name]) != times:
            raise ValueError(
                f"model: the hook on the {name} fired {len(seen[name])} times in one forward, "
                f"expected {times}. Is a part of the model compiled (torch.compile), or replaced? "
                f"Pass the plain model."
            )
    for name in ("final norm", "lens layer"):
        if not torch.isfinite(seen[name][0]).all():
            raise ValueError(
                f"model: hidden states at the {name} hold NaN or infinite values; try another "
                f"dtype (float32 or bfloat16), or check the weights."
            )
    device = adapter.device  # a dispatched model's parts lie on several
    return Captured(
        final_hidden=seen["final norm"][0][0].to(device),
        lens_hidden=seen["lens layer"][0][0].to(device),
        logits=output.logits[0].to(device),
    )


@contextmanager
def _hooks(
    adapter: Adapter, grids: Sequence[ImageGrid], rows: Tensor, layer: int
) -> Iterator[dict[str, list[Any]]]:
    """Set the hooks; yields what each saw, call by call; removes them whatever happens."""
    seen: dict[str, list[Any]] = defaultdict(list)

    def on_tower(_module: nn.Module, _args: Any, output: Any) -> None:
        calls = adapter.tower_calls(grids)
        if len(seen["vision encoder"]) < len(calls):
            adapter.check_features(output, calls[len(seen["vision encoder"])])
        seen["vision encoder"].append(None)

    def on_norm(_module: nn.Module, _args: Any, output: Tensor) -> None:
        seen["final norm"].append(output)
        if layer == -1:
            seen["lens layer"].append(output)

    def on_layer(_module: nn.Module, _args: Any, output: Any) -> None:
        states = output[0] if isinstance(output, tuple) else output
        # The bare forward: hooks on the norm are meant for the model's last layer.
        seen["lens layer"].append(adapter.final_norm.forward(states))

    def before_head(_module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        seen["LM head"].append(None)
        return (args[0][:, rows.to(args[0].device)], *args[1:])

    with ExitStack() as stack:
        stack.callback(adapter.tower.register_forward_hook(on_tower).remove)
        stack.callback(adapter.final_norm.register_forward_hook(on_norm).remove)
        if layer != -1:
            stack.callback(adapter.layers[layer].register_forward_hook(on_layer).remove)
        stack.callback(adapter.head.register_forward_pre_hook(before_head).remove)
        yield seen


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
    ours = lens_logits(hidden, *adapter.class_weights(class_ids)).T
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
    return torch.cat(parts, dim=1)
