"""The result of ``attribute``: maps and token attributions of one answer, frozen."""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

import torch
from captum.attr import ImageMaskInput
from captum.attr import LLMAttributionResult as CaptumResult
from jaxtyping import Float, Int64
from torch import Tensor
from typing_extensions import override

from captum_mllm.adapters.processors import read_preprocessing
from captum_mllm.files import read_tensors, write_tensors
from captum_mllm.functional import upsample
from captum_mllm.geometry import (
    ImageGeometry,
    ImageGrid,
    Preprocessing,
    cell_mask,
    maps_to_picture,
    picture_geometry,
)
from captum_mllm.pictures import to_eight_bits
from captum_mllm.result_file import pack_result, unpack_result
from captum_mllm.validation import ArgumentError, as_index, picture_size

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from PIL.Image import Image

    from captum_mllm.visualization.heatmaps import TokenKey
    from captum_mllm.visualization.reading import Key, Phrase, PlaceSupport

LOGITS, UNIT = "logits", "[0, 1]"


@dataclass(frozen=True, eq=False, repr=False)
class MLLMAttributionResult:
    """Which image regions and which words support every explained token of an answer.

    Field names follow ``captum.attr.LLMAttributionResult`` where the meaning is the same. All
    tensors are on the CPU; floating-point ones are float32. As the last value of a notebook cell, a
    result displays itself as a text heat map; ``print(result)`` gives a few lines.

    Args:
        grid_attr: one tensor per image, (targets, rows, cols): the maps on the model's grid of
            image tokens (the finest scale's grid with several scales, ``upsampling`` times finer
            if that is set; tiles assembled). Per video
            (targets, frames, rows, cols): each time step of the model's grid covers several
            frames, which share its values. Images come first, then videos.
        token_attr: (targets, text tokens): attribution of each text token; columns at or after
            the target are 0.
        input_tokens: labels of the columns: prompt text, then the answer.
        output_tokens: labels of the rows; empty for a token that only completes the character of
            the one before it.
        output_ids: (targets,): token ids of the rows.
        output_probs: (targets,): probability of each target given all tokens before it, softmax of
            the unprocessed teacher-forced logits.
        seq_attr: (text tokens,): ``token_attr`` summed over the targets.
        relevance: (targets, text tokens): rank-biased overlap of target and context token in
            [0, 1], 0 at or after the target; None where the method has none.
        scales: achieved scales of the input (square root of the ratio of grid areas).
        consistency: how well each scale still predicts the same answer, in [0, 1]; or None.
        units: "logits" (raw, >= 0) or "[0, 1]" (image and text jointly normalised per target).
        grids: per image, its grid and canvas at the base scale.
        preprocessing: how the processor crops and resizes a picture; None without a processor.
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

    # ---- words ------------------------------------------------------------------------------

    @property
    def words(self) -> tuple[str, ...]:
        """The words of the answer; a word is named by its place here, or by its text."""
        from captum_mllm.words import group_words

        return tuple(word.text for word in group_words(self.output_tokens))

    def __getitem__(self, key: "Key") -> "Phrase":
        """What supports a word or phrase: ``result["gray bicycle"]``, ``result["dog", 1]``.

        What several tokens have together is, in each place, the largest value of theirs, and the
        product of their probabilities.

        Args:
            key: the text of a word or phrase, without regard to case (of several mentions the
                first, or the one of ``(text, mention)``); the index of a word in :attr:`words`; or
                a slice of them.

        Raises:
            KeyError: no such word; the message lists those that are there.
            IndexError: no such index.
        """
        from captum_mllm.visualization.reading import phrase_of

        return phrase_of(self, key)

    def __contains__(self, key: "Key") -> bool:
        """Whether the answer has a word or phrase: ``"dog" in result``.

        Args:
            key: as for ``result[key]``.
        """
        try:
            return bool(self[key].words)
        except (KeyError, IndexError):
            return False

    def at(
        self,
        place: Sequence[float],
        picture: "tuple[int, int] | Image | None" = None,
        *,
        image: int = 0,
        frame: int | None = None,
    ) -> "tuple[PlaceSupport, ...]":
        """The words that a place of a picture supports, strongest first.

        Args:
            place: (x, y) of a pixel, or (left, upper, right, lower) of a box, pixels.
            picture: (height, width) of the original picture, or the picture itself; default None:
                pixels of the image as the model saw it.
            image: which image, default the first.
            frame: of a video, which frame; None (default) for the largest over time.

        Returns:
            One entry per word: its index, its text, and the mean of its map over the place.

        Raises:
            ValueError: ``place`` is neither, or lies outside the picture.
            IndexError: no such image or frame.
        """
        from captum_mllm.visualization.reading import words_at

        return words_at(self, place, picture, image=image, frame=frame)

    def to_frame(self) -> Any:
        """A table of pandas, a row per word; see :func:`captum_mllm.visualization.to_frame`.

        Raises:
            ImportError: pandas is not installed.
        """
        from captum_mllm.visualization.compare import to_frame

        return to_frame(self)

    def to_html(
        self,
        path: str | os.PathLike[str],
        pictures: "Image | Sequence[Image | Sequence[Image]]",
        *,
        prompt: str = "",
        notes: Sequence[str] = (),
    ) -> None:
        """Write one self-contained page: words, phrases and places to point at; mail it as it is.

        Args:
            path: the file, usually ``*.html``; its folder must exist.
            pictures: the original picture, or several; of a video the list of its frames.
            prompt: the user's prompt.
            notes: sentences for its head.

        Raises:
            ArgumentError: another number of pictures than the result has.
        """
        from captum_mllm.files import write_atomic
        from captum_mllm.visualization import contents_of, describe, render_page

        several = pictures if isinstance(pictures, Sequence) else [pictures]
        contents = contents_of({self.method or "method": self}, several, prompt=prompt)
        page = render_page(contents, notes=notes, facts=describe().facts)
        write_atomic(path, page.encode("utf-8", "backslashreplace"))

    # ---- maps and rows ------------------------------------------------------------------------

    @property
    def image_attr(self) -> tuple[Float[Tensor, "targets ..."], ...]:
        """Per image (targets, height, width): maps in pixels of the image as the model saw it.

        Per video (targets, frames, height, width).

        Computed on access (bilinear from the grid): 64 targets of a 336 px image take 29 MB. Use
        :meth:`image_map` for one target.
        """
        return tuple(
            upsample(maps, (grid.height, grid.width))
            for maps, grid in zip(self.grid_attr, self.grids, strict=True)
        )

    def image_map(
        self, target: "int | str | tuple[str, int]", image: int = 0
    ) -> Float[Tensor, "*frames height width"]:
        """The map of one target in pixels of the image as the model saw it.

        Args:
            target: row, as in ``output_tokens``; negative counts from the end. Or a word or phrase
                as in ``result[...]``.
            image: which image, default the first.

        Returns:
            (height, width); of a video (frames, height, width).

        Raises:
            IndexError: no such target or image.
        """
        grid, maps = self._image(image)
        if (index := as_index(target)) is not None:
            row = self._target(index)
            maps = maps[row : row + 1]
        else:
            maps = self[target].grid_attr[image][None]  # type: ignore[index]
        return upsample(maps, (grid.height, grid.width))[0]

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
            geometry: the box of the picture that the model saw; needed if the attributor has no
                processor, or if the processor's settings were overridden in its call.
            processor: a processor whose settings determine the geometry.

        Returns:
            (targets, height, width), of a video (targets, frames, height, width); 0 in parts of
            the picture that the model did not see.

        Raises:
            ValueError: neither a processor nor ``geometry=`` is known, or the processor's
                settings don't give the canvas that the model saw.
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
        """The box of the original picture that the image's canvas shows; see :meth:`to_image`.

        Args:
            i: which image.
            size: (height, width) of the original picture.
            geometry: returned unchanged, if given.
            processor: a processor whose settings determine the geometry.

        Returns:
            The box, in pixels of the original picture.

        Raises:
            ValueError: it is not known, or ``size`` does not give the canvas that the model saw.
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
        """Which frames of a video support each token: the mean of its map over each frame.

        Args:
            i: which image or video, default the first.

        Returns:
            (targets, frames), in the maps' units.

        Raises:
            ValueError: it is a still image.
            IndexError: no such image.
        """
        grid, maps = self._image(i)
        if not grid.steps:
            raise ValueError(f"image {i} is a still image; only a video has a time profile.")
        return maps.mean((-2, -1))

    def select(self, targets: Sequence[int]) -> "MLLMAttributionResult":
        """The result of some of the explained tokens only.

        Args:
            targets: rows to keep, in this order.

        Returns:
            A new result; ``seq_attr`` is the sum over the rows kept.

        Raises:
            IndexError: no such row.
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

        The file appears whole or not at all, and holds a checksum of all its bytes.

        Args:
            path: file to write, usually ``*.safetensors``; its folder must exist.

        Raises:
            ArgumentError: a field is not what it must be, so that the file could not be loaded.
        """
        header, tensors = pack_result(
            {item.name: getattr(self, item.name) for item in fields(self)}
        )
        unpack_result(json.loads(json.dumps(header)), tensors, (LOGITS, UNIT))
        write_tensors(path, header, tensors)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "MLLMAttributionResult":
        """Read what :meth:`save` wrote.

        Args:
            path: the file.

        Returns:
            The result; all values equal the saved ones exactly.

        Raises:
            FileNotFoundError: no such file.
            ValueError: a file that :meth:`save` did not write, one that changed since (a bit is
                enough), or one of another format. The message names the file and the field.

        Example:
            >>> import tempfile
            >>> from pathlib import Path
            >>> path = Path(tempfile.mkdtemp()) / "answer.safetensors"
            >>> _ = path.write_bytes(b"something else")
            >>> MLLMAttributionResult.load(path)  # doctest: +ELLIPSIS
            Traceback (most recent call last):
            ValueError: path '...' is not a safetensors file: ...
        """
        header, tensors = read_tensors(path)
        try:
            return cls(**unpack_result(header, tensors, (LOGITS, UNIT)))
        except ArgumentError as error:
            raise ArgumentError("path", f"{os.fspath(path)!r} can't be read: {error}") from error

    # ---- what it shows of itself ------------------------------------------------------------

    @override
    def __repr__(self) -> str:
        from captum_mllm.visualization.representation import result_text

        return result_text(self)

    def _repr_html_(self) -> str:
        """The text heat map, which IPython shows for a cell's last value."""
        from captum_mllm.visualization.representation import result_html

        return result_html(self)

    # ---- plots ------------------------------------------------------------------------------

    def plot_token_attr(
        self, show: bool = False, *, ax: "Axes | None" = None
    ) -> "tuple[Figure, Axes] | None":
        """Heat map of ``token_attr``: explained tokens down, text tokens across.

        Args:
            show: show the plot and return None; default False returns (figure, axes), which shows
                itself as the last value of a notebook cell.
            ax: axes to draw on, default those of a new figure.

        Returns:
            (figure, axes), or None if shown. A small matrix has its values written into the cells.
        """
        from captum_mllm.visualization.plots import draw_token_attr

        return draw_token_attr(self, show, ax)

    def plot_seq_attr(
        self, show: bool = False, *, ax: "Axes | None" = None
    ) -> "tuple[Figure, Axes] | None":
        """Bars of ``seq_attr``, one per text token.

        Args:
            show: as for :meth:`plot_token_attr`.
            ax: as for :meth:`plot_token_attr`.

        Returns:
            (figure, axes), or None if shown.
        """
        from captum_mllm.visualization.plots import draw_seq_attr

        return draw_seq_attr(self, show, ax)

    def plot_image_heatmap(
        self,
        show: bool = False,
        target_token_pos: "TokenKey | None" = None,
        image: int = 0,
        picture: "Image | Sequence[Image] | None" = None,
        frame: int | None = None,
        *,
        ax: "Axes | None" = None,
    ) -> "tuple[Figure, Any] | None":
        """Heat map of one image, over the picture if it is given; of a video, of its frames.

        A video is drawn as up to 8 frames, evenly spaced in time: a mean over time would show heat
        that no frame has. ``frame`` draws a single one. The full colour is the largest value in
        the whole video, so that frames can be compared however they are drawn.

        Args:
            show: show the plot and return None; default False returns (figure, axes).
            target_token_pos: row of ``output_tokens``; (m, n) for the largest of rows m to n - 1; a
                word or phrase as in ``result[...]``; None (default) for the largest of all.
            image: which image or video, default the first.
            picture: PIL picture to draw on: the original picture or, if the geometry is not known
                (see :meth:`to_image`), one of the image's own size. For a video, the picture of
                ``frame``; without ``frame=``, a sequence of all frames that the model was given.
            frame: draw this frame of a video only, as the model was given them; negative counts
                from the end.
            ax: axes to draw on, default those of a new figure; not for all frames of a video.

        Returns:
            (figure, axes), or None if shown. Several frames of a video: an array of axes, one per
            frame.

        Raises:
            IndexError: no such token, image or frame.
            ValueError: an empty range of tokens; a picture whose geometry is not known;
                ``frame=`` for a still image; for all frames of a video, a single picture or a
                sequence of the wrong length.
        """
        from captum_mllm.visualization.heatmaps import draw_image_heatmap

        return draw_image_heatmap(self, show, target_token_pos, image, picture, frame, ax)

    def plot_time_profile(
        self,
        show: bool = False,
        target_token_pos: "TokenKey | None" = None,
        image: int = 0,
        *,
        ax: "Axes | None" = None,
    ) -> "tuple[Figure, Axes] | None":
        """Which frames of a video support each token: a line for one token, a row each for several.

        The values are those of :meth:`time_profile`. Time runs in the model's own steps, each of
        which covers its frames.

        Args:
            show: as for :meth:`plot_image_heatmap`.
            target_token_pos: as for :meth:`plot_image_heatmap`, but rows stay apart.
            image: which video, default the first image or video.
            ax: axes to draw on, default those of a new figure.

        Returns:
            (figure, axes), or None if shown.

        Raises:
            IndexError: no such token or image.
            ValueError: an empty range of tokens; a still image.
        """
        from captum_mllm.visualization.heatmaps import draw_time_profile

        return draw_time_profile(self, show, target_token_pos, image, ax)

    # ---- captum -----------------------------------------------------------------------------

    def to_captum(
        self,
        picture: Any = None,
        image: int = 0,
        *,
        geometry: ImageGeometry | None = None,
        processor: Any = None,
    ) -> CaptumResult:
        """As captum's ``LLMAttributionResult``: of the words, or of one image.

        Without a picture the features are the text tokens, as in ``token_attr``; with one, the
        cells of the image's grid, as an ``ImageMaskInput`` whose segments are the cells in pixels
        of the picture, and captum's ``plot_image_heatmap`` draws them (with many cells call it
        with ``border_width=0, show_legends=False``).

        It must be the very picture. Another is refused where the model's inputs tell its size or
        aspect (Qwen-VL, LLaVA-NeXT, probed models); LLaVA, PaliGemma, Gemma 3 and InternVL make the
        same canvas of pictures of any aspect, so that nothing tells them apart, and the cells would
        be drawn in the wrong places.

        Args:
            picture: the original PIL picture of the image, or None (default) for the words.
            image: which image, default the first.
            geometry: as for :meth:`to_image`, where no processor determines the geometry.
            processor: as for :meth:`to_image`.

        Returns:
            captum's result, for its plots; ``output_probs`` and the values are those of this
            result, ``seq_attr`` their sum.

        Raises:
            TypeError: ``picture`` is not a PIL picture.
            ValueError: a video; no text tokens; the geometry is not known.
            IndexError: no such image.

        Example:
            >>> from captum_mllm import LogitLens
            >>> from captum_mllm.reference import load, make_scene, render_pil
            >>> model, processor = load()
            >>> picture, _ = render_pil(make_scene(1))
            >>> inputs = processor(images=picture, text="USER: <image> what is this ? ASSISTANT:",
            ...     return_tensors="pt")
            >>> result = LogitLens(model, processor).attribute(inputs, target="there is a dog")
            >>> result.to_captum(picture).token_attr.shape  # 14 x 14 cells
            torch.Size([4, 196])
        """
        names, segments, values = list(self.input_tokens), None, self.token_attr
        if picture is not None:
            segments, values = self._segments(picture, image, geometry, processor)
            names = list(segments.values)
        return CaptumResult(
            input_tokens=names,
            output_tokens=list(self.output_tokens),
            seq_attr=values.sum(0),
            token_attr=values,
            output_probs=self.output_probs,
            inp=segments,
        )

    def _segments(
        self, picture: Any, image: int, geometry: ImageGeometry | None, processor: Any
    ) -> tuple[ImageMaskInput, Tensor]:
        """The picture with a segment per cell, and each target's value of each segment."""
        if not hasattr(picture, "convert"):
            raise TypeError(f"picture must be a PIL picture, got {type(picture).__name__}.")
        size = (picture.height, picture.width)
        box = self.geometry(image, size, geometry=geometry, processor=processor)
        grid, maps = self._image(image)
        if grid.steps:
            raise ValueError(f"image {image} is a video, which captum's ImageMaskInput can't hold.")
        mask = cell_mask(box, size, (maps.shape[-2], maps.shape[-1]))
        values = torch.cat([maps.flatten(1), maps.new_zeros(len(maps), 1)], 1)
        # Cells smaller than a pixel may have none: captum has only those that are in the mask.
        return ImageMaskInput(to_eight_bits(picture).convert("RGB"), mask), values[:, mask.unique()]
