"""Lines on the processor: does it belong to the model, and does it give all that matters?"""

import json
from collections.abc import Iterator, Mapping
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from captum_mllm.adapters import DiscoveredAdapter
from captum_mllm.checking.report import Finding
from captum_mllm.checking.subject import NotTriedError, Subject
from captum_mllm.model.observing import last_logits

_OWN_PROCESSOR = "Load the processor of the model's own checkpoint (AutoProcessor.from_pretrained)."
_SETTINGS = ("image_mean", "image_std", "rescale_factor", "patch_size", "merge_size", "size")
_SETTINGS += ("crop_size", "do_normalize", "do_rescale", "temporal_patch_size")
MATTERS = 1e-3  # change of logits, in their size, from which on an input matters
_GEOMETRY = ("patch_size", "temporal_patch_size", ("merge_size", "spatial_merge_size"))


def check_inputs(subject: Subject) -> Finding:
    """What the processor makes of picture and prompt.

    Args:
        subject: the model under check.
    """
    shapes = {name: list(value.shape) for name, value in subject.inputs.items()}
    text = ", ".join(f"{name} {tuple(shape)}" for name, shape in shapes.items())
    width, height = subject.picture.size
    return Finding("inputs", "passed", f"A picture of {width} x {height} gives {text}.", "", shapes)


def check_image_tokens(subject: Subject) -> Finding:
    """Whether the prompt holds as many image tokens as the tower makes features.

    Args:
        subject: the model under check.
    """
    lacking = [name for name in subject.adapter.required if name not in subject.inputs]
    if lacking:
        raise NotTriedError(f"The inputs lack {', '.join(lacking)}.", "Mend 'side inputs'.")
    try:
        sample = subject.sample
    except (ValueError, TypeError) as error:
        probed = isinstance(subject.adapter, DiscoveredAdapter)
        return Finding("image tokens", "failed", str(error), "" if probed else _OWN_PROCESSOR)
    count = sum(len(where) for where in sample.image_positions)
    grids = "; ".join(" x ".join(map(str, grid.shape)) for grid in sample.grids)
    length = len(sample.prompt_ids)
    text = f"{count} of {length} tokens are the image's ({grids} cells), as its pixels make."
    if isinstance(subject.adapter, DiscoveredAdapter):
        text += f" Probed: {subject.adapter.shown(subject.inputs).layout}."
    return Finding("image tokens", "passed", text, "", {"image": count, "all": length})


def check_processor(subject: Subject) -> Finding:
    """Whether the processor is the model's, as far as their settings tell.

    Args:
        subject: the model under check.
    """
    facts = [*_tokenizer_facts(subject), *_geometry_facts(subject), *_stored_facts(subject)]
    wrong = [text for text, fits in facts if fits is False]
    good = [text for text, fits in facts if fits]
    unknown = [text for text, fits in facts if fits is None]
    if wrong:
        return Finding("processor", "failed", " ".join(wrong), _OWN_PROCESSOR)
    if not good:
        raise NotTriedError(" ".join(unknown))
    return Finding("processor", "passed", " ".join([*good, *unknown]))


