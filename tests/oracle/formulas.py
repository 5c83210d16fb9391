"""Slow, obvious twins of every formula: loops over plain floats, written from the definitions.

Nothing here shares code with the package. Tensors go in and come out (float64); in between there
are only Python numbers and lists, so that each line can be checked against the formula by eye.
"""

import itertools
import math
import statistics
from decimal import Decimal, localcontext
from fractions import Fraction

import torch
from torch import Tensor


def _f64(nested) -> Tensor:
    return torch.tensor(nested, dtype=torch.float64)


def dot(a: list[float], b: list[float]) -> float:
    return math.fsum(x * y for x, y in zip(a, b, strict=True))


def relu(x: float) -> float:
    return x if x > 0 else 0.0


# --- rankings ---------------------------------------------------------------------------------


def top_k_rankings(logits: Tensor, k: int) -> Tensor:
    """Best first, ties by the lower id: Python's sort on (-logit, id)."""
    rows = []
    for row in logits.float().tolist():
        order = sorted(range(len(row)), key=lambda i, row=row: (-row[i], i))
        rows.append(order[:k])
    return torch.tensor(rows, dtype=torch.int64)


def rank_biased_overlap(rankings_a: Tensor, rankings_b: Tensor, p: float = 0.9) -> Tensor:
    """Prefix sets: weight p^(d-1) on the shared fraction of the first d ids, weights normalised."""

    def one(a: list[int], b: list[int]) -> float:
        total = weight_sum = 0.0
        for d in range(1, len(a) + 1):
            agreement = len(set(a[:d]) & set(b[:d])) / d
            total += p ** (d - 1) * agreement
            weight_sum += p ** (d - 1)
        return total / weight_sum

    return _f64([[one(a, b) for b in rankings_b.tolist()] for a in rankings_a.tolist()])


# --- interference -----------------------------------------------------------------------------


def context_weights(scores: Tensor, is_context: Tensor) -> Tensor:
    rows = []
    for row, flags in zip(scores.tolist(), is_context.tolist(), strict=True):
        total = sum(s for s, flag in zip(row, flags, strict=True) if flag)
        rows.append(
            [s / total if flag and total > 0 else 0.0 for s, flag in zip(row, flags, strict=True)]
        )
    return _f64(rows)


def weighted_sum(weights: list[float], context_maps: list[list[float]]) -> list[float]:
    n_cells = len(context_maps[0])
    return [
        math.fsum(w * context[c] for w, context in zip(weights, context_maps, strict=True))
        for c in range(n_cells)
    ]


def best_alpha(target_map: list[float], interference: list[float]) -> float:
    energy = dot(interference, interference)
    return dot(target_map, interference) / energy if energy > 0 else 0.0


def arc_subtract(
    maps: Tensor,
    context_maps: Tensor,
    weights: Tensor,
    relevance: Tensor,
    strength: float = 1.0,
    alpha_max: float | None = None,
) -> Tensor:
    cleaned, contexts = [], context_maps.tolist()
    for a, w, r in zip(maps.tolist(), weights.tolist(), relevance.tolist(), strict=True):
        alpha = best_alpha(a, weighted_sum(w, contexts))
        if alpha_max is not None and alpha > alpha_max:
            alpha = alpha_max
        irrelevant = [wj * (1 - rj) for wj, rj in zip(w, r, strict=True)]
        e = weighted_sum(irrelevant, contexts)
        cleaned.append([relu(x - strength * alpha * y) for x, y in zip(a, e, strict=True)])
    return _f64(cleaned)


def eci_subtract(
    maps: Tensor, context_maps: Tensor, weights: Tensor, alpha_max: float | None = None
) -> Tensor:
    cleaned, contexts = [], context_maps.tolist()
    for a, w in zip(maps.tolist(), weights.tolist(), strict=True):
        e = weighted_sum(w, contexts)
        alpha = best_alpha(a, e)
        if alpha_max is not None and alpha > alpha_max:
            alpha = alpha_max
        cleaned.append([relu(x - alpha * y) for x, y in zip(a, e, strict=True)])
    return _f64(cleaned)


