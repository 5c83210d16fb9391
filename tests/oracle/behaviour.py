"""What every method computes on fixed models and pictures, as named arrays.

``tests/behaviour.npz`` holds up to 32 evenly spaced values of each array, recorded before the
package was rearranged into rooms; ``tests/test_behaviour.py`` compares. After a change that is
meant to change numbers: ``PYTHONPATH=. python -m tests.oracle.behaviour tests/behaviour.npz``.
"""

import sys
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from captum.attr import IntegratedGradients, Saliency

from captum_mllm import (
    ARC,
    MSEA,
    JointNormalization,
    LogitLens,
    MultiScaleAttribution,
    TokenActivationMap,
    TokenLogProb,
)
from captum_mllm.data import CategoryTable
from captum_mllm.methods import METHODS, explain
from captum_mllm.metrics import hallucination_scores, insertion_deletion, score_words
from captum_mllm.reference import load, make_scene, render_pil
from tests.oracle import families

KEPT = 32
Named = Iterator[tuple[str, Any]]
SCORES = ("log_prob", "decodability", "rank", "entropy", "area", "reliance")


def attributors(model, processor) -> dict[str, Any]:
    return {
        "lens": LogitLens(model, processor),
        "lens_unit": JointNormalization(LogitLens(model, processor), upsampling=2, calibration=1.5),
        "tam": TokenActivationMap(model, processor),
        "tam_parity": TokenActivationMap(model, processor, parity=True),
        "msea": MSEA(model, processor),
        "msea_paper": MSEA.paper(model, processor),
        "msea_median": MSEA(model, processor, aggregation="median"),
        "arc": ARC(model, processor),
        "msea_arc": ARC(MSEA(model, processor)),
        "msea_arc_paper": ARC.paper(MSEA.paper(model, processor)),
        "msea_tam": TokenActivationMap(MSEA(model, processor)),
        "multi_lens": MultiScaleAttribution(LogitLens(model, processor)),
    }


def of_result(result) -> Named:
    for i, maps in enumerate(result.grid_attr):
        yield f"grid{i}", maps
    yield "text", result.token_attr
    yield "probs", result.output_probs
    yield "ids", result.output_ids
    yield "scales", result.scales
    if result.relevance is not None:
        yield "relevance", result.relevance
    if result.consistency is not None:
        yield "consistency", result.consistency


def of_metrics(model, processor, inputs, result) -> Named:
    last = [len(result.output_ids) - 1]
    ids = result.output_ids
    curves = insertion_deletion(
        model, inputs, ids, result, processor=processor, tokens=last, steps=4, baseline="blur"
    )
    yield "insertion", curves.insertion
    yield "deletion", curves.deletion
    scores = hallucination_scores(model, inputs, ids, processor=processor)
    for name in SCORES:
        yield f"hall_{name}", getattr(scores, name)


def of_captum(model, processor, inputs, ids) -> Named:
    f = TokenLogProb(model, inputs, ids, processor)
    pixels, last = f.pixels, len(ids) - 1
    found: Any = IntegratedGradients(f).attribute(pixels, target=last, n_steps=4)
    for i, tensor in enumerate(found if isinstance(found, tuple) else (found,)):
        yield f"ig{i}", tensor
    try:
        found = MultiScaleAttribution(Saliency(f)).attribute(pixels, target=last)
        yield "multi_saliency", found[0] if isinstance(found, tuple) else found
    except ValueError:  # models of one size
        yield "multi_saliency_refused", [1]


def under(name: str, arrays: Named) -> Named:
    for part, array in arrays:
        yield f"{name}/{part}", array


