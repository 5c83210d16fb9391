"""What ``attribute`` returns: maps and token attributions of one answer, frozen."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from captum_mllm.adapters.processors import read_preprocessing
from captum_mllm.files import read_tensors, write_tensors
from captum_mllm.functional import upsample
from captum_mllm.geometry import (
    ImageGeometry,
    ImageGrid,
    Preprocessing,
    maps_to_picture,
    picture_geometry,
)
from captum_mllm.validation import picture_size

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from PIL.Image import Image

FORMAT = 1
LOGITS, UNIT = "logits", "[0, 1]"


@dataclass(frozen=True, eq=False)
class MLLMAttributionResult:
    """Where the model looked for every explained token, and which words led to it.

    Field names follow ``captum.attr.LLMAttributionResult`` where the meaning is the same. All
    tensors are on the CPU in float32.

    Args:
        grid_attr: one tensor per image, (targets, rows, cols): the maps on the model's own grid
            of image tokens (the finest scale's with several scales; tiles put together). Per
            video (targets, frames, rows, cols): each step of the model's grid in time stands for
            all of its frames. Images come first, then videos.
        token_attr: (targets, text tokens): attribution of each text token; columns at or after
            the target are 0.
        input_tokens: labels of the columns: prompt text, then the answer.
        output_tokens: labels of the rows.
        output_ids: (targets,): token ids of the rows.
        output_probs: (targets,): probability of each target given all before it, softmax of the
            unprocessed teacher-forced logits.
        seq_attr: (text tokens,): ``token_attr`` summed over the targets.
        relevance: (targets, text tokens): rank-biased overlap of target and context token in
            [0, 1], 0 at or after the target; None where the method has none.
        scales: achieved scales of the input (square root of the ratio of grid areas).
        consistency: how far each scale still predicts the same answer, in [0, 1]; or None.
        units: "logits" (raw, >= 0) or "[0, 1]" (image and text jointly normalised per target).
        grids: per image, grid and frame of the base scale.
        preprocessing: what the processor did to a picture's frame; None without a processor.
        method: name of the attributor.
    """

    grid_attr: tuple[Float[Tensor, "targets ..."], ...]
    token_attr: Float[Tensor, "targets tokens"]
    input_tokens: tuple[str, ...]
    output_tokens: tuple[str, ...]
    output_ids: Int64[Tensor, " targets"]
    output_probs: Float[Tensor, " targets"]
    units: str
    grids: tuple[ImageGrid, ...]
    relevance: Float[Tensor, "targets tokens"] | None = None
    scales: tuple[float, ...] = (1.0,)
    consistency: tuple[float, ...] | None = None
    preprocessing: Preprocessing | None = None
    method: str = ""
    seq_attr: Float[Tensor, " tokens"] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "seq_attr", self.token_attr.sum(0))

    # ---- maps -------------------------------------------------------------------------------

    @property
    def image_attr(self) -> tuple[Float[Tensor, "targets ..."], ...]:
        """Per image (targets, height, width): maps in pixels of the image as the model saw it.

        Per video (targets, frames, height, width).

        Computed on access (bilinear from the grid): 64 targets of a 336 px image take 29 MB. For
        one target use :meth:`image_map`.
        """
        return tuple(
            upsample(maps, (grid.height, grid.width))
            for maps, grid in zip(self.grid_attr, self.grids, strict=True)
        )

    def image_map(self, target: int, image: int = 0) -> Float[Tensor, "*frames height width"]:
        """The map of one target in pixels of the image as the model saw it.

        Args:
            target: row, as in ``output_tokens``; negative counts from the end.
            image: which image, default the first.

        Returns:
            (height, width); of a video (frames, height, width).

        Raises:
            IndexError: no such target or image.
        """
        grid, maps = self._image(image)
        row = self._target(target)
        return upsample(maps[row : row + 1], (grid.height, grid.width))[0]

    def to_image(
        self,
        i: int,
        size: "tuple[int, int] | Image",
        *,
        geometry: ImageGeometry | None = None,
        processor: Any = None,
    ) -> Float[Tensor, "targets *frames height width"]:
        """Maps of image ``i`` in pixels of the *original* picture: crop and resize undone.

        Args:
            i: which image.
            size: (height, width) of the original picture, or the PIL picture itself.
            geometry: the box of the picture that the model saw; needed where the attributor was
                made without a processor, or where the processor's call overrode its settings.
            processor: a processor whose settings tell the geometry.

        Returns:
            (targets, height, width), of a video (targets, frames, height, width); 0 where the
            model saw nothing of the picture.

        Raises:
            ValueError: neither a processor nor ``geometry=`` is known, or the processor's
                settings don't give the frame that the model saw.
            IndexError: no such image.
        """
        size = picture_size(size)
        geometry = self.geometry(i, size, geometry=geometry, processor=processor)
        return maps_to_picture(self._image(i)[1], geometry, size)

    def geometry(
        self,
        i: int,
        size: tuple[int, int],
        *,
        geometry: ImageGeometry | None = None,
        processor: Any = None,
    ) -> ImageGeometry:
        """The box of the original picture that the model's frame shows; see :meth:`to_image`.

        Args:
            i: which image.
            size: (height, width) of the original picture.
            geometry: returned as it is, if given.
            processor: a processor whose settings tell the geometry.

        Returns:
            The box, in pixels of the original picture.

        Raises:
            ValueError: it is not known, or ``size`` does not give the frame that the model saw.
            IndexError: no such image.
        """
        grid = self._image(i)[0]
        if geometry is not None:
            if not isinstance(geometry, ImageGeometry):
                raise TypeError(
                    f"geometry must be an ImageGeometry(box), got {type(geometry).__name__}."
                )
            return geometry
        rule = self.preprocessing
        if processor is not None and grid.box is None:
            rule = read_preprocessing(processor)
        return picture_geometry(grid, size, rule)

    def time_profile(self, i: int = 0) -> Float[Tensor, "targets frames"]:
        """When each token looked: the mean of its map over the cells of each frame of a video.

        Args:
            i: which image or video, default the first.

        Returns:
            (targets, frames), in the maps' units.

        Raises:
            ValueError: it is no video.
            IndexError: no such image.
        """
        grid, maps = self._image(i)
        if not grid.steps:
            raise ValueError(f"image {i} is a still image; only a video has a time profile.")
        return maps.mean((-2, -1))

    def _image(self, image: int) -> tuple[ImageGrid, Tensor]:
        if not -len(self.grids) <= image < len(self.grids):
            raise IndexError(f"image {image} is out of range: there are {len(self.grids)} images.")
        return self.grids[image], self.grid_attr[image]

    def _target(self, target: int) -> int:
        n = len(self.output_tokens)
        if not -n <= target < n:
            raise IndexError(f"target {target} is out of range: {n} tokens are explained.")
        return target % n

    # ---- files ------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write everything to one safetensors file; text and settings as JSON in its header.

        The file appears whole or not at all.

        Args:
            path: file to write, usually ``*.safetensors``; its folder must exist.
        """
        tensors = {f"grid_attr.{n}": maps for n, maps in enumerate(self.grid_attr)}
        names = ("token_attr", "output_ids", "output_probs", "relevance")
        tensors |= {n: getattr(self, n) for n in names if getattr(self, n) is not None}
        header = {
            "format": FORMAT,
            "input_tokens": self.input_tokens,
            "output_tokens": self.output_tokens,
            "scales": self.scales,
            "consistency": self.consistency,
            "units": self.units,
            "method": self.method,
            "grids": [grid.to_dict() for grid in self.grids],
            "preprocessing": self.preprocessing and self.preprocessing.to_dict(),
        }
        write_tensors(path, header, tensors)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "MLLMAttributionResult":
        """Read what :meth:`save` wrote.

        Args:
            path: the file.

        Returns:
            The result, equal to the saved one bit for bit.

        Raises:
            FileNotFoundError: no such file.
            ValueError: not a file of ours, or of a newer format.
        """
        header, tensors = read_tensors(path)
        if not isinstance(header, dict) or header.get("format") != FORMAT:
            found = header.get("format") if isinstance(header, dict) else header
            raise ValueError(
                f"path {os.fspath(path)!r} has format {found}, this version reads format "
                f"{FORMAT}: use the captum_mllm version that wrote it, or a newer one."
            )
        try:
            return cls._from_parts(header, tensors)
        except (KeyError, TypeError) as error:
            raise ValueError(f"path {os.fspath(path)!r} is damaged: it lacks {error}.") from error

    @classmethod
    def _from_parts(
        cls, header: dict[str, Any], tensors: dict[str, Tensor]
    ) -> "MLLMAttributionResult":
        rule, consistency = header["preprocessing"], header["consistency"]
        return cls(
            grid_attr=tuple(tensors[f"grid_attr.{n}"] for n in range(len(header["grids"]))),
            token_attr=tensors["token_attr"],
            input_tokens=tuple(header["input_tokens"]),
            output_tokens=tuple(header["output_tokens"]),
            output_ids=tensors["output_ids"],
            output_probs=tensors["output_probs"],
            relevance=tensors.get("relevance"),
            scales=tuple(header["scales"]),
            consistency=None if consistency is None else tuple(consistency),
            units=header["units"],
            method=header["method"],
            grids=tuple(ImageGrid.from_dict(grid) for grid in header["grids"]),
            preprocessing=None if rule is None else Preprocessing.from_dict(rule),
        )

    # ---- pictures ---------------------------------------------------------------------------

    def plot_token_attr(self, show: bool = False) -> "tuple[Figure, Axes] | None":
        """Heat map of ``token_attr``: explained tokens down, text tokens across.

        Args:
            show: show the plot and return None; default False returns (figure, axes).

        Returns:
            (figure, axes), or None if shown.
        """
        from captum_mllm.visualization import plot_token_attr

        return plot_token_attr(self, show=show)

    def plot_seq_attr(self, show: bool = False) -> "tuple[Figure, Axes] | None":
        """Bars of ``seq_attr``, one per text token; ``show`` as for :meth:`plot_token_attr`.

        Args:
            show: as for :meth:`plot_token_attr`.

        Returns:
            (figure, axes), or None if shown.
        """
        from captum_mllm.visualization import plot_seq_attr

        return plot_seq_attr(self, show=show)

    def plot_image_heatmap(
        self,
        show: bool = False,
        target_token_pos: int | tuple[int, int] | None = None,
        image: int = 0,
        picture: "Image | Sequence[Image] | None" = None,
        frame: int | None = None,
    ) -> "tuple[Figure, Any] | None":
        """Heat map of one image, over the picture if it is given; of a video, of 8 of its frames.

        Args:
            show: show the plot and return None; default False returns (figure, axes).
            target_token_pos: row of ``output_tokens``; (m, n) for the sum of rows m to n - 1;
                None (default) for the sum of all.
            image: which image, default the first.
            picture: PIL picture to draw on: the original picture; where the geometry is not
                known (see :meth:`to_image`), the image as the model saw it. Of a video the frame;
                without ``frame``, all frames.
            frame: draw this frame of a video only; negative counts from the end.

        Returns:
            (figure, axes), several axes for several frames; or None if shown.
        """
        from captum_mllm.visualization import plot_image_heatmap

        return plot_image_heatmap(self, show, target_token_pos, image, picture, frame)

    def plot_time_profile(
        self,
        show: bool = False,
        target_token_pos: int | tuple[int, int] | None = None,
        image: int = 0,
    ) -> "tuple[Figure, Axes] | None":
        """When each token looked at a video; arguments as for :meth:`plot_image_heatmap`.

        Args:
            show: as for :meth:`plot_image_heatmap`.
            target_token_pos: as for :meth:`plot_image_heatmap`.
            image: as for :meth:`plot_image_heatmap`; it must be a video.

        Returns:
            (figure, axes), or None if shown.
        """
        from captum_mllm.visualization import plot_time_profile

        return plot_time_profile(self, show, target_token_pos, image)

    def to_captum(self, picture: Any = None, image: int = 0, **where: Any) -> Any:
        """As captum's ``LLMAttributionResult``; see :func:`captum_mllm.bridge.to_captum`.

        Args:
            picture: as there.
            image: as there.
            where: as there.

        Returns:
            captum's result, for its plots.
        """
        from captum_mllm.bridge import to_captum

        return to_captum(self, picture, image, **where)

    def select(self, targets: Sequence[int]) -> "MLLMAttributionResult":
        """The same result with only some of its rows.

        Args:
            targets: rows to keep, in this order.

        Returns:
            A new result; ``seq_attr`` is summed over the rows kept.
        """
        rows = torch.tensor([self._target(t) for t in targets], dtype=torch.long)
        return replace(
            self,
            grid_attr=tuple(maps[rows] for maps in self.grid_attr),
            token_attr=self.token_attr[rows],
            output_tokens=tuple(self.output_tokens[int(row)] for row in rows),
            output_ids=self.output_ids[rows],
            output_probs=self.output_probs[rows],
            relevance=None if self.relevance is None else self.relevance[rows],
        )
