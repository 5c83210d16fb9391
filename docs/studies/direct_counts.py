"""What recording direct logit attribution asks of a device, counted on a CPU.

:mod:`studies.direct_cost` calls it (``--count``). A forward over a short prompt waits for the host,
which launches kernel after kernel; so kernels and waits are counted, and bytes, which no GPU is
needed for.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch

from captum_mllm.adapters import find_adapter
from captum_mllm.model.direct import recorded_contributions
from captum_mllm.model.forward import captured_forward, evaluating
from captum_mllm.model.inputs import append_answer, read_sample
from captum_mllm.model.write_paths import write_paths
from studies.counted import Counts, counted
from studies.large_models import ANSWER, FAMILIES, Case, Family, build, make_inputs, tiny

WIDE = {"llava": 2, "qwen2vl": 6}  # layers of full width, whose bytes are counted
ROWS = {
    "bare_kernels": "kernels of the forward",
    "kernels": "kernels of the recording",
    "a_layer": "of these, a layer",
    "share": "% of the forward's",
    "waits": "waits of the host for the recording",
    "bare_peak": "MiB above the weights at the forward's peak",
    "peak": "MiB above the weights with the recording",
}

NOTE = (
    "Counted on a CPU, 576 image tokens (InternVL 256) and 64 of the answer, bfloat16. Kernels: "
    "operations that compute or copy, in models of full depth, whose keys and values have their "
    "full size and whose layers are narrow otherwise. Waits: times when the host needs a value "
    "from the device. MiB: tensors alive at one time in models of full width, with two or six "
    "layers of the language model and one of the vision encoder; what a kernel takes for itself "
    "is not seen."
)


def forwards(
    model: Any, family: Family, case: Case, answer: int
) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """The teacher-forced forward of a case, and the same with contributions recorded.

    Args:
        model: from :func:`studies.large_models.build`; ``evaluating`` while they are called.
        family: its architecture.
        case: the picture.
        answer: tokens of the answer.
    """
    prompt, _, ids = make_inputs(family, case, model.device, answer)
    prompt = {
        name: value.to(model.dtype) if value.is_floating_point() else value
        for name, value in prompt.items()
    }
    adapter = find_adapter(model)
    sample = read_sample(prompt, adapter)
    full = append_answer(sample, ids, adapter)
    end = full["input_ids"].shape[1]
    rows = torch.arange(end - answer - 1, end - 1, device=model.device)
    targets = full["input_ids"][0][rows + 1]

    def bare() -> Any:
        return captured_forward(adapter, full, sample.grids, rows=rows)

    def recorded() -> Any:
        with recorded_contributions(adapter, write_paths(adapter), rows, targets) as found:
            bare()
        return found[0]

    return bare, recorded


def counts_of(model: Any, family: Family, case: Case, answer: int) -> tuple[Counts, Counts]:
    """Counts of a forward, and of the same with contributions recorded.

    Args:
        model: from :func:`studies.large_models.build`.
        family: its architecture.
        case: the picture.
        answer: tokens of the answer.
    """
    found = []
    with evaluating(find_adapter(model)):
        for call in forwards(model, family, case, answer):
            call()
            with counted() as counts:
                call()
            found.append(counts)
    return found[0], found[1]


def narrow(name: str, text: Mapping[str, Any] | None = None, depth: int | None = None) -> Family:
    """A family of full depth with narrow layers, whose keys and values have their full size.

    Args:
        name: key in ``FAMILIES``.
        text: further settings of the language model.
        depth: layers of the vision encoder; all by default.
    """
    family, small = FAMILIES[name], tiny(name)
    width: dict[str, Any] = {"hidden_size": 64, "head_dim": 128, "intermediate_size": 48}
    vision = {**small.vision}
    if "image_size" in vision:
        vision["image_size"] = family.vision["image_size"]
    if name != "llava":  # their heads are as wide as the model divided by them
        width |= {"hidden_size": 1024, "head_dim": 128, "num_attention_heads": 8}
    if name == "qwen2vl":
        vision["hidden_size"] = width["hidden_size"]
    layers = "depth" if name == "qwen2vl" else "num_hidden_layers"
    vision[layers] = depth or family.vision[layers]
    return replace(family, text={**family.text, **width, **(text or {})}, vision=vision)


def full_width(name: str) -> Family:
    """A family with few layers of full width, one in the vision encoder.

    Args:
        name: key in ``WIDE``.
    """
    family = FAMILIES[name]
    depth = {"depth" if name == "qwen2vl" else "num_hidden_layers": 1}
    text = {**family.text, "num_hidden_layers": WIDE[name]}
    return replace(family, text=text, vision={**family.vision, **depth})


def count(name: str, *, wide: bool = True) -> dict[str, float]:
    """All counts of one family, see ``ROWS``.

    Args:
        name: key in ``FAMILIES``.
        wide: also the bytes of the model of full width, which takes minutes and some GiB.
    """
    device = torch.device("cpu")
    family = narrow(name)
    bare, more = counts_of(build(family, device), family, family.cases[0], ANSWER)
    kernels, waits = (
        [getattr(one, what).total() for one in (bare, more)] for what in ("kernels", "waits")
    )
    row: dict[str, float] = {"bare_kernels": kernels[0], "kernels": kernels[1] - kernels[0]}
    row["a_layer"] = row["kernels"] / family.text["num_hidden_layers"]
    row["share"] = 100 * row["kernels"] / row["bare_kernels"]
    row["waits"] = waits[1] - waits[0]
    if wide and name in WIDE:
        family = full_width(name)
        pair = counts_of(build(family, device), family, family.cases[0], ANSWER)
        row["bare_peak"], row["peak"] = (one.peak / 2**20 for one in pair)
    return row


def as_text(counts: Mapping[str, Mapping[str, Mapping[str, float]]]) -> list[str]:
    """The tables of counts, as lines of Markdown.

    Args:
        counts: per state of the package ("before", "now"), per family its row.
    """
    out = ["", "# What the recording asks of a device", "", NOTE]
    states = list(counts)
    for name in next(iter(counts.values())):
        out += ["", f"## {FAMILIES[name].title}", "", f"| | {' | '.join(states)} |"]
        out += [f"| --- |{' --- |' * len(states)}"]
        for key, title in ROWS.items():
            values = [counts[state].get(name, {}).get(key) for state in states]
            if any(value is not None for value in values):
                shown = ("" if v is None else f"{v:.3g}" if v < 100 else f"{v:.0f}" for v in values)
                out.append(f"| {title} | {' | '.join(shown)} |")
    return out
