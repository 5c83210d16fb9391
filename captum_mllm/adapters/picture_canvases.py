"""Each picture of a sample as one plain frame of pixels, and the model's pixel inputs made of it.

Models cut a picture up (tiles, rows of patches) and may see it twice (overview). Whoever perturbs
a picture, or asks for a gradient, wants one tensor with the picture's own axes.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from captum_mllm.geometry import ImageGrid


class PictureCanvases:
    """The part of the adapter contract that turns pixel inputs into frames and back.

    A frame shows what the image's grid shows; where the grid tells the picture's size
    (``ImageGrid.picture``), it shows the whole picture. The defaults are those of a family whose
    ``pixel_values`` (images, channels, height, width) are frames already.
    """

    tile_axis: ClassVar[bool] = False
    """Whether a sample's pixel_values are (1, tiles, ...), not (tiles or images, ...)."""

    def grids(self, inputs: Mapping[str, Tensor]) -> tuple[ImageGrid, ...]:
        """Grid and frame of each image: see :class:`~captum_mllm.adapters.Adapter`."""
        raise NotImplementedError

    def canvases(
        self, inputs: Mapping[str, Tensor], grids: Sequence[ImageGrid]
    ) -> tuple[Tensor, ...]:
        """Each image's pixels as one frame, in the order of the grids.

        Args:
            inputs: the model's inputs of one sample.
            grids: the images among them.

        Returns:
            Per image (1, channels, height, width); per video (1, frames, channels, height,
            width).
        """
        del grids
        return inputs["pixel_values"].split(1)

    def with_canvases(
        self, inputs: Mapping[str, Tensor], grids: Sequence[ImageGrid], frames: Sequence[Tensor]
    ) -> dict[str, Tensor]:
        """The inputs that hold pixels, made of other frames; differentiable.

        The inputs' own frames give the inputs' own pixels, bit for bit. Where a picture is seen
        twice, the overview changes by what its frame changes, resized: it stays the processor's
        own as long as the frame does.

        Args:
            inputs: the model's inputs of one sample.
            grids: the images among them.
            frames: new frames of the shapes that :meth:`canvases` gives.
        """
        del inputs, grids
        return {"pixel_values": torch.cat(list(frames))}

    def mirrored(
        self, inputs: Mapping[str, Tensor], grids: Sequence[ImageGrid]
    ) -> dict[str, Tensor]:
        """The inputs that hold pixels, every picture mirrored left to right, its overview too.

        Args:
            inputs: the model's inputs of one sample.
            grids: the images among them.
        """
        frames = [frame.flip(-1) for frame in self.canvases(inputs, grids)]
        return self.with_canvases(inputs, grids, frames)

    def with_image_version(self, pixels: Tensor, rest: Mapping[str, Any]) -> dict[str, Any]:
        """A sample's inputs with one version of its only image, as captum's wrappers hand it over.

        Args:
            pixels: one row of a tensor of versions of the image: a frame (channels, height, width)
                where ``rest`` holds the image itself, else what the model takes.
            rest: the sample's other inputs, or all of them.

        Raises:
            ValueError: a frame of another shape than the image's, or of one of several images.
        """
        own = rest.get("pixel_values")
        if pixels.ndim != 3 or not isinstance(own, Tensor):
            whole = pixels.ndim == 4 and not self.tile_axis
            return {**rest, "pixel_values": pixels if whole else pixels[None]}
        here = {k: v.to(pixels.device) for k, v in rest.items() if isinstance(v, Tensor)}
        grids = self.grids(here)
        shapes = [tuple(frame.shape[1:]) for frame in self.canvases(here, grids)]
        if shapes != [tuple(pixels.shape)]:
            raise ValueError(
                f"inputs must be versions of the frame of one image, {('N', *shapes[0])} by "
                f"additional_forward_args, which hold {len(shapes)} image(s); got "
                f"{('N', *pixels.shape)}. TokenLogProb(...).pixels is such a frame."
            )
        return {**rest, **self.with_canvases(here, grids, (pixels[None],))}
