"""Synthetic scenes, conversations about them, and small models trained on both.

The models are real ones of transformers, a `LlavaForConditionalGeneration` ("llava"), a
`Qwen2VLForConditionalGeneration` ("qwen2vl": pictures of any shape) and an
`InternVLForConditionalGeneration` ("internvl": tiles and a thumbnail), and a smaller LLaVA with a
planted co-occurrence ("biased": it hallucinates, and which words is known); only their size and
their world are small. They exist because a saliency map can only be judged on a model that *sees*,
on pictures whose masks are known exactly. They are no substitute for results on public models.

What is here (everything loads on first use):

    load(name="llava", dtype=None) -> (model, processor)    the shipped weights, on CPU, eval mode
    model_path(name="llava") -> Path                        folder for AutoProcessor / AutoModel...
    make_scene(seed, split="test") -> Scene                 seed >= 0, splits are disjoint
    render.render(scenes, size=112, oversample=1, device=None) -> Rendered(pixels, masks)
        pixels float (batch, 3, size, size) in 0..1, masks bool (batch, 4, size, size)
    render_pil(scene, size=336) -> (PIL.Image, masks)       masks bool tensor (objects, size, size)
        `size` may be (height, width): the scene is stretched to it
    converse(scene, kind="list", seed=0) -> Conversation    turns of annotated words
    make_example(set, number, split="test") -> Example      scene and conversation of a test set
    SETS                                                    plain, crowded, occluded, twins, small,
                                                            interference, biased, openmoji,
                                                            questions
    named_objects(text) -> list of categories in the order in which the text names them

`Scene.objects` run from left to right; `Word.obj` is an index into them (-1: about no object) and
`Word.role` one of `captions.ROLES`. `captions.DEFAULT_QUESTION` is the prompt for the list caption.
`export` writes test sets in COCO format, `openmoji` makes the third style, `train` and
`evaluate_model` are the programs behind the models.
"""

from __future__ import annotations

import importlib

_HOME = {
    "load": "models",
    "model_path": "models",
    "Scene": "scenes",
    "SceneObject": "scenes",
    "make_scene": "scenes",
    "SETS": "sets",
    "Example": "sets",
    "make_example": "sets",
    "Rendered": "render",
    "render_pil": "render",
    "Conversation": "captions",
    "Turn": "captions",
    "Word": "captions",
    "converse": "captions",
    "named_objects": "captions",
    "CATEGORIES": "sprites",
    "STYLES": "sprites",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*globals(), *__all__]
