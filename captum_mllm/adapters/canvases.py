"""Each image of a sample as one plain canvas of pixels, and the model's pixel inputs made of it.

Models cut up an image (tiles, rows of patches) and may see it twice (overview). To perturb an
image, or to compute a gradient, one tensor with the image's axes is needed.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from captum_mllm.geometry import ImageGrid


class PictureCanvases:
    """The part of the adapter contract that turns pixel inputs into canvases and back.

    A canvas shows what the image's grid shows; where the grid tells the picture's size
    (``ImageGrid.picture``), it shows the whole picture. The defaults are those of a family whose
    ``pixel_values`` (images, channels, height, width) already are canvases.
    """

    tile_axis: ClassVar[bool] = False
    """Whether a sample's pixel_values are (1, tiles, ...), not (tiles or images, ...)."""

    def grids(self, inputs: Mapping[str, Tensor]) -> tuple[ImageGrid, ...]:
        """Grid and canvas of each image: see :class:`~captum_mllm.adapters.Adapter`."""
        raise NotImplementedError

    def canvases(
        self, inputs: Mapping[str, Tensor], grids: Sequence[ImageGrid]
    ) -> tuple[Tensor, ...]:
        """Each image's pixels as one canvas, in the order of the grids.

        Args:
            inputs: the model's inputs of one sample.
            grids: the grids of its images.

        Returns:
            Per image (1, channels, height, width); per video (1, frames, channels, height,
            width).
        """
        del grids
        if inputs["pixel_values"].ndim != 4:
            raise NotImplementedError(
                f"pixel_values of shape {tuple(inputs['pixel_values'].shape)} are no canvases: to "
                f"flip or perturb images, {type(self).__name__} must override canvases and "
                f"with_canvases. Maps of unchanged images need neither: MSEA(model, flip='none')."
            )
        return inputs["pixel_values"].split(1)

    def with_canvases(
        self, inputs: Mapping[str, Tensor], grids: Sequence[ImageGrid], canvases: Sequence[Tensor]
    ) -> dict[str, Tensor]:
        """The pixel inputs made of other canvases; differentiable.

        Given the canvases of ``inputs``, it returns exactly the pixels of ``inputs``. Where an
        image is seen twice, the overview changes by the change of the canvas, resized: it stays
        the processor's as long as the canvas does.

        Args:
            inputs: the model's inputs of one sample.
            grids: the grids of its images.
            canvases: new canvases, of the shapes that :meth:`canvases` returns.

        Returns:
            Replacements of the pixel inputs.
        """
        del inputs, grids
        return {"pixel_values": torch.cat(list(canvases))}

    def can_flip(self, grids: Sequence[ImageGrid], axes: Sequence[int]) -> bool:
        """Whether flipped pictures lie on the same cells, flipped; by default they do.

        Args:
            grids: the grids of the images.
            axes: as :meth:`flipped` takes them.
        """
        del grids, axes
        return True

    def flipped(
        self, inputs: Mapping[str, Tensor], grids: Sequence[ImageGrid], axes: Sequence[int]
    ) -> dict[str, Tensor]:
        """The pixel inputs with every image flipped along axes of its canvas, its overview too.

        Args:
            inputs: the model's inputs of one sample.
            grids: the grids of its images.
            axes: -1 mirrors left to right; -2 and -1 turn by 180 degrees.

        Returns:
            Replacements of the pixel inputs.
        """
        flipped = [canvas.flip(tuple(axes)) for canvas in self.canvases(inputs, grids)]
        return self.with_canvases(inputs, grids, flipped)

    def with_image_version(self, pixels: Tensor, rest: Mapping[str, Any]) -> dict[str, Any]:
        """A sample's inputs with one version of its only image, as captum's wrappers pass it.

        Args:
            pixels: one row of a tensor of versions of the image: a canvas (channels, height, width)
                if ``rest`` holds the image itself, else what the model takes.
            rest: the sample's other inputs, or all of them.

        Returns:
            All inputs of the sample.

        Raises:
            ValueError: the canvas does not have the image's shape, or there are several images.
        """
        image = rest.get("pixel_values")
        if pixels.ndim != 3 or not isinstance(image, Tensor):
            whole = pixels.ndim == 4 and not self.tile_axis
            return {**rest, "pixel_values": pixels if whole else pixels[None]}
        here = {k: v.to(pixels.device) for k, v in rest.items() if isinstance(v, Tensor)}
        grids = self.grids(here)
        shapes = [tuple(canvas.shape[1:]) for canvas in self.canvases(here, grids)]
        if shapes != [tuple(pixels.shape)]:
            raise ValueError(
                f"inputs must be versions of the canvas of one image, {('N', *shapes[0])} by "
                f"additional_forward_args, which hold {len(shapes)} image(s); got "
                f"{('N', *pixels.shape)}. TokenLogProb(...).pixels is such a canvas."
            )
        return {**rest, **self.with_canvases(here, grids, (pixels[None],))}
