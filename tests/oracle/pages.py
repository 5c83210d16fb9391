"""Pages of the shipped model's answers, for the tests."""

from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch

from captum_mllm import LogitLens
from captum_mllm.methods import explain
from captum_mllm.reference import load, make_scene, render_pil
from captum_mllm.visualization import Contents, contents_of, describe, render_page

QUESTION = "describe the picture."


@dataclass(frozen=True)
class Page:
    results: dict[str, Any]
    contents: Contents
    html: str
    size: tuple[int, int]


@cache
def page_of(names, words=0, scene=7):
    """An answer of the shipped llava by some methods; ``words``: repeated to so many words."""
    model, processor = load()
    picture, _ = render_pil(make_scene(scene, "test"))
    prompt = f"USER: <image>\n{QUESTION} ASSISTANT:"
    inputs = processor(images=picture, text=prompt, return_tensors="pt")
    target = explain("lens", model, processor, inputs).output_ids
    if words:
        target = target.repeat(-(-words // len(target)))[:words]
    results = {name: explain(name, model, processor, inputs, target) for name in names}
    return _page(results, [picture], QUESTION)


def _page(results, pictures, prompt):
    contents = contents_of(results, pictures, prompt=prompt)
    html = render_page(contents, notes=["A note."], facts=describe(load()[0]).facts)
    return Page(results, contents, html, (pictures[0].height, pictures[0].width))


@cache
def several():
    """Two pictures of one prompt."""
    model, processor = load()
    pictures = [render_pil(make_scene(scene, "test"))[0] for scene in (7, 8)]
    text = f"USER: <image><image>\n{QUESTION} ASSISTANT:"
    inputs = processor(images=pictures, text=text, return_tensors="pt")
    result = LogitLens(model, processor).attribute(inputs, "this picture shows a key .")
    return _page({"lens": result}, pictures, QUESTION)


HOSTILE = (
    " \u05d6\u05d1\u05e8\u05d4", " <img", " src=x", " onerror=window.broken=1>", "</script>",
    "<!--", " \u6591\u9a6c", "\u5728", "\u8349\u5730", " \U0001f993", f" {'x' * 300}",
    " \u202eabc", "{{7*7}}",
)  # fmt: skip


@cache
def hostile():
    """An answer whose words would break a page that is put together from strings."""
    report = page_of(("lens",))
    result = report.results["lens"]
    n = len(HOSTILE)
    start = len(result.input_tokens) - len(result.output_tokens)
    some = result.select(range(n))
    made = replace(
        some,
        output_tokens=HOSTILE,
        input_tokens=(*result.input_tokens[:start], *HOSTILE),
        token_attr=torch.nn.functional.pad(some.token_attr, (0, 0))[:, : start + n],
    )
    picture, _ = render_pil(make_scene(7, "test"))
    return _page({"<b>lens</b>": made}, [picture], "</script><b>what</b> {{7*7}}")