def joint_min_max(maps: Tensor, scores: Tensor, is_earlier: Tensor) -> tuple[Tensor, Tensor]:
    unit_maps, unit_scores = [], []
    for a, s, flags in zip(maps.tolist(), scores.tolist(), is_earlier.tolist(), strict=True):
        values = list(a) + [x for x, flag in zip(s, flags, strict=True) if flag]
        low, high = min(values), max(values)

        def unit(x: float, low: float = low, high: float = high) -> float:
            return (x - low) / (high - low) if high > low else 0.0

        unit_maps.append([unit(x) for x in a])
        unit_scores.append([unit(x) if flag else 0.0 for x, flag in zip(s, flags, strict=True)])
    return _f64(unit_maps), _f64(unit_scores)


# --- maps -------------------------------------------------------------------------------------


def lens_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    rows = []
    for v, row in enumerate(weight.double().tolist()):
        b = 0.0 if bias is None else bias.double().tolist()[v]
        rows.append([dot(row, h) + b for h in hidden.double().tolist()])
    return _f64(rows)


def _reflected(i: int, n: int) -> int:
    """Index of cell i of an axis of n cells, one step outside allowed: mirrored, edge if n = 1."""
    if n == 1:
        return 0
    if i == -1:
        return 1
    return n - 2 if i == n else i


def _rank_gauss(window: list[float]) -> float:
    mean = statistics.fmean(window)
    if mean <= 0:
        return 0.0
    if min(window) == max(window):
        return window[0]
    sigma = statistics.pstdev(window) / mean
    weights = []
    for r in range(9):
        exponent = (r - 4) ** 2 / sigma / sigma / 2
        weights.append(math.exp(-exponent))
    return dot(weights, sorted(window)) / sum(weights)


def rank_gaussian_filter(maps: Tensor) -> Tensor:
    """One map (rows, cols)."""
    grid = maps.tolist()
    rows, cols = len(grid), len(grid[0])
    result = []
    for y in range(rows):
        line = []
        for x in range(cols):
            window = [
                grid[_reflected(y + dy, rows)][_reflected(x + dx, cols)]
                for dy in (-1, 0, 1)
                for dx in (-1, 0, 1)
            ]
            line.append(_rank_gauss(window))
        result.append(line)
    return _f64(result)


def aggregate(stack: Tensor, how: str = "mean", weights: Tensor | None = None) -> Tensor:
    """Each cell on its own: ``stack`` is (scales, ...)."""
    w = [1.0] * len(stack) if weights is None else weights.tolist()

    def one(values: list[float]) -> float:
        if how == "median":
            return statistics.median(values)
        if how == "mean":
            return dot(w, values) / sum(w)
        product = 1.0
        for wi, x in zip(w, values, strict=True):
            product *= x ** (wi / sum(w))
        return product

    cells = stack.reshape(len(stack), -1).T.tolist()
    return _f64([one(values) for values in cells]).reshape(stack.shape[1:])


def _bilinear_taps(new: int, old: int) -> list[dict[int, float]]:
    """Per new cell the old cells and weights it takes, pixel centres aligned, edges clamped."""
    taps = []
    for i in range(new):
        centre = (i + 0.5) * old / new - 0.5
        centre = min(max(centre, 0.0), old - 1.0)
        left = math.floor(centre)
        right = min(left + 1, old - 1)
        share: dict[int, float] = {}
        share[left] = share.get(left, 0.0) + 1 - (centre - left)
        share[right] = share.get(right, 0.0) + (centre - left)
        taps.append(share)
    return taps


def upsample(maps: Tensor, size: tuple[int, int]) -> Tensor:
    result = []
    for grid in maps.tolist():
        down = _bilinear_taps(size[0], len(grid))
        across = _bilinear_taps(size[1], len(grid[0]))
        result.append(
            [
                [
                    sum(wy * wx * grid[y][x] for y, wy in ty.items() for x, wx in tx.items())
                    for tx in across
                ]
                for ty in down
            ]
        )
    return _f64(result)