def of_family(name: str) -> Named:
    """A tiny model of one of the ten families."""
    kin = families.family(name)
    model, processor, inputs, ids = kin.model, kin.processor, kin.inputs, kin.answer
    for kind, method in attributors(model, processor).items():
        try:
            result = method.attribute(inputs, target=ids)
        except ValueError as error:  # a prefix LM has no parity
            yield f"{kind}/refused", list(type(error).__name__.encode())
            continue
        yield from under(kind, of_result(result))
        if kind == "msea_arc":
            yield from under(kind, of_metrics(model, processor, inputs, result))
    two = kin.encode(kin.wide_picture, kin.other_picture)
    try:
        result = ARC(MSEA(model, processor)).attribute(two, target=ids, explain="answer")
        yield from under("two", of_result(result))
    except ValueError:  # PaliGemma's pictures have one size
        pass
    yield from of_captum(model, processor, inputs, ids)
    generated = LogitLens(model, processor).attribute(inputs, gen_args={"max_new_tokens": 4})
    yield from under("generated", of_result(generated))


def of_shipped(name: str) -> Named:
    """A shipped model, with masks and every method by its name."""
    model, processor = load(name)
    scene = make_scene(7)
    picture, masks = render_pil(scene, 112)
    turn = [{"type": "image"}, {"type": "text", "text": "what is in the picture?"}]
    text = processor.apply_chat_template(
        [{"role": "user", "content": turn}], add_generation_prompt=True
    )
    inputs = dict(processor(images=picture, text=text, return_tensors="pt"))
    ids = LogitLens(model, processor).attribute(inputs).output_ids
    table = CategoryTable.of(tuple(dict.fromkeys(scene.categories)))
    by_name = dict(zip(scene.categories, masks, strict=False))
    for kind, method in attributors(model, processor).items():
        result = method.attribute(inputs, target=ids)
        yield from under(kind, of_result(result))
        if result.units == "[0, 1]":
            scored = score_words(result, by_name, table=table, metrics=("average_precision",))
            yield f"{kind}/obj", scored.obj
            yield f"{kind}/func", scored.func
            yield f"{kind}/ap", scored.more["average_precision"]
        if kind == "msea_arc":
            yield from under(kind, of_metrics(model, processor, inputs, result))
    msea = MSEA(model, processor, scales=(1.0, 1.5), consistency=True)
    yield from under("msea_consistency", of_result(msea.attribute(inputs, target=ids)))
    both = ARC(MSEA(model, processor))
    result = both.attribute(inputs, target=ids, explain="all", images=[picture])
    yield from under("all_images", of_result(result))
    yield "to_image", both.attribute(inputs, target=ids[:3]).to_image(0, picture)
    yield from of_captum(model, processor, inputs, ids)
    for method in METHODS:
        if method not in ("mask", "direct", "direct_lens"):  # the last two came after the record
            options = {"steps": 4} if method == "integrated_gradients" else {}
            result = explain(method, model, processor, inputs, ids[:4], **options)
            yield from under(f"explain_{method}", of_result(result))


SUBJECTS = {f"tiny_{name}": (of_family, name) for name in families.NAMES} | {
    name: (of_shipped, name) for name in ("llava", "qwen2vl", "internvl", "biased")
}


def kept(array: Any) -> np.ndarray:
    """Shape and largest absolute value of an array, then up to 32 evenly spaced values."""
    values = np.asarray(array.detach().cpu() if isinstance(array, torch.Tensor) else array)
    flat = values.astype(np.float64).ravel()
    places = np.linspace(0, max(flat.size - 1, 0), min(KEPT, flat.size)).round().astype(int)
    largest = np.nanmax(np.abs(flat), initial=0.0)
    return np.array([values.ndim, *values.shape, largest, *flat[places]])


def record(subject: str) -> dict[str, np.ndarray]:
    """What is kept of every array of one of `SUBJECTS`."""
    of, name = SUBJECTS[subject]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return {f"{subject}/{part}": kept(array) for part, array in of(name)}


if __name__ == "__main__":
    torch.set_num_threads(1)
    arrays = {name: a for subject in SUBJECTS for name, a in record(subject).items()}
    np.savez_compressed(sys.argv[1], **arrays)
