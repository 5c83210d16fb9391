"""What post-processors share: raw logits of an inner attribution made into maps in [0, 1]."""

from collections.abc import Mapping
from math import inf
from typing import Any, Unpack

from captum.attr import Attribution
from jaxtyping import Float
from torch import Tensor
from typing_extensions import override

from captum_mllm.attr.base import TokenAttribution
from captum_mllm.functional import calibrate, upsample
from captum_mllm.functional.calibration import Calibration
from captum_mllm.model.runner import Runner, RunOptions
from captum_mllm.model.trace import TokenTrace
from captum_mllm.validation import check_choice, check_number


class PostProcessor(TokenAttribution):
    """Turns the logits of an inner attribution into jointly normalised maps in [0, 1].

    The inner attribution traces the evidence; a subclass computes the result from the trace and
    ends with :meth:`finish`, the last steps, which are the same for every method that is compared.

    Args:
        attribution_method: the inner attribution.
        upsampling: whole number in 1 .. 64: the maps' grid is made this many times finer
            (bilinear), default 1.
        calibration: tau of :func:`~captum_mllm.functional.calibrate`, above 0 or "adaptive", or
            None (default) for none. It comes last, on the finer grid, where it leaves the ranking
            of pixels alone.

    Raises:
        TypeError: ``upsampling`` or ``calibration`` is not a number.
        ValueError: ``upsampling`` or ``calibration`` is out of range.
    """

    def __init__(
        self,
        attribution_method: Attribution | None,
        *,
        upsampling: int = 1,
        calibration: Calibration | None = None,
    ) -> None:
        super().__init__(getattr(attribution_method, "forward_func", None))  # type: ignore[arg-type]
        self.attribution_method = attribution_method
        check_number("upsampling", upsampling, "in 1 .. 64", lambda n: n in range(1, 65))
        if isinstance(calibration, str):
            check_choice("calibration", calibration, ("adaptive",))
        elif calibration is not None:
            check_number("calibration", calibration, "in 0 .. inf", lambda tau: 0 < tau < inf)
        self.upsampling = int(upsampling)
        self.calibration: Calibration | None = calibration

    @property
    def base(self) -> TokenAttribution:
        """The inner attribution, which must trace tokens.

        Raises:
            TypeError: it does not trace tokens.
        """
        if isinstance(self.attribution_method, TokenAttribution):
            return self.attribution_method
        raise TypeError(
            f"attribution_method is {type(self.attribution_method).__name__}, which does not "
            f"trace tokens: attribute needs LogitLens(model) or MSEA(model) inside. For "
            f"attributions computed elsewhere use denoise(...)."
        )

    @property
    @override
    def gives_logits(self) -> bool:
        return False

    @property
    @override
    def runner(self) -> Runner:
        return self.base.runner

    @override
    def trace(
        self,
        inputs: Mapping[str, Any],
        target: Any = None,
        *,
        top_k: int | None = None,
        **options: Unpack[RunOptions],
    ) -> TokenTrace:
        depth = self.ranking_depth if top_k is None else top_k
        return self.base.trace(inputs, target, top_k=depth, **options)

    def finish(
        self, maps: tuple[Float[Tensor, "targets ..."], ...]
    ) -> tuple[Float[Tensor, "targets ..."], ...]:
        """The last steps: a finer grid, then calibration over the cells of all images.

        Args:
            maps: per image (targets, rows, cols), per video (targets, steps, rows, cols), in
                [0, 1].

        Returns:
            The maps on the finer grid, in [0, 1].
        """
        n = self.upsampling
        if n > 1:
            maps = tuple(upsample(m, (n * m.shape[-2], n * m.shape[-1])) for m in maps)
        if self.calibration is None:
            return maps
        cells = calibrate(TokenTrace.pack_cells(maps), self.calibration)
        return TokenTrace.unpack_like(cells, maps)