def _axis_matrix(old: int, new: int) -> list[list[float]]:
    """(new, old): shared length of cells where the axis shrinks; where it grows, for each old cell

    the integral over each new one of what linear interpolation between the centres gives it.
    """
    matrix = [[0.0] * old for _ in range(new)]
    if new <= old:
        for i in range(new):
            for j in range(old):
                # In units of 1 / (old * new): new cell i is [i*old, (i+1)*old), old cell j is
                # [j*new, (j+1)*new): whole numbers, no rounding.
                shared = min((i + 1) * old, (j + 1) * new) - max(i * old, j * new)
                matrix[i][j] = float(max(shared, 0))
    else:
        half = Fraction(1, 2)
        knots = [*(Fraction(i * old, new) for i in range(new + 1)), *(j + half for j in range(old))]
        knots = sorted(set(knots))
        for start, end in itertools.pairwise(knots):  # linear in between: the midpoint's value
            middle = (start + end) / 2
            x = min(max(middle - half, Fraction(0)), Fraction(old - 1))
            i, j = int(middle * new / old), int(x)
            matrix[i][j] += float((end - start) * (1 - (x - j)))
            if x > j:
                matrix[i][j + 1] += float((end - start) * (x - j))
    sums = [sum(matrix[i][j] for i in range(new)) for j in range(old)]
    return [[matrix[i][j] / sums[j] for j in range(old)] for i in range(new)]


def resize_attributions(
    attributions: Tensor, size: tuple[int, int], preserve: str = "mass"
) -> Tensor:
    n, c, h, w = attributions.shape
    if preserve == "density":
        return upsample(attributions.flatten(0, 1), size).reshape(n, c, *size)
    down = _axis_matrix(h, size[0])
    across = _axis_matrix(w, size[1])
    result = torch.zeros(n, c, *size, dtype=torch.float64)
    for i in range(n):
        for j in range(c):
            grid = attributions[i, j].tolist()
            for y in range(size[0]):
                for x in range(size[1]):
                    result[i, j, y, x] = math.fsum(
                        down[y][v] * across[x][u] * grid[v][u]
                        for v in range(h)
                        if down[y][v]
                        for u in range(w)
                    )
    return result


# --- views ------------------------------------------------------------------------------------

Exact = tuple[Fraction, Fraction, Fraction, Fraction]


def exact_box(box: tuple[float, float, float, float]) -> Exact:
    """The ratios of small whole numbers that a box's floats were rounded from."""
    left, upper, right, lower = (Fraction(edge).limit_denominator(1000) for edge in box)
    return left, upper, right, lower


def _shared(start: Fraction, end: Fraction, low: Fraction, high: Fraction) -> Fraction:
    return max(min(end, high) - max(start, low), Fraction(0))


def join_windows(maps: list[Tensor], boxes: list, size: tuple[int, int]) -> Tensor:
    """Maps (rows, cols) of windows: every cell's rectangle against every frame cell's, exactly."""
    result = []
    for y in range(size[0]):
        line = []
        for x in range(size[1]):
            total, covered = 0.0, Fraction(0)
            for window, box in zip(maps, boxes, strict=True):
                left, upper, right, lower = exact_box(box)
                rows, cols = window.shape
                for v in range(rows):
                    high = _shared(
                        upper + (lower - upper) * v / rows,
                        upper + (lower - upper) * (v + 1) / rows,
                        Fraction(y, size[0]),
                        Fraction(y + 1, size[0]),
                    )
                    for u in range(cols):
                        area = high * _shared(
                            left + (right - left) * u / cols,
                            left + (right - left) * (u + 1) / cols,
                            Fraction(x, size[1]),
                            Fraction(x + 1, size[1]),
                        )
                        total += float(area) * float(window[v, u])
                        covered += area
            line.append(total / float(covered) if covered else 0.0)
        result.append(line)
    return _f64(result)


def resample_cells(cells: Tensor, box, size: tuple[int, int]) -> Tensor:
    return join_windows([cells], [box], size)


