"""The adapter contract: everything that differs between families of models, and nothing else."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from captum_mllm.geometry import ImageGrid


class Adapter(ABC):
    """What one family needs so that every method works on it.

    A subclass declares where the modules are and how image tokens lie on the grid; it holds no
    method. All tensors it gets are those of *one* sample, on the model's device, without padding.

    Args:
        model: the user's model; never changed, hooks are only set while we run.
    """

    token_wise: ClassVar[tuple[str, ...]] = (
        "input_ids",
        "attention_mask",
        "token_type_ids",
        "mm_token_type_ids",
    )
    """Inputs with one entry per token, in step with ``input_ids``."""

    suffix_fill: ClassVar[Mapping[str, int]] = {
        "attention_mask": 1,
        "token_type_ids": 0,
        "mm_token_type_ids": 0,
    }
    """Value of each token-wise input at appended (answer) tokens."""

    def __init__(self, model: nn.Module) -> None:
        self.model: Any = model
        self.config: Any = model.config

    # ---- modules ----------------------------------------------------------------------------

    @property
    @abstractmethod
    def tower(self) -> nn.Module:
        """The vision encoder."""

    @property
    def decoder(self) -> nn.Module:
        """The language model without its head."""
        return self.model.get_decoder()

    @property
    def final_norm(self) -> nn.Module:
        """The norm before the LM head."""
        return self.decoder.norm  # type: ignore[return-value]

    @property
    def layers(self) -> Sequence[nn.Module]:
        """The language model's layers."""
        return self.decoder.layers  # type: ignore[return-value]

    @property
    def head(self) -> nn.Module:
        """The LM head."""
        return self.model.get_output_embeddings()

    @property
    def head_weight(self) -> Float[Tensor, "vocabulary dim"]:
        """The LM head's matrix.

        Raises:
            ValueError: the head has no plain matrix (a wrapper, packed or offloaded weights).
        """
        weight: Any = getattr(self.head, "weight", None)
        plain = isinstance(weight, Tensor) and weight.ndim == 2 and weight.is_floating_point()
        if not plain or weight.is_meta:
            raise ValueError(
                f"model: its LM head ({type(self.head).__name__}) is not the plain linear map "
                f"W h + b that the logit lens assumes: it has no matrix of floats as its weight "
                f"(a wrapper, quantised or offloaded weights?). Unwrap it, or register an adapter "
                f"whose head_weight and class_weights tell the true map."
            )
        return weight.detach()

    @property
    def vocabulary(self) -> int:
        """Number of ids that the LM head scores."""
        return int(self.head_weight.shape[0])

    def class_weights(
        self, ids: Int64[Tensor, " classes"] | slice
    ) -> tuple[Float[Tensor, "classes dim"], Float[Tensor, " classes"] | None]:
        """Rows of the LM head, and its bias there, for the given ids.

        Args:
            ids: token ids, or a slice of the vocabulary.
        """
        bias: Any = getattr(self.head, "bias", None)
        return self.head_weight[ids], None if bias is None else bias.detach()[ids]

    # ---- tokens -----------------------------------------------------------------------------

    @property
    def visual_ids(self) -> tuple[int, ...]:
        """Ids of image and video placeholders: never generated, never a target."""
        names = ("image_token_id", "video_token_id")
        ids = (getattr(self.config, name, None) for name in names)
        return tuple(int(i) for i in ids if i is not None)

    @property
    def special_ids(self) -> frozenset[int]:
        """Ids that are no text, as far as the model's configs tell (bos, eos, pad, visual)."""
        found: set[int] = set(self.visual_ids)
        configs = (self.config, self.config.get_text_config(), self.model.generation_config)
        for config in configs:
            for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
                value = getattr(config, name, None)
                found.update([value] if isinstance(value, int) else value or [])
        return frozenset(found)

    # ---- geometry ---------------------------------------------------------------------------

    @abstractmethod
    def grids(self, inputs: Mapping[str, Tensor]) -> tuple[ImageGrid, ...]:
        """Grid and frame of each image.

        Args:
            inputs: the model's inputs of one sample.

        Raises:
            ValueError: pixels of a shape or size that the family can't take.
        """

    @abstractmethod
    def tokens_per_image(self, grid: ImageGrid) -> int:
        """Number of placeholders of an image on that grid, its extra tokens included."""

    @abstractmethod
    def grid_tokens(self, grid: ImageGrid) -> Int64[Tensor, " cells"]:
        """Index of each grid cell, row by row, within the image's own tokens."""

    @abstractmethod
    def scaled_grid(self, grid: ImageGrid, scale: float) -> ImageGrid:
        """The nearest grid that the model accepts for an image rescaled by ``scale``.

        Raises:
            ValueError: the image would be smaller than one patch.
        """

    @abstractmethod
    def rescale_pixels(
        self, inputs: Mapping[str, Tensor], grids: Sequence[ImageGrid]
    ) -> dict[str, Tensor]:
        """The pixel inputs brought to those grids; keys as in ``inputs``."""

    @abstractmethod
    def pixels_from_pictures(
        self, pictures: Sequence[Any], processor: Any, grids: Sequence[ImageGrid]
    ) -> dict[str, Tensor]:
        """The pixel inputs made from the original pictures by the user's image processor."""

    @abstractmethod
    def check_features(self, tower_output: Any, grids: Sequence[ImageGrid]) -> None:
        """Compare the tower's features with the grids.

        Raises:
            ValueError: another number of images or features than the grids say.
        """

    # ---- running ----------------------------------------------------------------------------

    def size_hooks(self) -> AbstractContextManager[None]:
        """Hooks that let the tower take other sizes than its native one; default none."""
        return ExitStack()  # type: ignore[return-value]

    @contextmanager
    def running(self) -> Iterator[None]:
        """Evaluation mode, no gradients, size hooks; everything is put back afterwards."""
        with unchanged(self.model), torch.no_grad(), self.size_hooks():
            self.model.eval()
            yield


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Put back every module's flags (training and others) and forward hooks, whatever happens.

    Not ours alone: transformers sets hooks of its own, and a flag that says so, in the first
    forward that wants hidden states of the tower, and leaves them in the model.

    Args:
        model: the user's model.
    """
    before = [(module, _flags(module), _hook_tables(module)) for module in model.modules()]
    try:
        yield
    finally:
        for module, flags, tables in before:
            for name in _flags(module).keys() - flags.keys():
                delattr(module, name)
            vars(module).update(flags)
            for name, table in tables.items():
                now = vars(module)[name]
                for key in now.keys() - table.keys():
                    del now[key]


def _flags(module: nn.Module) -> dict[str, bool]:
    return {name: value for name, value in vars(module).items() if isinstance(value, bool)}


def _hook_tables(module: nn.Module) -> dict[str, dict[int, Any]]:
    return {
        name: dict(value)
        for name, value in vars(module).items()
        if name.startswith("_forward_") and isinstance(value, dict)
    }
