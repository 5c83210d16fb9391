"""Inputs of the ten tiny families that contradict each other, or only look as if they did."""

from functools import cache, partial
from math import prod
from typing import Any

import torch
from hypothesis import strategies as st

from captum_mllm import MSEA, LogitLens
from tests.fuzz.harness import Case
from tests.oracle.families import NAMES, PAD, family

Inputs = dict[str, Any]


@cache
def kin_of(name: str) -> Any:
    return family(name)


METHODS = {"LogitLens": LogitLens, "MSEA(LogitLens)": partial(MSEA, scales=(1.0, 1.5))}


@cache
def result_of(name: str, picture: str, method: str, images: bool = False) -> Any:
    """Of an undamaged picture: "picture", "other_picture", "wide_picture", "tall_picture"."""
    kin = kin_of(name)
    options = {"images": getattr(kin, picture)} if images else {}
    explain = METHODS[method](kin.model, kin.processor)
    return explain.attribute(encoded(name, picture), kin.answer, **options)


@cache
def _encoded(name: str, picture: str) -> Inputs:
    kin = kin_of(name)
    return kin.encode(getattr(kin, picture))


def encoded(name: str, picture: str = "picture") -> Inputs:
    return {key: value.clone() for key, value in _encoded(name, picture).items()}


def like(name: str, picture: str, got: Any, tolerance: float = 1e-4, images: bool = False) -> bool:
    """Whether maps and token attributions are those of an undamaged picture, but for rounding."""
    expected = result_of(name, picture, got.method, images)
    pairs = [*zip(expected.grid_attr, got.grid_attr, strict=True)]
    pairs += [(expected.token_attr, got.token_attr), (expected.output_probs, got.output_probs)]
    return all(
        a.shape == b.shape and float((a - b).abs().max()) <= tolerance * max(1.0, float(a.max()))
        for a, b in pairs
    )


def never(_: Any) -> bool:
    """A contradiction has no right value."""
    return False


# ---- damage: each returns (what, changed inputs, is right, further options of attribute) ---------


def other_picture(draw: Any, name: str, inputs: Inputs) -> tuple[Any, ...]:
    """Some pixel inputs of another picture: legitimate where they are all that differs."""
    which = draw(st.sampled_from(("other_picture", "wide_picture", "tall_picture")))
    theirs = encoded(name, which)
    about = [key for key in inputs if "pixel" in key or "image" in key]
    taken = draw(st.lists(st.sampled_from(about), min_size=1, unique=True))
    changed = inputs | {key: theirs[key] for key in taken}
    whole = same(changed, theirs)
    right = partial(like, name, which) if whole else never
    if same(changed, inputs):
        right = partial(like, name, "picture")
    return f"other picture: {which} {taken}", changed, right, {}


def same(a: Inputs, b: Inputs) -> bool:
    return all(torch.equal(a[key], b[key]) for key in a)