def check_side_inputs(subject: Subject) -> Finding:
    """Leave inputs out once each, and add those that the model would take.

    Args:
        subject: the model under check.
    """
    inputs = subject.inputs
    adapter = subject.adapter
    missing = [
        f"{name} is missing: without it {without}."
        for name, without in adapter.required.items()
        if name not in inputs
    ]
    if missing:
        return _missing(missing, {})
    absent = dict(_absent(subject))
    try:
        logits = last_logits(adapter, inputs)
    except Exception as error:
        needed = [name for name, made in absent.items() if _runs(subject, {**inputs, name: made})]
        if not needed:
            raise
        texts = [f"{name} is missing: without it the model refuses: {error}" for name in needed]
        return _missing(texts, {})
    size = float(logits.abs().max())
    figures: dict[str, Any] = {}
    for name, made in absent.items():
        figures[f"with {name}"] = change = _change(subject, {**inputs, name: made}, logits)
        if isinstance(change, float) and change > MATTERS * size:
            missing.append(
                f"{name} is missing: the model takes it, and with it logits change by {change:.3g}"
                f" (their size is {size:.3g})."
            )
    matters, refused, silent = [], [], []
    for name in _optional(subject):
        change = _change(subject, {k: v for k, v in inputs.items() if k != name}, logits)
        figures[f"without {name}"] = change
        if not isinstance(change, float):
            refused.append(name)
        elif change > MATTERS * size:
            matters.append(f"{name} (by {change:.3g} of {size:.3g})")
        else:
            silent.append(name)
    if missing:
        return _missing(missing, figures)
    parts = [
        f"needed, and the model says so: {', '.join(refused)}" if refused else "",
        f"change the logits silently where left out: {', '.join(matters)}" if matters else "",
        f"make no difference here: {', '.join(silent)}" if silent else "",
    ]
    text = "; ".join(part for part in parts if part) or "there are none"
    advice = "Always pass everything that the processor returns." if matters else ""
    return Finding("side inputs", "passed", f"All are there; {text}.", advice, figures)


def _missing(missing: list[str], figures: Mapping[str, Any]) -> Finding:
    advice = (
        "Pass everything that the model's own processor returns; update the processor if it does "
        "not return it."
    )
    return Finding("side inputs", "failed", " ".join(missing), advice, figures)


def _absent(subject: Subject) -> Iterator[tuple[str, Tensor]]:
    """Token-wise inputs that the model takes and the processor did not make, as it would."""
    inputs, adapter = subject.inputs, subject.adapter
    known = signature(adapter.model.forward).parameters
    ids = inputs["input_ids"]
    visual = torch.tensor(adapter.visual_ids[:1], device=ids.device)
    for name in adapter.token_wise:
        if name in known and name not in inputs and name not in ("input_ids", "attention_mask"):
            yield name, torch.isin(ids, visual).long()


def _optional(subject: Subject) -> list[str]:
    """Inputs other than pixels without which the adapter would go on."""
    needed = {"input_ids", *subject.adapter.pixel_keys, *subject.adapter.required}
    return [name for name in subject.inputs if name not in needed]


def _runs(subject: Subject, inputs: dict[str, Tensor]) -> bool:
    return isinstance(_change(subject, inputs, torch.zeros(())), float)


def _change(subject: Subject, inputs: dict[str, Tensor], logits: Tensor) -> float | str:
    """Largest change of the logits, or the model's error."""
    try:
        return float((last_logits(subject.adapter, inputs) - logits).abs().max())
    except Exception as error:  # any error is an answer: the model does not go on in silence
        return f"{type(error).__name__}: {str(error)[:200]}"


# ---- facts: (sentence, whether it fits, or None where that can't be told) ------------------------

_Facts = Iterator[tuple[str, bool | None]]


def _tokenizer_facts(subject: Subject) -> _Facts:
    tokenizer = getattr(subject.processor, "tokenizer", None)
    if tokenizer is None:
        yield "It has no tokenizer.", None
        return
    adapter = subject.adapter
    rows, size = adapter.model.get_input_embeddings().weight.shape[0], len(tokenizer)
    if size > rows:
        yield f"Its tokenizer has {size} tokens, the model {rows} embeddings.", False
    else:
        yield f"{size} tokens for {rows} embeddings.", True
    # Of Gemma 3 the processor's is the begin-of-image token, the tokenizer's the model's own.
    known = (getattr(owner, "image_token_id", None) for owner in (subject.processor, tokenizer))
    found = [index for index in known if isinstance(index, int)]
    if found:
        expected = adapter.visual_ids
        fits = any(index in expected for index in found)
        wrong = f"Its image token is {found[0]}, the model's is {expected[0]}."
        yield (f"Image token {expected[0]}." if fits else wrong), fits
    ids = tokenizer(subject.prompt, add_special_tokens=False)["input_ids"]
    again = tokenizer(tokenizer.decode(ids), add_special_tokens=False)["input_ids"]
    fits = list(ids) == list(again)
    yield f"The prompt {'survives' if fits else 'does not survive'} decoding and encoding.", fits


