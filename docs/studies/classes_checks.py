"""What is tried on one class of models: each check gives figures, or raises what a user would see.

A check's result is plain data for JSON. Figures that must vanish are largest absolute differences.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from captum_mllm import ARC, MSEA, DirectLogitAttribution, LogitLens, TokenLogProb
from captum_mllm.adapters import find_adapter, registered_classes
from captum_mllm.adapters.layout import TokenLayout
from captum_mllm.functional import merge_views
from captum_mllm.model.discovery import probe_layout
from studies.zoo import Subject
from studies.zoo.oracle import painted_cells

PICTURES = {"square": (60, 60), "wide": (90, 50), "tall": (50, 90)}  # (width, height)
ANSWER = 4  # tokens
PAINTED = 24  # cells of each view
BARRED = [2, *range(90, 120)]  # ids of the end of an answer, of images, videos and their markers


def random_picture(size: tuple[int, int], seed: int = 0) -> Image.Image:
    """Noise in blocks of 4 x 4 pixels on a gradient; size is (width, height)."""
    width, height = size
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 160, (-(-height // 4), -(-width // 4), 3))
    noise = blocks.repeat(4, 0).repeat(4, 1)[:height, :width]
    slope = np.linspace(0, 95, width)[None, :, None] * np.linspace(0, 1, height)[:, None, None]
    return Image.fromarray((noise + slope).astype(np.uint8))


@dataclass
class Case:
    """A subject with one picture.

    Attributes:
        subject: from the zoo.
        picture: its only picture.
    """

    subject: Subject
    picture: Image.Image
    _answer: tuple[Tensor, Tensor] | None = field(default=None, repr=False)

    @property
    def inputs(self) -> dict[str, Any]:
        """New inputs of the prompt."""
        return self.subject.encode(self.picture)

    @property
    def given(self) -> dict[str, Any]:
        """Model and processor, as attributors take them."""
        return {"processor": self.subject.processor}

    @torch.no_grad()
    def answer(self) -> tuple[Tensor, Tensor]:
        """(ids, logits) of the model's own greedy answer, the logits as ``generate`` saw them."""
        if self._answer is None:
            ids = self.inputs["input_ids"].shape[1]
            out = self.subject.model.generate(
                **self.inputs,
                max_new_tokens=ANSWER,
                do_sample=False,
                suppress_tokens=BARRED,
                return_dict_in_generate=True,
                output_logits=True,
            )
            self._answer = out.sequences[0, ids:], torch.stack(out.logits)[:, 0].float()
        return self._answer


# ---- the layout ---------------------------------------------------------------------------------


def layout(case: Case) -> dict[str, Any]:
    """Probe the layout; compare it with painting, and with the adapter where there is one."""
    one = case.subject
    found = probe_layout(one.model, case.inputs, one.processor, case.picture)
    painted = [
        painted_cells(one, case.picture, view.tokens, view.box, most=PAINTED)
        for view in found.views
    ]
    record: dict[str, Any] = {
        "found": str(found).split(" (")[0],
        "notes": list(found.notes),
        "views": [
            {"shape": view.shape, "box": [round(edge, 2) for edge in view.box]}
            for view in found.views
        ],
        "painted": painted,
        "cost": [found.forwards, found.backwards, found.processor_calls],
    }
    if type(one.model).__name__ in registered_classes():
        record["adapter"] = _as_adapter(case, found)
    return record


def _as_adapter(case: Case, found: TokenLayout) -> bool:
    """Whether the hand-written adapter has the same tokens in the same cells."""
    adapter = find_adapter(case.subject.model)
    (grid,) = adapter.grids(case.inputs)
    by_hand = {_rows(view.tokens) for view in adapter.views(grid)}
    return {view.tokens for view in found.views} == by_hand


def _rows(tokens: Tensor) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(row) for row in tokens.tolist())


# ---- attributors --------------------------------------------------------------------------------


