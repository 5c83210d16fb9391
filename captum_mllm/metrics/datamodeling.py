"""Does a map predict what the model says of random parts of the images? The LDS."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor
from tqdm import tqdm

from captum_mllm.functional import WHOLE, rank_correlation, resample_cells
from captum_mllm.geometry import ImageGrid
from captum_mllm.metrics.perturbation import (
    Run,
    Version,
    check_seed,
    check_settings,
    read_named_maps,
    rounded_levels,
    spread_cells,
)
from captum_mllm.model.baselines import Baseline, PerturbableImages, black_pixel
from captum_mllm.model.forward import evaluating
from captum_mllm.model.targets import chosen_tokens, read_question
from captum_mllm.validation import ArgumentError, check_number


def subset_correlation(
    maps: Float[Tensor, "targets cells"],
    kept: Bool[Tensor, "subsets cells"],
    outputs: Float[Tensor, "targets subsets"],
) -> Float64[Tensor, " targets"]:
    """Spearman's correlation, over subsets of cells, of a map's sum and the model's output.

    Args:
        maps: one map per target, over the cells of all images.
        kept: which cells each subset shows.
        outputs: what the model says of each target, given each subset; e.g. log-odds.

    Returns:
        Correlations in [-1, 1]; 0 where all sums, or all outputs, are equal. Equal sums share
        their mean rank; values nearer than 1e-9 of the map's largest are equal.

    Raises:
        ValueError: shapes that don't match.

    Reference:
        Linear datamodeling score: Park et al., "TRAK", ICML 2023; for parts of a context
        ContextCite (arXiv 2409.00729).

    Example:
        >>> kept = torch.tensor([[True, False], [False, True]])
        >>> odds = torch.tensor([[2.0, -1.0]])
        >>> subset_correlation(torch.tensor([[0.3, 0.1]]), kept, odds).round(decimals=6)
        tensor([1.], dtype=torch.float64)
    """
    if maps.ndim != 2 or kept.shape[1:] != maps.shape[1:]:
        raise ArgumentError(
            "kept",
            f"must be (subsets, cells) over the cells of maps {tuple(maps.shape)}, got "
            f"{tuple(kept.shape)}.",
        )
    if outputs.shape != (len(maps), len(kept)):
        raise ArgumentError(
            "outputs", f"must be {(len(maps), len(kept))}, got {tuple(outputs.shape)}."
        )
    levels = torch.stack([rounded_levels(row) for row in maps.double()])
    return rank_correlation(levels @ kept.double().T, outputs.double())


def random_subsets(
    cells: int, subsets: int, kept: float, seed: int
) -> Bool[Tensor, "subsets cells"]:
    """Random subsets of equal size.

    Args:
        cells: number of cells.
        subsets: number of subsets.
        kept: share of the cells in each, rounded to whole cells, at least one.
        seed: of the draws.

    Raises:
        ArgumentError: that share is all cells.
    """
    size = max(1, round(kept * cells))
    if size >= cells:
        raise ArgumentError("kept", f"keeps all of {cells} cells, got {kept}; keep fewer.")
    draw = torch.Generator().manual_seed(seed)
    order = torch.rand(subsets, cells, generator=draw, dtype=torch.float64).argsort(1)
    return torch.zeros(subsets, cells, dtype=torch.bool).scatter(1, order[:, :size], True)


@dataclass(frozen=True, eq=False)
class DatamodelingScores:
    """What :func:`linear_datamodeling_score` gives; all tensors on the CPU.

    Args:
        scores: per attribution, (targets,): its score for each target, float64.
        log_odds: (targets, subsets): log-odds of each target given each subset, float64.
        kept: (subsets, cells): which cells each subset shows.
        tokens: position of each target in the answer.
        baseline: what replaces the other cells.
    """

    scores: dict[str, Float64[Tensor, " targets"]]
    log_odds: Float64[Tensor, "targets subsets"]
    kept: Bool[Tensor, "subsets cells"]
    tokens: tuple[int, ...]
    baseline: str

    def means(self) -> dict[str, float]:
        """Mean over the targets of each attribution.

        Returns:
            A value in [-1, 1] per name.
        """
        return {name: float(values.mean()) for name, values in self.scores.items()}


def linear_datamodeling_score(
    model: Any,
    inputs: Mapping[str, Any],
    target: Any,
    attributions: Any,
    *,
    processor: Any,
    tokens: Sequence[int] | None = None,
    subsets: int = 32,
    kept: float = 0.2,
    baseline: Baseline = "mean",
    seed: int = 0,
    perturbations_per_eval: int = 1,
    show_progress: bool = False,
) -> DatamodelingScores:
    r"""How well a map's sum over random parts of the images ranks what the model says of them.

    A few cells (image tokens of the canvases, those of all images together) are kept at random and
    the rest is replaced; the log-odds of each token are read. The score is the rank correlation
    over such subsets of the map's sum over the kept cells and these log-odds. It does not
    saturate, needs no mask, and judges a map's levels, not only its order.

    The subsets and their forwards are shared by all attributions and tokens.

    Args:
        model: a transformers model of a registered family; left unchanged.
        inputs: the processor's mapping for one sample, of any number of images or videos.
        target: the answer that was explained: token ids, or a string.
        attributions: one attribution as in :func:`captum_mllm.metrics.insertion_deletion`, or a
            mapping from names to several. A map on another grid than the model's is brought to
            it by the mean over each cell's area; a video's frames by the mean over each step.
        processor: the model's processor.
        tokens: positions in the answer that are scored, default all.
        subsets: number of random subsets, each a forward, default 32.
        kept: share of the cells that a subset shows, in (0, 1), default 0.2.
        baseline: what replaces the other cells: "mean" (default; each image's mean colour), "black"
            or "blur". Where a patch of black alone already takes the word away, black separates
            nothing.
        seed: of the subsets, default 0.
        perturbations_per_eval: subsets in one forward, default 1.
        show_progress: progress bar over the subsets, default False.

    Returns:
        :class:`DatamodelingScores`; a single attribution has the name "attribution".

    Raises:
        TypeError: a missing target, or arguments of another kind.
        ValueError: bad input; the message names the argument and how to fix it.

    Reference:
        Park et al., "TRAK", ICML 2023; in log-odds, over parts of a context, ContextCite (arXiv
        2409.00729). Cells of images and the share of 0.2 are ours.

    Example:
        >>> from captum_mllm import MSEA, LogitLens
        >>> from captum_mllm.reference import load, make_scene, render_pil
        >>> model, processor = load()
        >>> picture, masks = render_pil(make_scene(1))
        >>> inputs = processor(images=picture, text="USER: <image>\nwhat is this ? ASSISTANT:",
        ...     return_tensors="pt")
        >>> lens = LogitLens(model, processor).attribute(inputs, target="there is a dog")
        >>> msea = MSEA(model, processor).attribute(inputs, target="there is a dog")
        >>> found = linear_datamodeling_score(model, inputs, lens.output_ids,
        ...     {"lens": lens, "msea": msea}, processor=processor, tokens=[3], subsets=8,
        ...     perturbations_per_eval=8)
        >>> sorted(found.means()), found.log_odds.shape
        (['lens', 'msea'], torch.Size([1, 8]))
    """
    check_settings(baseline, subsets=subsets, perturbations_per_eval=perturbations_per_eval)
    check_number("kept", kept, "strictly between 0 and 1", lambda share: 0 < share < 1)
    check_seed(seed)
    adapter, sample, answer = read_question(model, inputs, target, processor)
    chosen = chosen_tokens(tokens, len(answer))
    maps = read_named_maps(attributions, sample, answer, chosen)
    shown = PerturbableImages(adapter, sample, baseline, black_pixel(processor))
    drawn = random_subsets(sum(grid.cells for grid in sample.grids), subsets, kept, seed)
    everyone = tuple(range(len(chosen)))
    versions = (Version(shown, spread_cells(~cells, sample.grids), everyone) for cells in drawn)
    with evaluating(adapter), tqdm(total=subsets, desc="subsets", disable=not show_progress) as bar:
        run = Run(adapter, sample, answer, chosen, perturbations_per_eval, bar, "log_odds")
        odds = torch.stack([values for _, values in run.values(versions)], 1)
    scores = {}
    for name, of_tokens in maps.items():
        rows = torch.stack([cell_means(one, sample.grids) for one in of_tokens])
        scores[name] = subset_correlation(rows.expand(len(chosen), -1), drawn, odds)
    return DatamodelingScores(scores, odds, drawn, tuple(chosen), baseline)


def cell_means(
    maps: Sequence[Float[Tensor, "*frames rows cols"]], grids: Sequence[ImageGrid]
) -> Float64[Tensor, " cells"]:
    """Mean of the maps of all images over each cell of the model's grids, image after image.

    Args:
        maps: one map per image, on any grid.
        grids: the images' grids.
    """
    cells = []
    for values, grid in zip(maps, grids, strict=True):
        frames = resample_cells(values.detach().cpu().double(), WHOLE, (grid.rows, grid.cols))
        if grid.steps:
            frames = frames.unflatten(0, (grid.steps, -1)).mean(1)
        cells.append(frames.flatten())
    return torch.cat(cells)
