"""The adapter contract: everything that differs between families of models, and nothing else."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from captum_mllm.adapters.canvases import PictureCanvases
from captum_mllm.adapters.devices import input_device
from captum_mllm.adapters.head import Matrix, head_matrix, head_size
from captum_mllm.adapters.interrupts import uninterrupted
from captum_mllm.functional import WHOLE, Box
from captum_mllm.geometry import ImageGrid


@dataclass(frozen=True, eq=False)
class View:
    """One regular grid of image tokens over an image's canvas or a part of it.

    Args:
        tokens: (rows, cols), or (steps, rows, cols) of a video: for each cell, the index of its
            token among the image's tokens (newline and class tokens are in no view).
        box: (left, upper, right, lower) of the grid in fractions of the canvas, default all of it.
    """

    tokens: Int64[Tensor, " ..."]
    box: Box = WHOLE


_SPECIAL_IDS = (
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "vision_start_token_id",
    "vision_end_token_id",
    "boi_token_index",
    "eoi_token_index",
)


class Adapter(PictureCanvases, ABC):
    """Everything that every method needs to know about one family of models.

    A subclass declares where the modules are and how image tokens lie on the grid; it contains no
    attribution method. All tensors it gets are those of *one* sample, on the model's device,
    without padding.

    Args:
        model: the user's model; it is never changed, and hooks are set only while it runs.
    """

    pixel_keys: ClassVar[tuple[str, ...]] = ("pixel_values",)
    """Names of the pixel inputs; a sample needs at least one of them."""

    required: ClassVar[Mapping[str, str]] = {}
    """Further required inputs, and what happens without each: transformers may silently compute
    wrong values where they are missing."""

    token_wise: ClassVar[tuple[str, ...]] = (
        "input_ids",
        "attention_mask",
        "token_type_ids",
        "mm_token_type_ids",
    )
    """Inputs with one entry per token, aligned with ``input_ids``."""

    suffix_fill: ClassVar[Mapping[str, int]] = {
        "attention_mask": 1,
        "token_type_ids": 0,
        "mm_token_type_ids": 0,
    }
    """Value of each token-wise input at the answer's tokens, which are appended."""

    bidirectional_prompt: ClassVar[bool] = False
    """Whether prompt tokens attend to later prompt tokens (a prefix LM). Then none of them was
    predicted, so none is a target or context, and maps need the whole prompt."""

    fixed_size: ClassVar[bool] = False
    """Whether the model takes images of one size only. Then larger scales are computed through
    windows of the enlarged image (:meth:`window_pixels`), and smaller ones are dropped."""

    from_pictures: ClassVar[bool] = False
    """Whether the adapter keeps the original pictures of its inputs and makes windows of them."""

    def __init__(self, model: nn.Module) -> None:
        self.model: Any = model
        self.config: Any = model.config
        self._matrix: Matrix | None = None

    @property
    def device(self) -> torch.device:
        """Device of the inputs, to which captured tensors are moved."""
        return input_device(self.model)

    # ---- modules ----------------------------------------------------------------------------

    @property
    def tower(self) -> nn.Module:
        """The vision encoder."""
        return self.model.get_encoder(modality="image")

    @property
    def decoder(self) -> nn.Module:
        """The language model without its head."""
        return self.model.get_decoder()

    @property
    def final_norm(self) -> nn.Module:
        """The norm before the LM head."""
        return self.decoder.norm  # type: ignore[return-value]

    @property
    def layers(self) -> Sequence[nn.Module]:
        """The language model's layers."""
        return self.decoder.layers  # type: ignore[return-value]

    @property
    def head(self) -> nn.Module:
        """The LM head."""
        return self.model.get_output_embeddings()

    @property
    def vocabulary(self) -> int:
        """Number of ids that the LM head scores."""
        return head_size(self.head)

    def class_weights(
        self, ids: Int64[Tensor, " classes"] | slice
    ) -> tuple[Float[Tensor, "classes dim"], Float[Tensor, " classes"] | None]:
        """Rows of the LM head, and its bias there, for the given ids.

        Args:
            ids: token ids; or a slice of the vocabulary, whose rows stay on the head's device.

        Returns:
            The rows of the head's matrix (classes, dim), and its bias (classes,), or None if it
            has no bias.

        Raises:
            ValueError: the head is not a plain matrix (see
                :func:`~captum_mllm.adapters.head.head_matrix`).
        """
        weight, bias = self._matrix or head_matrix(self.head)
        if isinstance(ids, slice):
            return weight[ids], None if bias is None else bias[ids]
        ids = ids.to(weight.device)
        return weight[ids].to(self.device), None if bias is None else bias[ids].to(self.device)

    @property
    def whole_prompt(self) -> bool:
        """Whether maps need the whole prompt, not only what stands up to the last picture."""
        return self.bidirectional_prompt

    def finish_logits(self, logits: Float[Tensor, "*rows vocabulary"]) -> Tensor:
        """What the model makes of the LM head's output; by default its logits as they are.

        Args:
            logits: ``W h + b`` by :meth:`class_weights`.

        Returns:
            The model's logits, soft-capped where it caps them.
        """
        return logits

    # ---- tokens -----------------------------------------------------------------------------

    @property
    def visual_ids(self) -> tuple[int, ...]:
        """Ids of image and video placeholders: never generated, never a target."""
        names = ("image_token_id", "video_token_id")
        ids = (getattr(self.config, name, None) for name in names)
        return tuple(dict.fromkeys(int(i) for i in ids if i is not None))

    @property
    def special_ids(self) -> frozenset[int]:
        """Ids that are not text, as far as the model's configs tell (bos, eos, pad, visual)."""
        found: set[int] = set(self.visual_ids)
        configs = (self.config, self.config.get_text_config(), self.model.generation_config)
        for config in configs:
            for name in _SPECIAL_IDS:
                value = getattr(config, name, None)
                found.update([value] if isinstance(value, int) else value or [])
        return frozenset(found)

    def placeholder(self, grid: ImageGrid) -> int:
        """Id of the placeholders of an image or a video.

        Args:
            grid: the grid of the image or video.

        Returns:
            The token id; by default the first of :attr:`visual_ids`.
        """
        del grid
        return self.visual_ids[0]

    def runs(self, grid: ImageGrid) -> tuple[int, ...]:
        """Lengths of the unbroken runs of an image's placeholders; by default one run.

        There is more than one run where other tokens stand between the placeholders (names of
        tiles, times).

        Args:
            grid: the image's grid.

        Returns:
            Numbers of tokens, in the order of the prompt; their sum is that of the image.
        """
        return (grid.cells,)

    def views(self, grid: ImageGrid) -> tuple[View, ...]:
        """The views that an image's tokens form; by default one, row by row.

        Args:
            grid: the image's grid.

        Returns:
            The views; the image's map is their mean, cell by cell
            (:func:`captum_mllm.functional.merge_views`).
        """
        return (View(torch.arange(grid.cells).reshape(grid.shape)),)

    def block(self, ids: Int64[Tensor, " tokens"], where: Tensor) -> range:
        """Positions that belong to an image; by default its first to its last placeholder.

        In addition to the placeholders, this includes what the processor put around them (markers,
        names of tiles, times).

        Args:
            ids: the prompt.
            where: positions of the image's placeholders.

        Returns:
            Contiguous positions in the prompt.
        """
        del ids
        return range(int(where[0]), int(where[-1]) + 1)

    # ---- inputs -----------------------------------------------------------------------------

    def check_inputs(self, inputs: Mapping[str, Tensor]) -> None:
        """Raise if a side input is missing or would make the model compute wrong values.

        Args:
            inputs: the model's inputs of one sample.

        Raises:
            ValueError: a required input is missing or contradicts ``input_ids``.
        """
        for name, without in self.required.items():
            if name not in inputs:
                raise ValueError(
                    f"inputs lack {name!r}: without it {without}. Pass everything that the "
                    f"processor returns."
                )

    @abstractmethod
    def grids(self, inputs: Mapping[str, Tensor]) -> tuple[ImageGrid, ...]:
        """Grid and canvas of each image, then of each video.

        Args:
            inputs: the model's inputs of one sample.

        Returns:
            One per image, then one per video, in the order of the prompt.

        Raises:
            ValueError: the pixels have a shape or size that the family can't take.
        """

    @abstractmethod
    def scaled_grid(self, grid: ImageGrid, scale: float) -> ImageGrid:
        """The nearest grid that the model accepts for an image rescaled by ``scale``.

        Args:
            grid: the image's grid at scale 1.
            scale: factor of height and width, > 0.

        Returns:
            The grid; its canvas is the size in pixels that the image has to be resized to.

        Raises:
            ValueError: the image would be smaller than one patch.
        """

    def window_pixels(
        self, inputs: Mapping[str, Tensor], grids: Sequence[ImageGrid], boxes: Sequence[Box]
    ) -> dict[str, Tensor]:
        """Pixel inputs of the native size that show only a box of each image, enlarged.

        Args:
            inputs: the model's inputs of one sample.
            grids: the images' grids at scale 1.
            boxes: per image, (left, upper, right, lower) in fractions of what the image shows.

        Returns:
            Replacements of the pixel inputs; keys and shapes as in ``inputs``.

        Raises:
            NotImplementedError: the family takes images of other sizes and needs no windows.
        """
        raise NotImplementedError(f"{type(self).__name__} takes images of other sizes.")

    def window_canvas(self, grid: ImageGrid, box: Box) -> Box:
        """Where the canvas of a window lies on the image's canvas; by default the box itself.

        Args:
            grid: the image's grid at scale 1.
            box: the window, in fractions of what the image shows.

        Returns:
            The box of the window's canvas, in fractions of the image's canvas.
        """
        del grid
        return box

    def rescale_pixels(
        self, inputs: Mapping[str, Tensor], grids: Sequence[ImageGrid]
    ) -> dict[str, Tensor]:
        """Resize the inputs that hold or describe pixels to those grids; keys as in ``inputs``.

        Args:
            inputs: the model's inputs of one sample.
            grids: the target grids, as :meth:`scaled_grid` returns them.

        Returns:
            Replacements of those inputs; the rest of ``inputs`` is left unchanged.

        Raises:
            NotImplementedError: the family takes images of one size only.
        """
        raise NotImplementedError(f"{type(self).__name__} takes images of one size only.")

    @abstractmethod
    def pixels_from_pictures(
        self, pictures: Sequence[Any], settings: Any, grids: Sequence[ImageGrid]
    ) -> dict[str, Tensor]:
        """Compute ``pixel_values`` on those grids again from the original pictures.

        Args:
            pictures: PIL pictures.
            settings: the user's image processor.
            grids: the target grids, one per picture.

        Returns:
            Replacements of the pixel inputs, normalised as the processor does it.
        """

    # ---- output of the tower ----------------------------------------------------------------

    def tower_calls(self, grids: Sequence[ImageGrid]) -> list[Sequence[ImageGrid]]:
        """The images of each of the tower's calls in one forward; by default one call for all.

        Args:
            grids: the grids of all images of the sample.

        Returns:
            The grids of each call, in the order of the calls.
        """
        return [grids]

    def features(self, tower_output: Any) -> Tensor:
        """The features in the tower's output.

        Args:
            tower_output: what the vision encoder returned.

        Returns:
            The features before the projector, (images or tiles, tokens, dim) or (tokens, dim).
        """
        return tower_output.last_hidden_state

    @abstractmethod
    def features_shape(self, grids: Sequence[ImageGrid]) -> tuple[int, ...]:
        """Shape that :meth:`features` must have for those images, without its last axis.

        Args:
            grids: the grids of the images of one call.

        Returns:
            (images or tiles, tokens) or (tokens,).
        """

    def check_features(self, tower_output: Any, grids: Sequence[ImageGrid]) -> None:
        """Compare the tower's features with the grids.

        Args:
            tower_output: what the vision encoder returned.
            grids: the grids of the images of that call.

        Raises:
            ValueError: the number of images or features is not that of the grids.
        """
        shape = tuple(self.features(tower_output).shape[:-1])
        expected = self.features_shape(grids)
        if shape != expected:
            raise ValueError(
                f"model: the vision tower gave features of shape {shape}, but the pixels make "
                f"{expected} (images or tiles, tokens)."
            )

    # ---- running ----------------------------------------------------------------------------

    def size_hooks(self) -> AbstractContextManager[None]:
        """Hooks that let the tower take sizes other than its native one; by default none."""
        return nullcontext()

    @uninterrupted
    def head_kept(self) -> Iterator[None]:
        """Cache the LM head's matrix, which may have to be loaded or computed, for the context."""
        before = self._matrix
        self._matrix = before or head_matrix(self.head)
        try:
            yield
        finally:
            self._matrix = before
