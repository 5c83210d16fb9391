"""What `studies.quality` compares: published and chosen settings, controls, ranges of scales."""

from dataclasses import replace

from studies.choose import RANGES
from studies.evidence import Setting

BLURS = (0.5, 0.75, 1.0)  # standard deviations in cells
KS = (5, 10, 20, 50, 100, 200)
PS = (0.5, 0.7, 0.9, 0.95, 0.98)
COUNTS = (
    (1.0, 2.0),
    (1.0, 1.5, 2.0),
    (1.0, 1.25, 1.5, 2.0),
    (1.0, 1.25, 1.5, 1.75, 2.0),
    (1.0, 1.25, 1.5, 1.75, 2.0, 2.5),
)


def methods(chosen: dict[str, Setting]) -> dict[str, Setting]:
    """Published and chosen settings, and what else as many views could do.

    Args:
        chosen: of "LogitLens", "TAM" and "MSEA+ARC", by `studies.choose`.
    """
    best = chosen["MSEA+ARC"]
    single = replace(best, scales=(1.0,), mirrored=False)
    paper = (1.0, 1.25, 1.5)
    rows = {
        "LogitLens, published": Setting("lens"),
        "TAM, published": Setting("tam", rank_filter=True),
        "MSEA, published": Setting("lens", scales=paper),
        "ARC, published": Setting("arc"),
        "MSEA+ARC, published": Setting("arc", scales=paper),
        "LogitLens, chosen": chosen["LogitLens"],
        "TAM, chosen": chosen["TAM"],
        "ARC, chosen": single,
        "MSEA, chosen": replace(best, method="lens"),
        "MSEA+ARC, chosen": best,
        "chosen, equal weights": replace(best, scale_weights="equal"),
        "chosen, scales alone": replace(best, mirrored=False),
        "chosen, mirrored alone": replace(single, mirrored=True),
        "chosen, 9 half-cell shifts": replace(single, shifted=True),
    }
    return rows | {
        f"chosen, single scale blurred by {sigma:g} cells": replace(single, smoothing=sigma)
        for sigma in BLURS
    }


def ranges(chosen: dict[str, Setting]) -> dict[str, Setting]:
    """Every range of scales with equal and adaptive weights, and a single scale."""
    best = chosen["MSEA+ARC"]
    rows = {"single": replace(best, scales=(1.0,), mirrored=False)}
    for mirrored in (False, True):
        for weights in ("equal", "adaptive"):
            for option in RANGES:
                name = f"{'/'.join(f'{s:g}' for s in option['scales'])}, {weights}"
                rows[name + (", mirrored" if mirrored else "")] = replace(
                    best, mirrored=mirrored, scale_weights=weights, **option
                )
    return rows


def sensitivity(chosen: dict[str, Setting]) -> dict[str, Setting]:
    """Depth and persistence of the rankings, number of scales; alpha unbounded where they matter.

    The chosen bound leaves so little to subtract that nothing would be seen.
    """
    best = chosen["MSEA+ARC"]
    free = replace(best, alpha_max=None)
    rows = {f"k {k}": replace(free, top_k=k) for k in KS}
    rows |= {f"p {p:g}": replace(free, rbo_p=p) for p in PS}
    return rows | {f"{len(some)} scales": replace(best, scales=some) for some in COUNTS}
