"""TokenTrace: all that a method may need from the model, gathered once."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from einops import pack, unpack
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from captum_mllm.geometry import ImageGrid, Preprocessing


@dataclass(frozen=True, eq=False)
class ReleasedCodeDeviations:
    """Evidence that only TAM's released code uses (``TokenActivationMap(parity=True)``).

    Args:
        first_class: row of the class that the first prompt text token predicts (argmax).
        first_scores: (text tokens,): its ``relu(logit)`` at each text token's pos(j).
        last_class: row of the class of the prompt's very last token.
    """

    first_class: int
    first_scores: Float[Tensor, " tokens"]
    last_class: int


@dataclass(frozen=True, eq=False)
class TokenTrace:
    """Raw evidence of one sample; nothing after it runs a model.

    *Text tokens* are the columns: the prompt's text, then the answer. *Classes* are the distinct
    token ids among them: a raw map of the lens depends on the image and the token id alone. Maps
    that read the context have a row per text token instead (``per_token``).

    Args:
        class_ids: (classes,): ascending token ids.
        maps: per image (maps, rows, cols), per video (maps, steps, rows, cols):
            ``relu(logit_i(class))`` at the cells, views of one image merged; with ``per_token``
            (text tokens, ...), what the text token's prediction read from the cells.
        text_ids: (text tokens,): token ids of the columns.
        text_positions: (text tokens,): their positions in ``input_ids`` + answer, padding
            included.
        targets: (targets,): which columns are explained.
        text_scores: (targets, text tokens): ``relu(logit_{pos(j)}(y_t))``, 0 at or after the
            target; pos(j) is a prompt token's own position, an answer token's position before it.
        probs: (targets,): probability of each target given all before it.
        rankings: (text tokens, k): the top-k ids of the distribution from which each token was
            predicted (the position before it); None if not requested.
        grids: per image, the grid and frame of the base scale.
        labels: (text tokens): readable labels.
        n_prompt: how many of the text tokens belong to the prompt.
        released_code_deviations: what TAM's released code shows for the first answer token.
        scales: achieved scales behind ``maps``.
        consistency: agreement of each scale with the base answer, or None.
        preprocessing: what the processor does to a picture's frame, or None.
        per_token: whether ``maps`` have one row per text token, default False: one per class.
    """

    class_ids: Int64[Tensor, " classes"]
    maps: tuple[Float[Tensor, "maps ..."], ...]
    text_ids: Int64[Tensor, " tokens"]
    text_positions: Int64[Tensor, " tokens"]
    targets: Int64[Tensor, " targets"]
    text_scores: Float[Tensor, "targets tokens"]
    probs: Float[Tensor, " targets"]
    rankings: Int64[Tensor, "tokens k"] | None
    grids: tuple[ImageGrid, ...]
    labels: tuple[str, ...]
    n_prompt: int
    released_code_deviations: ReleasedCodeDeviations
    scales: tuple[float, ...] = (1.0,)
    consistency: tuple[float, ...] | None = None
    preprocessing: Preprocessing | None = None
    per_token: bool = False

    @property
    def map_rows(self) -> Int64[Tensor, " tokens"]:
        """Row of ``maps`` of each text token."""
        if self.per_token:
            return torch.arange(len(self.text_ids), device=self.text_ids.device)
        return torch.searchsorted(self.class_ids, self.text_ids)

    @property
    def cells(self) -> Float[Tensor, "maps cells"]:
        """The raw maps over the cells of all images, laid end to end."""
        return self.pack_cells(self.maps)

    @staticmethod
    def pack_cells(maps: Sequence[Float[Tensor, "n ..."]]) -> Float[Tensor, "n cells"]:
        """Lay maps of several images end to end.

        Args:
            maps: per image, (n, rows, cols) or (n, steps, rows, cols).

        Returns:
            (n, cells of all images).
        """
        return pack(list(maps), "n *")[0]

    def unpack_cells(
        self, cells: Float[Tensor, "targets cells"]
    ) -> tuple[Float[Tensor, "targets ..."], ...]:
        """Inverse of :meth:`pack_cells`: one map per image.

        Args:
            cells: (targets, cells of all images).

        Returns:
            Per image, (targets, rows, cols) or (targets, steps, rows, cols).
        """
        return self.unpack_like(cells, self.maps)

    @staticmethod
    def unpack_like(
        cells: Float[Tensor, "n cells"], maps: Sequence[Float[Tensor, "m ..."]]
    ) -> tuple[Float[Tensor, "n ..."], ...]:
        """Cells laid end to end as maps of the shapes of others.

        Args:
            cells: (n, cells of all images).
            maps: their last axes are the shapes.

        Returns:
            Per image, (n, ...).
        """
        return tuple(unpack(cells, [m.shape[1:] for m in maps], "n *"))

    @property
    def is_earlier(self) -> Bool[Tensor, "targets tokens"]:
        """Text tokens before each target."""
        columns = torch.arange(len(self.text_ids), device=self.targets.device)
        return columns[None, :] < self.targets[:, None]

    @property
    def is_context(self) -> Bool[Tensor, "targets tokens"]:
        """Earlier text tokens whose id differs from the target's."""
        same = self.text_ids[None, :] == self.text_ids[self.targets][:, None]
        return self.is_earlier & ~same
