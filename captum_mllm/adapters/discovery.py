"""What running a model without an adapter has told about it so far, kept in memory."""

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from captum_mllm.adapters.layout import LayoutError, PictureLayout, TokenLayout
from captum_mllm.adapters.painting import Painted, PixelSource
from captum_mllm.geometry import ImageGrid

_REMEMBERED = 8  # samples whose pictures are kept
_DERIVED = 64  # windows, flips and sizes of them, which one call needs


@dataclass(frozen=True, eq=False)
class ModelFacts:
    """What one traced run tells about a model.

    Args:
        final_norm: the module whose output the LM head reads.
        tower: the vision encoder; None where the model names none, and stands for it itself.
        tower_calls: how often it runs in one forward.
        scale: factor on the LM head's output; 1 for most.
        cap: bound of a soft cap, ``cap * tanh(logits / cap)``; None for none.
        bidirectional: whether text of the prompt attends to later text of the prompt.
        whole_prompt: whether the model does not run on a prompt that ends at its last picture.
        answer_type: entry of ``token_type_ids`` at the answer's tokens.
        required: side inputs without which the model silently computes other values, and what
            happens without each.
    """

    final_norm: nn.Module
    tower: nn.Module | None
    tower_calls: int = 1
    scale: float = 1.0
    cap: float | None = None
    bidirectional: bool = False
    whole_prompt: bool = False
    answer_type: int = 0
    required: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        head = "linear LM head"
        if self.scale != 1.0:
            head = f"LM head scaled by {self.scale:.4g}"
        if self.cap is not None:
            head += f", soft-capped at {self.cap:.4g}"
        return head + (", prompt read in both directions" if self.bidirectional else "")


@dataclass(frozen=True, eq=False)
class ShownSample:
    """The pictures behind some inputs.

    Args:
        pictures: PIL pictures.
        source: calls the image processor as it was called for them.
        layout: where their tokens lie.
        painted: what each number of the pixel inputs shows.
    """

    pictures: tuple[Any, ...]
    source: PixelSource
    layout: TokenLayout
    painted: Painted


@dataclass
class Discovery:
    """Everything found about one model so far, in memory.

    Args:
        facts: of the model itself, once a sample has been run.
        layouts: by processor, settings and picture sizes, with what was painted.
        samples: the last few samples, by their pixels.
        derived: the last windows, flips and sizes of their pictures.
        pictures: the layout behind each grid.
        scaled: the grid of a picture resized by a factor, for models of native resolution.
        native: whether a larger picture has more tokens, as far as it was tried.
        lock: held while samples are looked up or kept, by several threads.
    """

    facts: ModelFacts | None = None
    layouts: dict[Any, tuple[TokenLayout, Painted]] = field(default_factory=dict)
    samples: OrderedDict[str, ShownSample] = field(default_factory=OrderedDict)
    derived: OrderedDict[str, ShownSample] = field(default_factory=OrderedDict)
    pictures: dict[ImageGrid, PictureLayout] = field(default_factory=dict)
    scaled: dict[tuple[ImageGrid, float], ImageGrid] = field(default_factory=dict)
    native: bool = False
    lock: Any = field(default_factory=threading.RLock, repr=False)

    def remember(
        self, inputs: Mapping[str, Tensor], sample: ShownSample, *, derived: bool = False
    ) -> None:
        """Keep the pictures behind some inputs; the oldest of too many go.

        Args:
            inputs: the model's inputs.
            sample: what is behind them.
            derived: whether they were made of another sample's pictures, default False.

        Raises:
            LayoutError: a picture with the same grid has another layout in another prompt.
        """
        digest = pixel_digest(inputs, sample.source.keys)
        with self.lock:
            for picture in sample.layout.pictures:
                grid = picture_grid(picture)
                if self.pictures.setdefault(grid, picture) != picture:
                    raise LayoutError(
                        "the tokens of a picture of this size lie otherwise in another prompt; "
                        "explain them with separate copies of the model."
                    )
            kept, most = (self.derived, _DERIVED) if derived else (self.samples, _REMEMBERED)
            kept[digest] = sample
            while len(kept) > most:
                kept.popitem(last=False)

    def find(self, inputs: Mapping[str, Tensor]) -> ShownSample | None:
        """The pictures behind some inputs, if they were seen.

        Args:
            inputs: the model's inputs.
        """
        with self.lock:
            for keys in {sample.source.keys for sample in self.samples.values()}:
                if not all(isinstance(inputs.get(key), Tensor) for key in keys):
                    continue
                digest = pixel_digest(inputs, keys)
                for kept in (self.samples, self.derived):
                    if digest in kept:
                        kept.move_to_end(digest)
                        return kept[digest]
        return None


_FOUND: WeakKeyDictionary[nn.Module, Discovery] = WeakKeyDictionary()


def discovery_of(model: nn.Module) -> Discovery:
    """What was found about a model so far; it is kept as long as the model is.

    Args:
        model: the user's model.
    """
    return _FOUND.setdefault(model, Discovery())


def carry_over(model: nn.Module, copy: nn.Module) -> None:
    """Let a copy of a model know what was found about the model.

    Args:
        model: the model.
        copy: of the same modules, with other weights.
    """
    if (found := _FOUND.get(model)) is None:
        return
    facts = found.facts
    if facts is not None:
        names = {id(module): name for name, module in model.named_modules()}
        norm, tower = (
            None if module is None else copy.get_submodule(names[id(module)])
            for module in (facts.final_norm, facts.tower)
        )
        facts = replace(facts, final_norm=norm, tower=tower)  # type: ignore[arg-type]
    _FOUND[copy] = replace(found, facts=facts)


def pixel_digest(inputs: Mapping[str, Tensor], keys: Sequence[str]) -> str:
    """A digest of the inputs that pictures make, whatever their device and precision.

    Args:
        inputs: the model's inputs.
        keys: names of the inputs that the image processor makes.
    """
    digest = hashlib.blake2b()
    for key in keys:
        value = inputs[key].detach().cpu().contiguous()
        if value.is_floating_point():
            value = value.to(torch.bfloat16).view(torch.int16)
        digest.update(repr((key, tuple(value.shape))).encode())
        digest.update(value.long().numpy().tobytes())
    return digest.hexdigest()


def picture_grid(picture: PictureLayout) -> ImageGrid:
    """The grid of a picture: its largest view, whose box in the picture is known.

    Args:
        picture: the picture's layout.

    Example:
        >>> from captum_mllm.adapters.layout import PictureView
        >>> view = PictureView(((0, 1), (2, 3)), (0.0, 0.0, 40.0, 20.0), 14.0)
        >>> picture_grid(PictureLayout((20, 40), (view,), (4,))).width
        28
    """
    main = picture.views[0]
    (rows, cols), side = main.shape, max(1, round(main.side))
    return ImageGrid(rows, cols, rows * side, cols * side, picture=picture.size, box=main.box)