def _geometry_facts(subject: Subject) -> _Facts:
    images = getattr(subject.processor, "image_processor", None)
    vision = getattr(subject.adapter.config, "vision_config", None)
    for names in _GEOMETRY:
        mine, theirs = (names, names) if isinstance(names, str) else names
        for owner, what in ((subject.processor, "processor"), (images, "image processor")):
            own, model = getattr(owner, mine, None), getattr(vision, theirs, None)
            if isinstance(own, int) and isinstance(model, int):
                fits = own == model
                text = f"{mine} {own}" if fits else f"Its {what}'s {mine} is {own}"
                yield (f"{text}." if fits else f"{text}, the model's is {model}."), fits


def _stored_facts(subject: Subject) -> _Facts:
    """The image processor's settings and the vocabulary against those next to the weights."""
    name = str(getattr(subject.adapter.model, "name_or_path", "") or "")
    images = getattr(subject.processor, "image_processor", None)
    stored = stored_settings(name)
    if images is None or stored is None:
        yield (
            "Its normalisation can't be compared: no processor's settings were found next to the "
            "model's weights.",
            None,
        )
    else:
        now = json.loads(json.dumps(images.to_dict(), default=str))
        other = [
            f"Its {name} is {now[name]}, the checkpoint's {stored[name]}."
            for name in _SETTINGS
            if name in stored and name in now and not _same(now[name], stored[name])
        ]
        good = "Normalisation and sizes are those stored with the weights."
        yield " ".join(other) or good, not other
    vocabulary = stored_vocabulary(name)
    if vocabulary and hasattr(subject.processor, "tokenizer"):
        mine = subject.processor.tokenizer.get_vocab()
        wrong = [token for token, index in vocabulary.items() if mine.get(token) != index]
        if wrong:
            share = len(wrong) / len(vocabulary)
            yield f"{share:.0%} of the checkpoint's tokens have another id, as {wrong[0]!r}.", False
        else:
            yield f"So are all {len(vocabulary)} tokens.", True


def stored_vocabulary(name: str) -> dict[str, int]:
    """Token -> id of the tokenizer that lies next to a model's weights; empty if there is none.

    Args:
        name: folder or hub id that the model was loaded from; nothing is downloaded.
    """
    path = _local_file(name, "tokenizer.json")
    vocabulary = json.loads(path.read_text())["model"].get("vocab", {}) if path else {}
    if isinstance(vocabulary, list):  # a unigram model's: (token, score) in the order of the ids
        return {token: index for index, (token, *_) in enumerate(vocabulary)}
    return dict(vocabulary)


def stored_settings(name: str) -> dict[str, Any] | None:
    """Settings of the image processor that lies next to a model's weights.

    Args:
        name: folder or hub id that the model was loaded from; nothing is downloaded.

    Returns:
        The settings, or None if there are none on this machine.
    """
    for file in ("preprocessor_config.json", "processor_config.json"):
        path = _local_file(name, file)
        if path is not None:
            data = json.loads(path.read_text())
            settings = data.get("image_processor", data)
            if "image_mean" in settings:
                return settings
    return None


def _local_file(name: str, file: str) -> Path | None:
    if not name:
        return None
    if Path(name).is_dir():
        return Path(name) / file if (Path(name) / file).is_file() else None
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        cached = try_to_load_from_cache(name, file)
    except HFValidationError:
        return None
    return Path(cached) if isinstance(cached, str) else None


def _same(one: Any, other: Any) -> bool:
    """Whether two settings are equal; numbers to six digits, sizes without empty entries."""
    if isinstance(one, dict) and isinstance(other, dict):
        shared = one.keys() & other.keys()
        return all(_same(one[key], other[key]) for key in shared)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_same, one, other))
    if isinstance(one, float | int) and isinstance(other, float | int):
        return abs(one - other) <= 1e-6 * max(abs(one), abs(other), 1)
    return one == other or None in (one, other) or isinstance(one, dict) != isinstance(other, dict)
