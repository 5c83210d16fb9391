"""What happens to jointly normalised maps at the end: filter, finer grid, calibration."""

from dataclasses import dataclass
from math import inf

from jaxtyping import Float
from torch import Tensor

from captum_mllm.functional import calibrate, rank_gaussian_filter, upsample
from captum_mllm.model.trace import TokenTrace
from captum_mllm.validation import check_number


@dataclass(frozen=True)
class Finishing:
    """The last steps, the same for every method that is compared.

    Args:
        rank_filter: apply TAM's rank Gaussian filter, default False.
        upsampling: whole number in 1 .. 64: the maps' grid is made this many times finer
            (bilinear), default 1.
        calibration: tau > 0 of :func:`~captum_mllm.functional.calibrate`, or None (default) for
            none. It comes last, on the finer grid, where it leaves the ranking of pixels alone.

    Raises:
        TypeError: no numbers.
        ValueError: numbers out of range.
    """

    rank_filter: bool = False
    upsampling: int = 1
    calibration: float | None = None

    def __post_init__(self) -> None:
        check_number("upsampling", self.upsampling, "in 1 .. 64", lambda n: n in range(1, 65))
        if self.calibration is not None:
            check_number("calibration", self.calibration, "in 0 .. inf", lambda t: 0 < t < inf)

    def __call__(
        self, maps: tuple[Float[Tensor, "targets ..."], ...]
    ) -> tuple[Float[Tensor, "targets ..."], ...]:
        """Finish the maps of one sample.

        Args:
            maps: per image (targets, rows, cols), per video (targets, steps, rows, cols), in
                [0, 1].

        Returns:
            The same, on the finer grid, in [0, 1].
        """
        if self.rank_filter:
            maps = tuple(rank_gaussian_filter(own) for own in maps)
        n = int(self.upsampling)
        if n > 1:
            maps = tuple(upsample(own, (n * own.shape[-2], n * own.shape[-1])) for own in maps)
        if self.calibration is None:
            return maps
        cells = calibrate(TokenTrace.pack_cells(maps), self.calibration)
        return TokenTrace.unpack_like(cells, maps)