def other_canvas(draw: Any, name: str, inputs: Inputs) -> tuple[Any, ...]:
    """Pixels of another size; often one that makes as many patches."""
    pixels = inputs["pixel_values"]
    if pixels.ndim == 2:
        rows, cols = pixels.shape
        shape = draw(st.sampled_from(((rows // 2, cols * 2), (rows - 4, cols), (rows, cols - 3))))
        changed = pixels.flatten()[: prod(shape)].reshape(shape)
    else:
        h, w = pixels.shape[-2:]
        sizes = ((h // 2, w * 2), (h * 2, w // 2), (h // 4, w * 4), (h + 4, w), (h - 1, w), (1, 1))
        size = draw(st.sampled_from(sizes))
        flat = pixels.reshape(-1, *pixels.shape[-3:])
        changed = torch.nn.functional.interpolate(flat, size).reshape(*pixels.shape[:-2], *size)
    return f"other canvas: {tuple(changed.shape)}", inputs | {"pixel_values": changed}, never, {}


def broken_run(draw: Any, name: str, inputs: Inputs) -> tuple[Any, ...]:
    """A text token exchanged with an image token beside or inside of a run."""
    ids, order = inputs["input_ids"], torch.arange(inputs["input_ids"].shape[1])
    is_image = (ids[0] == image_id(name)).tolist()
    where = [n for n, image in enumerate(is_image) if image]
    ends = [n for n in where if n + 1 < len(is_image) and not is_image[n + 1]]
    text = [end + 1 for end in ends]
    inner = [n for n in where if n not in ends and n - 1 in where]
    one, other = draw(st.sampled_from(text)), draw(st.sampled_from(inner))
    order[one], order[other] = other, one
    together = draw(st.booleans())  # the other token-wise inputs move along, or stay
    keys = [k for k in inputs if inputs[k].shape == ids.shape] if together else ["input_ids"]
    changed = inputs | {key: inputs[key][:, order] for key in keys}
    return f"broken run: {one} and {other}", changed, never, {}


def image_id(name: str) -> int:
    config = kin_of(name).model.config
    return int(getattr(config, "image_token_id", None) or config.image_token_index)


def wrong_ids(draw: Any, name: str, inputs: Inputs) -> tuple[Any, ...]:
    """Ids out of range, of another type or shape, more or fewer image tokens."""
    ids = inputs["input_ids"].clone()
    kind = draw(
        st.sampled_from(
            ("range", "float", "1-D", "batch", "list", "fewer", "more", "int32", "empty")
        )
    )
    at = draw(st.integers(0, ids.shape[1] - 1))
    right: Any = never
    if kind == "range":
        ids[0, at] = draw(st.sampled_from((-1, 128, 97, 2**40, -(2**40))))
        right = lambda _: 0 <= int(ids[0, at]) < kin_of(name).model.config.text_config.vocab_size  # noqa: E731
    elif kind == "int32":
        ids, right = ids.int(), partial(like, name, "picture")
    elif kind in ("fewer", "more"):
        old, new = (image_id(name), 9) if kind == "fewer" else (9, image_id(name))
        where = (ids[0] == image_id(name)).nonzero() if kind == "fewer" else (ids[0] > 8).nonzero()
        del old
        chosen = [n for n in where[:, 0].tolist() if int(ids[0, n]) != new]
        ids[0, draw(st.sampled_from(chosen))] = new
    else:
        ids = {
            "float": ids.float(), "1-D": ids[0], "batch": ids.repeat(2, 1), "list": ids.tolist(),
            "empty": ids[:, :0],
        }[kind]  # fmt: skip
    return f"ids: {kind}", inputs | {"input_ids": ids}, right, {}


def attention_mask(draw: Any, name: str, inputs: Inputs) -> tuple[Any, ...]:
    """A mask that hides text, of another type or shape; or padding, which changes nothing."""
    mask, n = inputs["attention_mask"].clone(), inputs["input_ids"].shape[1]
    kinds = (
        "first",
        "middle",
        "last",
        "none",
        "shape",
        "bool",
        "float",
        "int32",
        "pad",
        "left out",
    )
    kind, k = draw(st.sampled_from(kinds)), draw(st.integers(1, 3))
    right: Any = partial(like, name, "picture")
    if kind == "pad":
        fill = {"input_ids": PAD}
        changed = {
            key: torch.cat([v.new_full((1, k), fill.get(key, 0)), v], 1) if v.shape == (1, n) else v
            for key, v in inputs.items()
        }
        return f"padding: {k}", changed, right, {}
    if kind == "left out":
        return (
            "mask: left out",
            {k: v for k, v in inputs.items() if k != "attention_mask"},
            right,
            {},
        )
    types = {"bool": torch.bool, "float": torch.float32, "int32": torch.int32}
    if kind in types:
        return f"mask: {kind}", inputs | {"attention_mask": mask.to(types[kind])}, right, {}
    if kind == "shape":
        mask = draw(st.sampled_from((mask[:, :-1], mask[0], mask.repeat(2, 1), mask[:, :0])))
    elif kind == "none":
        mask[:] = 0
    else:
        at = {"first": 0, "middle": n // 2, "last": n - k}[kind]
        mask[0, at : at + k] = 0
    return f"mask: {kind} {k}", inputs | {"attention_mask": mask}, never, {}


def side_inputs(draw: Any, name: str, inputs: Inputs) -> tuple[Any, ...]:
    """Numbers of another input than ids and pixels changed, or one left out, or one too many."""
    kind = draw(st.sampled_from(("change", "change", "remove", "add", "dtype")))
    others = [key for key in inputs if key not in ("input_ids", "pixel_values", "attention_mask")]
    undamaged = partial(like, name, "picture")
    if kind == "add" or not others:
        n = inputs["input_ids"].shape[1]
        key = draw(st.sampled_from(("position_ids", "foo", "labels", "inputs_embeds", "past")))
        value = draw(st.sampled_from((torch.zeros(1, n, dtype=torch.long), torch.ones(3), "text")))
        return f"added: {key}", inputs | {key: value}, undamaged, {}
    key = draw(st.sampled_from(others))
    if kind == "remove":
        return f"removed: {key}", {k: v for k, v in inputs.items() if k != key}, undamaged, {}
    value = inputs[key].clone()
    if kind == "dtype":
        dtype = draw(st.sampled_from((torch.int32, torch.float32, torch.bool)))
        return f"dtype: {key} {dtype}", inputs | {key: value.to(dtype)}, undamaged, {}
    flat = value.flatten()
    at = draw(st.integers(0, len(flat) - 1))
    flat[at] = draw(st.sampled_from((0, 1, 2, -1, 3, 4, 6, 8, 16, 24, 64, 10**9)))
    # image_sizes of another picture with the same grid, or a mask of 2, change no map.
    return f"changed: {key}", inputs | {key: flat.reshape(value.shape)}, undamaged, {}


def pixel_values(draw: Any, name: str, inputs: Inputs) -> tuple[Any, ...]:
    """Pixels of another type or range."""
    pixels = inputs["pixel_values"]
    kinds = ("bfloat16", "float16", "float64", "uint8", "nan", "inf", "255", "1-D", "meta", "list")
    kind = draw(st.sampled_from(kinds))
    right: Any = never
    if kind in ("bfloat16", "float16", "float64"):
        pixels = pixels.to(getattr(torch, kind))
        right = partial(like, name, "picture", tolerance=0.1)
    elif kind in ("nan", "inf"):
        pixels = pixels.clone()
        pixels.flatten()[draw(st.integers(0, pixels.numel() - 1))] = float(kind)
    else:
        pixels = {
            "uint8": lambda: (pixels * 50 + 128).byte(), "255": lambda: pixels * 60 + 128,
            "1-D": lambda: pixels.flatten(), "meta": lambda: pixels.to("meta"),
            "list": pixels.tolist,
        }[kind]()  # fmt: skip
    return f"pixels: {kind}", inputs | {"pixel_values": pixels}, right, {}


def grids_of_qwen(draw: Any, name: str, inputs: Inputs) -> tuple[Any, ...]:
    """A grid of as many patches as the picture's, which the picture itself contradicts."""
    kin = kin_of(name)
    which = draw(st.sampled_from(("picture", "wide_picture", "tall_picture")))
    inputs = encoded(name, which)
    if "image_grid_thw" not in inputs:
        key = "image_sizes" if "image_sizes" in inputs else "pixel_values"
        changed = inputs | {key: inputs[key].flip(-1)}
        if torch.equal(changed[key], inputs[key]):
            right: Any = partial(like, name, which, images=True)
        else:
            right = never
    else:
        steps, h, w = inputs["image_grid_thw"][0].tolist()
        sizes = [
            (r, h * w // r) for r in range(2, h * w, 2) if h * w % r == 0 and h * w // r % 2 == 0
        ]
        size = draw(st.sampled_from(sizes))
        changed = inputs | {"image_grid_thw": torch.tensor([[steps, *size]])}
        right = partial(like, name, which, images=True) if size == (h, w) else never
    return f"turned: {which}", changed, right, {"images": getattr(kin, which)}


def of_another_family(draw: Any, name: str, inputs: Inputs) -> tuple[Any, ...]:
    """What the processor of another family makes, whole or in part."""
    theirs = encoded(draw(st.sampled_from(NAMES)))
    keys = draw(st.lists(st.sampled_from(sorted(theirs)), min_size=1, unique=True))
    changed = inputs | {key: theirs[key] for key in keys}
    known = set(inputs) == set(changed) and same(changed, inputs)
    right = partial(like, name, "picture") if known else partial(consistent, name, changed)
    return f"another family's: {keys}", changed, right, {}


def consistent(name: str, changed: Inputs, got: Any) -> bool:
    """Whether the model, run by hand on these inputs, gives the probabilities of the result."""
    kin, fills = kin_of(name), {"attention_mask": 1, "token_type_ids": 0, "mm_token_type_ids": 0}
    if name == "PaliGemma":
        fills["token_type_ids"] = 1
    given = {key: changed[key] for key in encoded(name)}
    answer = kin.answer[None]
    given["input_ids"] = torch.cat([given["input_ids"], answer], 1)
    for key in fills.keys() & given.keys():
        more = torch.full_like(answer, fills[key]).to(given[key])
        given[key] = torch.cat([given[key], more], 1)
    with torch.no_grad():
        logits = kin.model(**given, use_cache=False).logits[0].float()
    predicted = logits[-len(kin.answer) - 1 : -1].softmax(-1)
    return torch.allclose(predicted.gather(1, answer.T)[:, 0], got.output_probs, atol=1e-4)


DAMAGE = (
    other_picture, other_canvas, broken_run, wrong_ids, attention_mask, side_inputs, pixel_values,
    grids_of_qwen, of_another_family,
)  # fmt: skip


def draw_case(data: st.DataObject) -> Case:
    name = data.draw(st.sampled_from(NAMES))
    damage = data.draw(st.sampled_from(DAMAGE))
    inputs = encoded(name)
    what, changed, right, options = damage(data.draw, name, inputs)
    kin = kin_of(name)
    names = {*inputs, *changed, "inputs", "images", "pixel_values", "processor"}

    method = data.draw(st.sampled_from(sorted(METHODS)))

    def run() -> Any:
        explain = METHODS[method](kin.model, kin.processor)
        return explain.attribute(changed, kin.answer, **options)

    return Case(f"{what} ({name}, {method})", run, right, sorted(names))
