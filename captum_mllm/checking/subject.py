"""The model under check with its picture and prompt: what several lines need, made once."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import wraps
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from captum_mllm.adapters import Adapter, find_adapter
from captum_mllm.attr import LogitLens
from captum_mllm.model.discovery import discover
from captum_mllm.model.forward import evaluating
from captum_mllm.model.generation import generated_steps
from captum_mllm.model.inputs import Sample, read_sample
from captum_mllm.model.loading import prepare_inputs
from captum_mllm.model.runner import Run, Runner

if TYPE_CHECKING:
    from PIL.Image import Image


class NotTriedError(Exception):
    """A line can't be tried.

    Args:
        found: why.
        advice: what to do, default "".
    """

    def __init__(self, found: str, advice: str = "") -> None:
        super().__init__(found)
        self.advice = advice


def _once(line: str) -> Callable[[Callable[["Subject"], Any]], Any]:
    """A property computed once; where that fails, only its own line says why.

    Args:
        line: name of the line that reports the error; the other lines are not tried.
    """

    def decorate(make: Callable[["Subject"], Any]) -> Any:
        @wraps(make)
        def get(self: "Subject") -> Any:
            name = make.__name__
            if name not in self.made:
                try:
                    self.made[name] = make(self), None
                except Exception as error:
                    self.made[name] = None, error
            value, error = self.made[name]
            if error is None:
                return value
            if self.line == line or isinstance(error, NotTriedError):
                raise error
            raise NotTriedError(f"Needs what the line {line!r} could not get.", f"Mend {line!r}.")

        return property(get)

    return decorate


@dataclass(eq=False)
class Subject:
    """A model to check.

    Args:
        model: the user's model.
        processor: its processor.
        picture: the picture.
        other: another picture of the same size.
        prompt: the user's text.
        given: whether picture and prompt are the user's own.
        max_new_tokens: length of the answer at most.
        line: name of the line that is being checked.
        made: what was made so far, by the property's name, or why it could not be.
        pictures: drawings for the page: caption -> picture.
    """

    model: nn.Module
    processor: Any
    picture: "Image"
    other: "Image"
    prompt: str
    given: bool
    max_new_tokens: int = 24
    line: str = ""
    made: dict[str, Any] = field(default_factory=dict)
    pictures: dict[str, "Image"] = field(default_factory=dict)

    @_once("class")
    def adapter(self) -> Adapter:
        """The model's adapter."""
        try:
            return find_adapter(self.model)
        except (AttributeError, TypeError) as error:
            raise ValueError(
                f"the adapter registered for {type(self.model).__name__} does not fit it: {error}"
            ) from error

    @_once("inputs")
    def inputs(self) -> dict[str, Tensor]:
        """What the processor makes of picture and prompt, on the model's device."""
        return self.encode(self.picture)

    @_once("image tokens")
    def sample(self) -> Sample:
        """The inputs, read and checked: where each image's tokens are."""
        discover(self.adapter, self.processor, self.inputs, self.picture)
        return read_sample(self.inputs, self.adapter)

    @_once("teacher forcing")
    def steps(self) -> tuple[Int64[Tensor, " answer"], Float[Tensor, "answer vocabulary"]]:
        """The model's greedy answer, and the logits of each step of ``generate``."""
        with evaluating(self.adapter):
            settings = {"max_new_tokens": self.max_new_tokens}
            return generated_steps(self.sample, self.adapter, settings)

    @property
    def answer(self) -> Int64[Tensor, " answer"]:
        """Ids of the model's greedy answer."""
        return self.steps[0]

    @property
    def runner(self) -> Runner:
        """What runs the model for the attributors."""
        return LogitLens(self.model, self.processor).runner

    @_once("lens")
    def run(self) -> Run:
        """Prompt and answer, and the lens's maps at the model's own scale."""
        return self.run_of(self.picture)

    def run_of(self, picture: "Image") -> Run:
        """One forward over the prompt with a picture and the answer, at the model's own scale.

        Args:
            picture: a PIL picture.
        """
        inputs = self.inputs if picture is self.picture else self.encode(picture)
        return self.runner.run(inputs, self.answer, images=picture)

    def text(self, ids: Int64[Tensor, " tokens"], *, whole: bool = False) -> str:
        """Tokens as text.

        Args:
            ids: token ids.
            whole: whether more than 60 characters are shown, default False.
        """
        tokenizer = self.runner.tokenizer
        text = str(ids.tolist()) if tokenizer is None else tokenizer.decode(ids.tolist())
        return text if whole or len(text) <= 60 else text[:57] + "..."

    def encode(self, picture: "Image") -> dict[str, Tensor]:
        """What the processor makes of another picture and the same prompt.

        Args:
            picture: a PIL picture.
        """
        made = prepare_inputs(self.processor, [picture], self.prompt)[0]
        dtype = getattr(self.model, "dtype", torch.float32)
        device = self.adapter.device
        return {
            name: value.to(device, dtype) if value.is_floating_point() else value.to(device)
            for name, value in made.items()
            if isinstance(value, Tensor) and name != "labels"  # for training
        }

    def lens_maps(
        self, model: nn.Module, picture: "Image | None" = None
    ) -> Float[Tensor, "targets cells"]:
        """Raw maps of the lens for the answer's tokens, flat.

        Args:
            model: the model under check, or one that is to be compared with it.
            picture: another picture; None (default) for the picture.
        """
        inputs = self.inputs if picture is None else self.encode(picture)
        result = LogitLens(model, self.processor).attribute(
            inputs, self.answer, images=picture or self.picture
        )
        return result.grid_attr[0].flatten(1)
