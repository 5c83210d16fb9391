"""Which samples a comparison of maps may count: checks of the answer before any map is made."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from captum_mllm.adapters import Adapter, find_adapter
from captum_mllm.metrics.perturbation import all_masks, check_settings
from captum_mllm.model.baselines import Baseline, PerturbableImages, black_pixel
from captum_mllm.model.forward import answer_log_probs, evaluating
from captum_mllm.model.generation import generate_answer
from captum_mllm.model.inputs import Sample, read_sample
from captum_mllm.model.targets import chosen_tokens, read_question
from captum_mllm.validation import ArgumentError, check_number
from captum_mllm.words import tokenizer_of


@dataclass(frozen=True)
class SampleGates:
    """Checks of one sample, made by :func:`sample_gates` before any attribution.

    Args:
        stable: the model's greedy answer is the same twice.
        greedy: the explained answer is the greedy one, as far as it goes.
        reencoded: its ids survive being decoded and encoded again.
        blank_differs: without the images the greedy answer is another one.
        drops: per token, whether the images raise its log p above the baseline's.
        tokens: position of each of these tokens in the answer.
        answer_ids: ids of the explained answer.
    """

    stable: bool
    greedy: bool
    reencoded: bool
    blank_differs: bool
    drops: tuple[bool, ...]
    tokens: tuple[int, ...]
    answer_ids: tuple[int, ...]

    @property
    def sample(self) -> bool:
        """Whether the sample passes all checks that are not of single tokens."""
        return self.stable and self.greedy and self.reencoded and self.blank_differs

    @property
    def passing(self) -> tuple[int, ...]:
        """Positions of the tokens that pass, none where the sample does not."""
        pairs = zip(self.tokens, self.drops, strict=True)
        return tuple(token for token, drop in pairs if drop and self.sample)


def sample_gates(
    model: Any,
    inputs: Mapping[str, Any],
    target: Any = None,
    *,
    processor: Any,
    tokens: Sequence[int] | None = None,
    baseline: Baseline = "mean",
    least_drop: float = 0.0,
    gen_args: Mapping[str, Any] | None = None,
) -> SampleGates:
    r"""Check a sample before its maps are compared: three short generations and one forward.

    Fix the samples and tokens that count before any attribution, by these gates: a word that the
    model says without the image, or that is not the model's own, makes every map look unfaithful.

    Args:
        model: a transformers model of a registered family; left unchanged.
        inputs: the processor's mapping for one sample, of any number of images or videos.
        target: the answer to be explained: token ids, or a string; default None: the greedy one.
        processor: the model's processor, whose tokenizer decodes and encodes.
        tokens: positions in the answer whose drop is checked, default all.
        baseline: the blank images: "mean" (default; each image's mean colour), "black" or "blur";
            that of the measure which follows.
        least_drop: nats by which the images must raise a token's log p at least; more than that
            passes, default 0.
        gen_args: settings of ``generate`` for the greedy answer, default None. With a target the
            length is that of the target.

    Returns:
        :class:`SampleGates`.

    Raises:
        TypeError: arguments of another kind.
        ValueError: bad input, no tokenizer, or an empty answer.

    Reference:
        Ours, after the preregistered gates of visual evaluations of attribution.

    Example:
        >>> from captum_mllm.reference import load, make_scene, render_pil
        >>> model, processor = load()
        >>> picture, _ = render_pil(make_scene(1))
        >>> inputs = processor(images=picture, text="USER: <image>\nwhat is this ? ASSISTANT:",
        ...     return_tensors="pt")
        >>> found = sample_gates(model, inputs, processor=processor)
        >>> found.stable, found.greedy, found.reencoded
        (True, True, True)
    """
    check_settings(baseline)
    least_drop = check_number("least_drop", least_drop, "from 0", lambda d: 0 <= d < float("inf"))
    tokenizer = tokenizer_of(processor)
    if not hasattr(tokenizer, "decode"):
        raise ArgumentError("processor", "must be the model's processor with its tokenizer.")
    given = None if target is None else read_question(model, inputs, target, processor)
    adapter, sample = given[:2] if given else _question(model, inputs)
    settings = dict(gen_args or {}) | ({"max_new_tokens": len(given[2])} if given else {})
    with evaluating(adapter):
        first = generate_answer(sample, adapter, settings, may_be_empty=given is not None)
        second = generate_answer(sample, adapter, settings, may_be_empty=True)
        answer = given[2] if given else first
        chosen = chosen_tokens(tokens, len(answer))
        images = PerturbableImages(adapter, sample, baseline, black_pixel(processor))
        blank = images.replaced(all_masks(sample, True))
        without = replace(sample, kwargs={**sample.kwargs, **blank})
        other = generate_answer(without, adapter, settings, may_be_empty=True)
        versions = [images.replaced(all_masks(sample, False)), blank]
        with_images, alone = answer_log_probs(adapter, sample, answer, versions, [chosen, chosen])
    drops = (with_images.double() - alone.double() > least_drop).tolist()
    text = tokenizer.decode(answer.tolist(), clean_up_tokenization_spaces=False)
    again = tokenizer(text, add_special_tokens=False)["input_ids"]
    return SampleGates(
        stable=torch.equal(first, second),
        greedy=torch.equal(first, answer),
        reencoded=list(again) == answer.tolist(),
        blank_differs=not torch.equal(other, answer),
        drops=tuple(drops),
        tokens=tuple(chosen),
        answer_ids=tuple(answer.tolist()),
    )


def _question(model: Any, inputs: Mapping[str, Any]) -> tuple[Adapter, Sample]:
    adapter = find_adapter(model)
    return adapter, read_sample(inputs, adapter)


def gates_table(gates: Iterable[SampleGates]) -> str:
    """How many samples, and tokens, pass each gate: a table in Markdown.

    Args:
        gates: one per sample.

    Returns:
        A row per gate with counts, the last one for tokens that pass everything.

    Raises:
        ValueError: no sample.

    Reference:
        Ours.

    Example:
        >>> one = SampleGates(True, True, True, False, (True, False), (0, 1), (5, 6))
        >>> print(gates_table([one]))
        | gate | of | passed | share |
        | --- | --- | --- | --- |
        | stable greedy answer | 1 samples | 1 | 100 % |
        | the answer is the greedy one | 1 samples | 1 | 100 % |
        | ids survive re-encoding | 1 samples | 1 | 100 % |
        | blank images give another answer | 1 samples | 0 | 0 % |
        | all of these | 1 samples | 0 | 0 % |
        | log p drops without the images | 2 tokens | 1 | 50 % |
        | everything | 2 tokens | 0 | 0 % |
    """
    found = list(gates)
    if not found:
        raise ArgumentError("gates", "is empty: give the gates of at least one sample.")
    tokens = sum(len(one.tokens) for one in found)
    rows = [
        ("stable greedy answer", sum(one.stable for one in found), len(found), "samples"),
        ("the answer is the greedy one", sum(one.greedy for one in found), len(found), "samples"),
        ("ids survive re-encoding", sum(one.reencoded for one in found), len(found), "samples"),
        (
            "blank images give another answer",
            sum(one.blank_differs for one in found),
            len(found),
            "samples",
        ),
        ("all of these", sum(one.sample for one in found), len(found), "samples"),
        ("log p drops without the images", sum(sum(one.drops) for one in found), tokens, "tokens"),
        ("everything", sum(len(one.passing) for one in found), tokens, "tokens"),
    ]
    lines = ["| gate | of | passed | share |", "| --- | --- | --- | --- |"]
    lines += [
        f"| {name} | {count} {unit} | {passed} | {passed / count:.0%} |".replace("%", " %")
        for name, passed, count, unit in rows
    ]
    return "\n".join(lines)