def lens(case: Case) -> dict[str, Any]:
    """Logit lens of the model's answer against the model's own logits at the image tokens."""
    one, (ids, _) = case.subject, case.answer()
    attr = LogitLens(one.model, **case.given).attribute(
        case.inputs, target=ids, images=case.picture
    )
    inputs = case.inputs
    with torch.no_grad():
        logits = one.model(**inputs).logits[0].float()
    shown = logits[inputs["input_ids"][0] == one.image_token_id][:, ids].relu().T
    adapter = find_adapter(one.model)
    (grid,) = adapter.grids(inputs)
    views = adapter.views(grid)
    maps = [shown[:, view.tokens.clamp_min(0)] * (view.tokens >= 0) for view in views]
    expected = merge_views(maps, [view.box for view in views], grid.shape)
    return {
        "shape": list(attr.grid_attr[0].shape[1:]),
        "lens": _difference(attr.grid_attr[0], expected),
    }


def generation(case: Case) -> dict[str, Any]:
    """Teacher-forced probabilities against those of ``generate``."""
    one, (ids, logits) = case.subject, case.answer()
    attr = LogitLens(one.model, **case.given).attribute(
        case.inputs, target=ids, images=case.picture
    )
    theirs = logits.softmax(-1)[range(len(ids)), ids]
    return {"answer": ids.tolist(), "generate": _difference(attr.output_probs, theirs)}


def msea(case: Case) -> dict[str, Any]:
    """MSEA with its default scales."""
    attr = MSEA(case.subject.model, **case.given).attribute(
        case.inputs, target=case.answer()[0], images=case.picture
    )
    return _maps(attr) | {"scales": [round(scale, 3) for scale in attr.scales]}


def direct(case: Case) -> dict[str, Any]:
    """Direct logit attribution: its parts sum to the logits less their mean."""
    one, (ids, logits) = case.subject, case.answer()
    method = DirectLogitAttribution(one.model, **case.given)
    attr = method.attribute(case.inputs, target=ids, images=case.picture)
    parts = method.contributions(case.inputs, target=ids, images=case.picture)
    total = (parts.signed.sum(1) + parts.rest).float()
    theirs = (logits - logits.mean(-1, keepdim=True))[range(len(ids)), ids]
    return _maps(attr) | {
        "logits": _difference(total, theirs),
        "empty": not bool(attr.grid_attr[0].any()),
    }


def arc(case: Case) -> dict[str, Any]:
    """ARC over MSEA."""
    method = ARC(MSEA(case.subject.model, **case.given))
    return _maps(method.attribute(case.inputs, target=case.answer()[0], images=case.picture))


def token_log_prob(case: Case) -> dict[str, Any]:
    """The function for captum's methods: its values, and a gradient in the pixels."""
    one, (ids, logits) = case.subject, case.answer()
    method = TokenLogProb(one.model, case.inputs, ids, one.processor)
    given = method.pixels
    pixels = tuple(p.requires_grad_() for p in (given if isinstance(given, tuple) else (given,)))
    values = method(*pixels)
    gradients = torch.autograd.grad(values.sum(), pixels)
    theirs = logits.log_softmax(-1)[range(len(ids)), ids]
    return {
        "pixels": [list(p.shape) for p in pixels],
        "log_prob": _difference(values[0].detach(), theirs),
        "gradient": all(bool(g.any()) and bool(g.isfinite().all()) for g in gradients),
    }


def _maps(attr: Any) -> dict[str, Any]:
    (maps,) = attr.grid_attr
    if not bool(torch.isfinite(maps).all()):
        raise ValueError("maps are not finite.")
    return {"shape": list(maps.shape[1:])}


def _difference(ours: Tensor, theirs: Tensor) -> float:
    if ours.shape != theirs.shape:
        raise ValueError(f"shapes {tuple(ours.shape)} and {tuple(theirs.shape)} differ.")
    return float((ours - theirs).abs().max())


CHECKS: Mapping[str, Callable[[Case], dict[str, Any]]] = {
    "layout": layout,
    "lens": lens,
    "generation": generation,
    "msea": msea,
    "direct": direct,
    "arc": arc,
    "token_log_prob": token_log_prob,
}
