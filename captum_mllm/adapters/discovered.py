"""Models of any class: what was found by running them, in the place of an adapter by hand."""

from collections.abc import Mapping, Sequence
from inspect import signature
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from typing_extensions import override

from captum_mllm.adapters.base import Adapter, View
from captum_mllm.adapters.discovery import ModelFacts, ShownSample, discovery_of, picture_grid
from captum_mllm.adapters.layout import LayoutError, PictureLayout
from captum_mllm.adapters.painting import levels, repainted
from captum_mllm.adapters.pixels import enlarged, reframed, resized
from captum_mllm.functional import WHOLE, Box
from captum_mllm.geometry import ImageGrid


class DiscoveredAdapter(Adapter):
    """Adapter of a class without one: its layout is found by probing at its first pictures.

    It needs the original pictures (``images=``) and the processor at the first call for some
    inputs; afterwards the same inputs are known, also to other methods. At other scales a model of
    native resolution sees the picture resized, which is probed too; any other sees larger scales
    through windows of the picture, and smaller ones are dropped.

    Args:
        model: the user's model.
    """

    from_pictures = True

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.discovery = discovery_of(model)

    # ---- what is found ----------------------------------------------------------------------

    @property
    def facts(self) -> ModelFacts:
        """What one traced run told about the model."""
        if self.discovery.facts is None:
            raise self.unknown()
        return self.discovery.facts

    def shown(self, inputs: Mapping[str, Tensor]) -> ShownSample:
        """The pictures behind some inputs.

        Args:
            inputs: the model's inputs.

        Returns:
            The pictures, how they were processed, and their layout.

        Raises:
            LayoutError: these inputs were not seen with their pictures yet.
        """
        sample = self.discovery.find(inputs)
        if sample is None:
            raise self.unknown()
        return sample

    def unknown(self) -> LayoutError:
        """The error for inputs that were not seen with their pictures.

        Returns:
            It says what to call.
        """
        return LayoutError(
            f"model: no adapter is registered for {type(self.model).__name__}, so the layout of "
            f"its image tokens is found by probing, and these pixels were not seen yet. Give an "
            f"attributor the processor, and the original picture(s) to its first call: "
            f"MSEA(model, processor).attribute(inputs, images=picture). (Or subclass "
            f"captum_mllm.adapters.Adapter and decorate it with "
            f"@register_adapter({type(self.model).__name__!r}).)"
        )

    # ---- modules ----------------------------------------------------------------------------

    @property
    @override
    def device(self) -> torch.device:
        try:
            return super().device
        except (NotImplementedError, AttributeError) as error:
            raise _unnamed(self.model, "input embeddings (get_input_embeddings)") from error

    @property
    @override
    def decoder(self) -> nn.Module:
        decoder = _named(self.model, "get_decoder")
        if decoder is not None:
            return decoder
        table, readers = _named(self.model, "get_input_embeddings"), []
        for module in self.model.modules():
            takes = signature(module.forward).parameters
            if module is not self.model and "inputs_embeds" in takes:
                readers += [module] if any(part is table for part in module.modules()) else []
        if not readers:
            raise _unnamed(self.model, "language model that takes embeddings (get_decoder)")
        return readers[-1]  # the innermost

    @property
    @override
    def head(self) -> nn.Module:
        for module in self.model.modules():  # the model itself comes first
            if isinstance(head := _named(module, "get_output_embeddings"), nn.Module):
                return head
        raise _unnamed(self.model, "LM head (get_output_embeddings)")

    @property
    @override
    def tower(self) -> nn.Module:
        facts = self.discovery.facts
        return self.model if facts is None or facts.tower is None else facts.tower

    @property
    @override
    def final_norm(self) -> nn.Module:
        return self.facts.final_norm

    @property
    @override
    def layers(self) -> Sequence[nn.Module]:
        lists = [part for part in self.decoder.modules() if isinstance(part, nn.ModuleList)]
        if not lists:
            raise LayoutError("model: its language model has no list of layers.")
        return max(lists, key=lambda part: sum(p.numel() for p in part.parameters()))  # type: ignore

    @property
    def required(self) -> Mapping[str, str]:  # type: ignore[override]
        """Side inputs without which the model silently computes other values."""
        return {} if self.discovery.facts is None else self.facts.required

    @property
    def suffix_fill(self) -> Mapping[str, int]:  # type: ignore[override]
        """Value of each token-wise input at the answer's tokens."""
        facts = self.discovery.facts
        return {**Adapter.suffix_fill, "token_type_ids": 0 if facts is None else facts.answer_type}

    @property
    def bidirectional_prompt(self) -> bool:  # type: ignore[override]
        """Whether text of the prompt attends to later text of the prompt."""
        return self.facts.bidirectional

    @property
    @override
    def whole_prompt(self) -> bool:
        return self.facts.bidirectional or self.facts.whole_prompt

    @property
    def pixel_keys(self) -> tuple[str, ...]:  # type: ignore[override]
        """Names of the inputs that show pictures, as far as they are known."""
        keys = [
            key for sample in list(self.discovery.samples.values()) for key in sample.painted.keys
        ]
        return tuple(dict.fromkeys(keys)) or ("pixel_values",)

    @override
    def class_weights(
        self, ids: Int64[Tensor, " classes"] | slice
    ) -> tuple[Float[Tensor, "classes dim"], Float[Tensor, " classes"] | None]:
        weight, bias = super().class_weights(ids)
        scale = self.facts.scale
        if scale == 1.0:
            return weight, bias
        return weight * scale, None if bias is None else bias * scale

    @override
    def finish_logits(self, logits: Tensor) -> Tensor:
        cap = self.facts.cap
        return logits if cap is None else cap * torch.tanh(logits / cap)

    # ---- tokens -----------------------------------------------------------------------------

    @property
    @override
    def visual_ids(self) -> tuple[int, ...]:
        found = [i for s in list(self.discovery.samples.values()) for i in s.layout.placeholders]
        return tuple(dict.fromkeys((*found, *super().visual_ids)))

    @override
    def grids(self, inputs: Mapping[str, Tensor]) -> tuple[ImageGrid, ...]:
        return tuple(map(picture_grid, self.shown(inputs).layout.pictures))

    @override
    def runs(self, grid: ImageGrid) -> tuple[int, ...]:
        return self._picture(grid).runs

    @override
    def views(self, grid: ImageGrid) -> tuple[View, ...]:
        views = self._picture(grid).views
        left, upper, right, lower = views[0].box
        size = np.array([right - left, lower - upper] * 2)
        placed = [(np.array(view.box) - [left, upper, left, upper]) / size for view in views]
        return tuple(
            View(torch.tensor(view.tokens), tuple(float(edge) for edge in box))  # type: ignore
            for view, box in zip(views, placed, strict=True)
        )

    def _picture(self, grid: ImageGrid) -> PictureLayout:
        try:
            return self.discovery.pictures[grid]
        except KeyError:
            raise self.unknown() from None

    # ---- inputs -----------------------------------------------------------------------------

    @property
    def fixed_size(self) -> bool:  # type: ignore[override]
        """Whether a larger picture has no more tokens, so that windows show larger scales."""
        return not self.discovery.native

    @override
    def scaled_grid(self, grid: ImageGrid, scale: float) -> ImageGrid:
        if not self.discovery.native:
            return enlarged(grid, scale)
        if (grid, scale) not in self.discovery.scaled:
            raise ValueError(
                f"inputs at {scale:.4g} times the size of their picture were not probed: for "
                f"several scales of a model without an adapter use MSEA(model, processor)."
            )
        return self.discovery.scaled[grid, scale]

    @override
    def rescale_pixels(
        self, inputs: Mapping[str, Tensor], grids: Sequence[ImageGrid]
    ) -> dict[str, Tensor]:
        sample = self.shown(inputs)
        sizes = [grid.picture for grid in grids]
        pictures = [
            picture if size in (None, (picture.height, picture.width)) else resized(picture, size)
            for picture, size in zip(sample.pictures, sizes, strict=True)
        ]
        made = sample.source(pictures)
        return {key: value.to(inputs[key].device, inputs[key].dtype) for key, value in made.items()}

    @override
    def pixels_from_pictures(
        self, pictures: Sequence[Any], settings: Any, grids: Sequence[ImageGrid]
    ) -> dict[str, Tensor]:
        raise NotImplementedError("Pictures are kept with their inputs; see window_pixels.")

    @override
    def window_pixels(
        self, inputs: Mapping[str, Tensor], grids: Sequence[ImageGrid], boxes: Sequence[Box]
    ) -> dict[str, Tensor]:
        sample = self.shown(inputs)
        windows = []
        for picture, grid, window in zip(sample.pictures, grids, boxes, strict=True):
            left, upper, right, lower = grid.box or (0.0, 0.0, *map(float, picture.size))
            wide, high = window[2] - window[0], window[3] - window[1]  # shares of the canvas
            # The whole picture is moved, so that its canvas shows the window.
            x = left + window[0] * (right - left) - left * wide
            y = upper + window[1] * (lower - upper) - upper * high
            width, height = picture.size
            windows.append(reframed(picture, (x, y, x + width * wide, y + height * high)))
        return self._pixels(sample, windows, inputs)

    @override
    def can_flip(self, grids: Sequence[ImageGrid], axes: Sequence[int]) -> bool:
        for grid in grids:
            (height, width), (left, upper, right, lower) = grid.picture or (0, 0), grid.box or WHOLE
            off_x = abs(left - (width - right)) / (right - left) * grid.cols
            off_y = abs(upper - (height - lower)) / (lower - upper) * grid.rows
            if max(off_x if -1 in axes else 0, off_y if -2 in axes else 0) > 0.5:
                return False
        return True

    @override
    def flipped(
        self, inputs: Mapping[str, Tensor], grids: Sequence[ImageGrid], axes: Sequence[int]
    ) -> dict[str, Tensor]:
        from PIL import Image

        sample = self.shown(inputs)
        turns = [
            turn
            for axis, turn in (
                (-1, Image.Transpose.FLIP_LEFT_RIGHT),
                (-2, Image.Transpose.FLIP_TOP_BOTTOM),
            )
            if axis in axes
        ]
        pictures = list(sample.pictures)
        for turn in turns:
            pictures = [picture.transpose(turn) for picture in pictures]
        return self._pixels(sample, pictures, inputs)

    def _pixels(
        self, sample: ShownSample, pictures: Sequence[Any], inputs: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """The pixel inputs of other pictures of the same sizes, which are remembered too."""
        made = {
            key: value.to(inputs[key].device, inputs[key].dtype)
            for key, value in sample.source(pictures).items()
        }
        for key in sample.painted.keys:
            if made[key].shape != inputs[key].shape:
                raise LayoutError(f"{key} changes its shape with what the picture shows.")
        shown = ShownSample(tuple(pictures), sample.source, sample.layout, sample.painted)
        self.discovery.remember({**inputs, **made}, shown, derived=True)
        return made

    # ---- canvases ---------------------------------------------------------------------------

    @override
    def canvases(
        self, inputs: Mapping[str, Tensor], grids: Sequence[ImageGrid]
    ) -> tuple[Tensor, ...]:
        sample = self.shown(inputs)
        black, span = levels(sample.painted)
        found = []
        for picture, grid in zip(sample.pictures, grids, strict=True):
            resized = picture.resize(self._canvas_size(picture, grid))
            pixels = torch.from_numpy(np.array(resized)).permute(2, 0, 1) / 255
            found.append((black + span * pixels)[None].to(inputs["input_ids"].device))
        return tuple(found)

    @override
    def with_canvases(
        self, inputs: Mapping[str, Tensor], grids: Sequence[ImageGrid], canvases: Sequence[Tensor]
    ) -> dict[str, Tensor]:
        sample = self.shown(inputs)
        changes = [
            canvas.float() - own.to(canvas.device)
            for canvas, own in zip(canvases, self.canvases(inputs, grids), strict=True)
        ]
        return repainted(sample.painted, inputs, [p.size for p in sample.pictures], changes)

    def _canvas_size(self, picture: Any, grid: ImageGrid) -> tuple[int, int]:
        """(width, height) of the whole picture at the resolution that the encoder sees."""
        left, upper, right, lower = grid.box or (0.0, 0.0, *map(float, picture.size))
        width, height = picture.size
        return (
            max(1, round(width * grid.width / (right - left))),
            max(1, round(height * grid.height / (lower - upper))),
        )

    # ---- output of the tower ----------------------------------------------------------------

    @override
    def tower_calls(self, grids: Sequence[ImageGrid]) -> list[Sequence[ImageGrid]]:
        return [grids] * self.facts.tower_calls

    @override
    def features_shape(self, grids: Sequence[ImageGrid]) -> tuple[int, ...]:
        return ()

    @override
    def check_features(self, tower_output: Any, grids: Sequence[ImageGrid]) -> None:
        """Nothing to compare: probing has followed the features to their tokens."""


def _named(module: Any, method: str) -> nn.Module | None:
    """What a module says is its part, or None where it does not say."""
    try:
        part = getattr(module, method)()
    except (AttributeError, NotImplementedError, TypeError):
        return None
    return part if isinstance(part, nn.Module) else None


def _unnamed(model: nn.Module, part: str) -> LayoutError:
    return LayoutError(
        f"model: {type(model).__name__} does not tell its {part}, so its image tokens can't be "
        f"followed."
    )
