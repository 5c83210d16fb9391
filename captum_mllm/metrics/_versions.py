"""Changed versions of one sample's images, and the forwards over them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor

from captum_mllm.adapters import Adapter
from captum_mllm.inputs import Sample
from captum_mllm.metrics._answers import answer_log_probs
from captum_mllm.metrics._perturbation import ChangeablePictures, mask_shape, pixel_ranks


class Version(NamedTuple):
    """One changed version of the images, and whose probability is read at which step.

    Args:
        pictures: changes the images.
        masks: per image, what is replaced.
        rows: which of the chosen tokens are read.
        deletes: whether it belongs to the deletion curve.
        step: its place in the curve.
    """

    pictures: ChangeablePictures
    masks: list[Tensor]
    rows: tuple[int, ...]
    deletes: bool = False
    step: int = 0


@dataclass(frozen=True)
class Run:
    """Forwards over versions, some at a time.

    Args:
        adapter: the model's adapter, already ``running()``.
        sample: the prompt.
        answer: ids of the answer.
        chosen: positions in it that are scored.
        per_eval: versions in one forward.
        bar: told of each version done.
    """

    adapter: Adapter
    sample: Sample
    answer: Tensor
    chosen: list[int]
    per_eval: int
    bar: Any

    def probs(self, versions: Iterator[Version]) -> Iterator[tuple[Version, Tensor]]:
        """Probabilities of each version's own rows, float64 on the CPU.

        Args:
            versions: what to run; all of a batch read equally many rows.
        """
        while batch := list(islice(versions, self.per_eval)):
            pixels = [version.pictures.replaced(version.masks) for version in batch]
            asked = [[self.chosen[row] for row in version.rows] for version in batch]
            found = answer_log_probs(self.adapter, self.sample, self.answer, pixels, asked)
            self.bar.update(len(batch))
            yield from zip(batch, found.double().exp().cpu(), strict=True)


def perturbed_versions(
    maps: Sequence[tuple[Tensor, ...]],
    sample: Sample,
    pictures: ChangeablePictures,
    n_chosen: int,
    sizes: Sequence[int],
) -> Iterator[Version]:
    """Every version between the ends of the curves.

    Args:
        maps: one map per image, for each chosen token or once for all.
        sample: the prompt with its images.
        pictures: changes them.
        n_chosen: number of chosen tokens.
        sizes: number of changed pixels after each step, the first and the last included.
    """
    for n, own in enumerate(maps):
        ranks = pixel_ranks(own, sample.grids)
        rows = (n,) if len(maps) > 1 else tuple(range(n_chosen))
        for step in range(1, len(sizes) - 1):
            best = [places < sizes[step] for places in ranks]
            yield Version(pictures, [~mask for mask in best], rows, False, step)
            yield Version(pictures, best, rows, True, step)


def all_masks(sample: Sample, replaced: bool) -> list[Tensor]:
    """Masks of nothing, or of everything.

    Args:
        sample: the prompt with its images.
        replaced: which of the two.
    """
    return [torch.full(mask_shape(grid), replaced) for grid in sample.grids]