def merge_views(views: list[Tensor], boxes: list, size: tuple[int, int]) -> Tensor:
    placed = [
        resample_cells(cells, box, size).tolist() for cells, box in zip(views, boxes, strict=True)
    ]
    return _f64(
        [
            [statistics.fmean(view[y][x] for view in placed) for x in range(size[1])]
            for y in range(size[0])
        ]
    )


def window_boxes(cells: tuple[int, int], enlarged: tuple[int, int], n: int) -> list[Exact]:
    """Whole cells nearest to evenly spaced places, row by row."""
    boxes = []
    for i in range(n):
        for j in range(n):
            top = round(Fraction(i * (enlarged[0] - cells[0]), max(n - 1, 1)))
            left = round(Fraction(j * (enlarged[1] - cells[1]), max(n - 1, 1)))
            boxes.append(
                (
                    Fraction(left, enlarged[1]),
                    Fraction(top, enlarged[0]),
                    Fraction(left + cells[1], enlarged[1]),
                    Fraction(top + cells[0], enlarged[0]),
                )
            )
    return boxes


# --- pixels -----------------------------------------------------------------------------------


def join_tiles(tiles: Tensor, layout: tuple[int, int]) -> Tensor:
    """Pixel by pixel: which tile it lies in, and where there."""
    _, channels, h, w = tiles.shape
    picture = torch.zeros(channels, layout[0] * h, layout[1] * w, dtype=tiles.dtype)
    for y in range(layout[0] * h):
        for x in range(layout[1] * w):
            picture[:, y, x] = tiles[(y // h) * layout[1] + x // w, :, y % h, x % w]
    return picture


def shrink(picture: Tensor, size: tuple[int, int]) -> Tensor:
    """Mean of the whole pixels under each new pixel, any part of a pixel counting as whole."""
    channels, h, w = picture.shape
    small = torch.zeros(channels, *size, dtype=torch.float64)
    for y in range(size[0]):
        for x in range(size[1]):
            rows = slice(y * h // size[0], math.ceil((y + 1) * h / size[0]))
            cols = slice(x * w // size[1], math.ceil((x + 1) * w / size[1]))
            small[:, y, x] = picture[:, rows, cols].double().mean((1, 2))
    return small


def layout_error(tiles: Tensor, overview: Tensor, layout: tuple[int, int]) -> float:
    small = shrink(join_tiles(tiles, layout), (overview.shape[1], overview.shape[2]))
    return statistics.fmean((a - b) ** 2 for a, b in zip(
        small.flatten().tolist(), overview.double().flatten().tolist(), strict=True
    ))  # fmt: skip


def frames_to_patches(frames: Tensor, patch: int, temporal: int, merge: int) -> Tensor:
    """Row by row: step, block down, block across, patch down and across in the block."""
    count, channels, height, width = frames.shape
    side = patch * merge
    rows = []
    for step in range(count // temporal):
        for top in range(0, height, side):
            for left in range(0, width, side):
                for y in range(top, top + side, patch):
                    for x in range(left, left + side, patch):
                        row = []
                        for c in range(channels):
                            for t in range(step * temporal, (step + 1) * temporal):
                                row += frames[t, c, y : y + patch, x : x + patch].flatten().tolist()
                        rows.append(row)
    return _f64(rows)


# ---- segments of a picture ---------------------------------------------------------------------


def grid_mask(size: tuple[int, int], rows: int, cols: int) -> torch.Tensor:
    mask = torch.zeros(size, dtype=torch.int64)
    for y in range(size[0]):
        for x in range(size[1]):
            mask[y, x] = (y * rows // size[0]) * cols + x * cols // size[1]
    return mask


def rank_mask(values: torch.Tensor, segments: int) -> torch.Tensor:
    """A pixel's band by how many pixels come before it: higher ones, and equal ones above it."""
    flat = values.flatten().tolist()
    bands = [
        sum(w > v or (w == v and j < i) for j, w in enumerate(flat)) * segments // len(flat)
        for i, v in enumerate(flat)
    ]
    return torch.tensor(bands).reshape(values.shape)


# --- calibration and scales --------------------------------------------------------------------


def calibrate(maps: Tensor, tau: float | str) -> Tensor:
    """Each value by its distance from the peak, in population standard deviations of its map.

    "adaptive": in the peak's height above the mean, of which .4 are a fall to 1/e. The lowest
    value falls to exp(-60) at the most.
    """
    rows = []
    for row in maps.tolist():
        peak = max(row)
        if tau == "adaptive":
            unit = 0.4 * (peak - statistics.fmean(row))
        else:
            unit = tau * statistics.pstdev(row)
        unit = max(unit, (peak - min(row)) / 60)
        rows.append([peak * math.exp((v - peak) / unit) if unit else v for v in row])
    return _f64(rows)


def match_levels(maps: Tensor, base: Tensor, how: str) -> Tensor:
    """Times the base's level over the map's own."""
    level = {"none": lambda _: 1.0, "max": max, "std": statistics.pstdev}[how]
    rows = []
    for row, other in zip(maps.tolist(), base.tolist(), strict=True):
        own = level(row)
        rows.append([v * level(other) / own if own else v for v in row])
    return _f64(rows)


def rank_correlation(a: Tensor, b: Tensor) -> Tensor:
    """Pearson's correlation of ranks; equal values share the mean of their places."""

    def ranks(row: list[float]) -> list[float]:
        return [
            statistics.mean(i for i, other in enumerate(sorted(row)) if other == v) for v in row
        ]

    def one(x: list[float], y: list[float]) -> float:
        rx, ry = ranks(x), ranks(y)
        mx, my = statistics.mean(rx), statistics.mean(ry)
        cov = math.fsum((p - mx) * (q - my) for p, q in zip(rx, ry, strict=True))
        size = math.sqrt(
            math.fsum((p - mx) ** 2 for p in rx) * math.fsum((q - my) ** 2 for q in ry)
        )
        return cov / size if size else 0.0

    return _f64([one(x, y) for x, y in zip(a.tolist(), b.tolist(), strict=True)])


def log_odds(logits: list[float], token: int) -> float:
    """log p - log(1 - p) in decimals of 400 digits."""
    with localcontext() as context:
        context.prec = 400
        powers = [Decimal(value).exp() for value in logits]
        p = powers[token] / sum(powers)
        return float((p / (1 - p)).ln())


def subset_correlation(values: list[float], subsets: list[list[int]], outputs: list[float]):
    """Spearman's correlation of exact sums over subsets with outputs."""
    sums = [float(sum((Fraction(values[i]) for i in subset), Fraction(0))) for subset in subsets]
    return float(rank_correlation(torch.tensor([sums]).double(), torch.tensor([outputs]))[0])


# --- direct logit attribution -----------------------------------------------------------------


def attention_row(
    query: list[float],
    keys: list[list[float]],
    scaling: float,
    visible: list[bool],
    bias: list[float],
    softcap: float | None,
    sink: float | None,
) -> list[float]:
    """Attention weights of one query of one head."""
    powers = []
    for key, seen, more in zip(keys, visible, bias, strict=True):
        score = scaling * dot(query, key)
        if softcap is not None:
            score = softcap * math.tanh(score / softcap)
        powers.append(math.exp(score + more) if seen else 0.0)
    total = math.fsum(powers) + (0.0 if sink is None else math.exp(sink))
    return [power / total for power in powers]


def product_of_experts(
    lens: list[float], direct: list[float], beta: float, floor: float = 0.01
) -> list[float]:
    """One map: z-scores of the lens and of the log of the direct attribution, stretched."""

    def z(values: list[float]) -> list[float]:
        mean, std = statistics.fmean(values), statistics.pstdev(values)
        return [(x - mean) / std for x in values]

    peak = max(direct)
    logs = [math.log(x / peak + floor) for x in direct]
    both = [a + beta * b for a, b in zip(z(lens), z(logs), strict=True)]
    low, high = min(both), max(both)
    return [(x - low) / (high - low) * max(lens) for x in both]
