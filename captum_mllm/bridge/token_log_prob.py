"""TokenLogProb: an answer's log-probabilities as a module that captum's methods can explain."""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from typing_extensions import override

from captum_mllm.adapters import find_adapter
from captum_mllm.adapters.hooks import without_gradients
from captum_mllm.adapters.processors import read_preprocessing
from captum_mllm.bridge.canvases import (
    canvas_sizes,
    sample_at_size,
    split_inputs,
    to_canvas,
    to_picture,
)
from captum_mllm.functional import top_k_rankings
from captum_mllm.geometry import ImageGeometry
from captum_mllm.model.forward import evaluating, forward_logits, replaced
from captum_mllm.model.generation import generate_answer
from captum_mllm.model.inputs import Sample, append_answer, read_sample
from captum_mllm.model.targets import Explain, explained_columns, read_target, text_positions
from captum_mllm.words import token_labels, tokenizer_of

SCORES = ("log_prob", "logit")


class TokenLogProb(nn.Module):
    r"""Log-probability of an answer's tokens as a function of pixels, token embeddings, or both.

    A plain ``nn.Module`` for ``captum.attr``: pass it to ``IntegratedGradients``,
    ``FeatureAblation``, ``LayerGradCam``... with :attr:`pixels` or :attr:`embeddings` as inputs
    and the token to explain as ``target=``. The answer is teacher-forced. Each call runs one
    forward pass, with as many copies of the sample as captum puts in the batch. Pixels or
    embeddings that are not passed keep their values from ``inputs``.

    Pixels are the *image's canvas* in every family: tiles assembled, Qwen's patches back in place,
    an overview recomputed from its image. Parameters get no gradient, and the model is left
    unchanged.

    Args:
        model: a transformers model of a registered family.
        inputs: the mapping that the processor returns for one sample.
        target: the answer: ids, a string (needs a processor), or None (default) to generate it.
        processor: the model's processor, default None; needed for labels, string targets and the
            geometry of :meth:`to_image`.
        explain: the tokens that are scored: "answer" (default), "prompt", "all", or positions in
            ``input_ids`` followed by the answer. Of the prompt, only the text after the last image
            can be scored.
        score: "log_prob" (default) or "logit", the raw output of the LM head.
        sequence: True gives one score for the sequence, the sum over those tokens; then captum
            needs no ``target``. Default False.
        gen_args: keyword arguments of ``generate`` where ``target`` is None.

    Raises:
        TypeError: an argument of another type.
        ValueError: bad input; the message names the argument and how to fix it.

    Reference:
        Our reading; see docs/captum.md for what works with which family.

    Example:
        >>> from captum.attr import IntegratedGradients
        >>> from captum_mllm import TokenLogProb
        >>> from captum_mllm.reference import load, make_scene, render_pil
        >>> model, processor = load()
        >>> picture, _ = render_pil(make_scene(1))
        >>> inputs = processor(images=picture, text="USER: <image>\nwhat is this ? ASSISTANT:",
        ...     return_tensors="pt")
        >>> f = TokenLogProb(model, inputs, "there is a dog", processor)
        >>> f(f.pixels).shape, f.output_tokens
        (torch.Size([1, 4]), (' there', ' is', ' a', ' dog'))
        >>> attr = IntegratedGradients(f).attribute(f.pixels, target=3, n_steps=2)
        >>> f.to_image(attr, picture).shape == (1, picture.height, picture.width)
        True
        >>> words = IntegratedGradients(f).attribute(f.embeddings, target=3, n_steps=2).sum(-1)
        >>> words.shape[1] == len(f.input_tokens)
        True
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: Mapping[str, Any],
        target: Any = None,
        processor: Any = None,
        *,
        explain: Explain = "answer",
        score: str = "log_prob",
        sequence: bool = False,
        gen_args: Mapping[str, Any] | None = None,
    ) -> None:
        if score not in SCORES:
            raise ValueError(f"score must be one of {', '.join(SCORES)}, got {score!r}.")
        adapter, tokenizer = find_adapter(model), tokenizer_of(processor)
        sample = read_sample(inputs, adapter)
        if target is None:
            with evaluating(adapter):
                answer = generate_answer(sample, adapter, gen_args)
        else:
            answer = read_target(target, sample, adapter, tokenizer)
        text = text_positions(sample, len(answer), adapter, tokenizer, "after_image")
        rows = text[explained_columns(explain, text, sample, adapter)]
        full = append_answer(sample, answer, adapter)
        super().__init__()
        self._ids, self._rows = full["input_ids"][0], rows
        self._answer, self._tokenizer = answer, tokenizer
        self.model, self._adapter, self._processor = model, adapter, processor
        self.score, self.sequence = score, bool(sequence)
        self._sample = Sample(
            full, sample.grids, sample.image_positions, sample.prefix_length, sample.padding
        )
        self._canvases = adapter.canvases(full, sample.grids)
        self._sizes = canvas_sizes(adapter, self._sample)
        views = [adapter.views(grid) for grid in sample.grids]
        self._layers = nn.ModuleList(nn.ModuleList(nn.Identity() for _ in each) for each in views)
        self._text_layer = nn.Identity()
        self._embeddings: Tensor | None = None

    # ---- the tokens ---------------------------------------------------------------------------

    @property
    def positions(self) -> Int64[Tensor, " targets"]:
        """(targets,): positions of the scored tokens in ``input_ids`` without padding + answer."""
        return self._rows.clone()

    @property
    def output_ids(self) -> Int64[Tensor, " targets"]:
        """(targets,): ids of the scored tokens, the columns of what a call returns."""
        return self._ids[self._rows]

    @property
    def answer_ids(self) -> Int64[Tensor, " answer"]:
        """(answer,): ids of the whole answer."""
        return self._answer.clone()

    @property
    def output_tokens(self) -> tuple[str, ...]:
        """Labels of the scored tokens."""
        labels = self.input_tokens  # a label depends on the tokens before it
        return tuple(labels[row] for row in self._rows.tolist())

    @property
    def input_tokens(self) -> tuple[str, ...]:
        """Labels of all tokens, prompt (without padding) and answer: one per embedding."""
        return token_labels(self._ids.tolist(), self._tokenizer)

    # ---- inputs and layers for captum ---------------------------------------------------------

    @property
    def pixels(self) -> Tensor | tuple[Tensor, ...]:
        """The image's canvas, (1, channels, height, width); a tuple if there are several images.

        A video's is (1, frames, channels, height, width). LLaVA-NeXT's holds the whole picture,
        padded to the tiles; those of other families hold the image as the model saw it.
        """
        canvases = tuple(canvas.detach().clone() for canvas in self._canvases)
        return canvases[0] if len(canvases) == 1 else canvases

    @property
    def embeddings(self) -> Float[Tensor, "1 tokens width"]:
        """Token embeddings of prompt and answer, (1, tokens, width).

        Image features replace the placeholders afterwards, so that placeholders have no influence.
        A token of the answer influences those after it.
        """
        if self._embeddings is None:
            captured: list[Tensor] = []

            def capture(embeddings: Tensor) -> Tensor:
                captured.append(embeddings.detach())
                return embeddings

            with without_gradients():
                self._logits(self._sample, (), 1, on_embeddings=capture)
            self._embeddings = captured[0]
        return self._embeddings.clone()

    def layer(self, image: int = 0, view: int = 0) -> nn.Module:
        """A layer for captum's layer methods: an image's features at the language model's input.

        Its output is (batch, width, rows, cols), one value per cell of the image: what
        ``LayerGradCam`` and ``LayerIntegratedGradients`` take as a convolution's. (Qwen3-VL adds
        further image features after its first layers; those are not included.)

        Args:
            image: which image, default the first.
            view: 0 (default) the image's grid; 1 its overview (thumbnail, global or base
                image), where it has one.

        Returns:
            The module, for ``LayerGradCam(f, f.layer())`` and similar methods.

        Raises:
            IndexError: no such image or view.
        """
        if not 0 <= image < len(self._layers):
            raise IndexError(f"image {image} is out of range: there are {len(self._layers)}.")
        views: Any = self._layers[image]
        if not 0 <= view < len(views):
            raise IndexError(f"view {view} is out of range: image {image} has {len(views)}.")
        return views[view]

    def text_layer(self) -> nn.Module:
        """A layer for captum's layer methods: all tokens' embeddings, (batch, width, tokens).

        Its values are those of :attr:`embeddings` with tokens last, as in a 1D convolution.
        """
        return self._text_layer

    # ---- the function -------------------------------------------------------------------------

    @override
    def forward(self, *inputs: Tensor) -> Tensor:
        """Scores of the tokens, differentiable in the inputs.

        Args:
            inputs: canvases as :attr:`pixels` gives them (all images or none), and/or embeddings
                (batch, tokens, width) as :attr:`embeddings`; with a leading batch axis of any
                length. Canvases may have another size (the same factor for all): they are resized
                to the nearest size that the model accepts.

        Returns:
            (batch, targets), or (batch,) with ``sequence=True``; float64 for a float64 model,
            float32 otherwise.

        Raises:
            TypeError: an input is not a tensor.
            ValueError: shapes that fit neither canvases nor embeddings.
        """
        canvases, embeddings = split_inputs(inputs, self._canvases, len(self._ids))
        n = len(inputs[0]) if inputs else 1
        sample, canvases = sample_at_size(self._adapter, self._sample, canvases, self._sizes)
        if embeddings is not None and sample is not self._sample:
            raise ValueError(
                "inputs hold embeddings together with canvases of another size, which gives "
                "another number of image tokens: pass one of the two."
            )

        def through_text_layer(current: Tensor) -> Tensor:
            new = current if embeddings is None else replaced(current, embeddings)
            return self._text_layer(new.transpose(1, 2)).transpose(1, 2)

        logits = self._logits(sample, canvases, n, on_embeddings=through_text_layer)
        if self.score == "log_prob":
            logits = logits.log_softmax(-1)
        scores = logits[..., range(len(self._rows)), self.output_ids.to(logits.device)]
        return scores.sum(-1) if self.sequence else scores

    def rankings(self, top_k: int = 50) -> Int64[Tensor, "tokens k"]:
        """Top-k ids of the prediction of each token, as ``denoise`` needs them.

        ``RankCorrelationDenoiser(None).denoise(token_attr, r, target_rankings=r[f.positions])``
        with ``r = f.rankings()`` takes attributions of all tokens; restrict ``r`` to the prompt for
        attributions of the prompt alone.

        Args:
            top_k: depth, default 50.

        Returns:
            (tokens, k): prompt and answer. The first token has no prediction: its row holds
            negative numbers, which agree with no other row.

        Raises:
            ValueError: ``top_k`` out of range; a prefix LM, whose prompt is not predicted.
        """
        if self._adapter.bidirectional_prompt:
            raise ValueError(
                "model: its prompt attends to itself in both directions (prefix LM), so that none "
                "of its tokens is predicted from those before it and there are no rankings."
            )
        rows = torch.arange(1, len(self._ids), device=self._ids.device)
        with without_gradients():
            logits = forward_logits(self._adapter, self._sample, (), 1, rows - 1)[0]
        rankings = top_k_rankings(logits, top_k)
        return torch.cat([-1 - torch.arange(top_k, device=rankings.device)[None], rankings])

    # ---- back to the picture ------------------------------------------------------------------

    def to_image(
        self,
        attribution: Float[Tensor, "n c h w"],
        size: Any,
        image: int = 0,
        *,
        geometry: ImageGeometry | None = None,
    ) -> Float[Tensor, "n height width"]:
        """An attribution of a canvas, or of :meth:`layer`'s cells, in pixels of the user's picture.

        Args:
            attribution: (n, channels, height, width), as captum gives it for :attr:`pixels` or for
                :meth:`layer`; channels are summed.
            size: (height, width) of the original picture, or the PIL picture itself.
            image: which image, default the first.
            geometry: the box of the picture that the model saw; needed without a processor.

        Returns:
            (n, height, width): values as in the attribution, 0 in parts that the model did not see.

        Raises:
            ValueError: neither a processor nor ``geometry`` determines the place of the canvas.
            IndexError: no such image.
        """
        self.layer(image)  # raises on an image that is not there
        rule = None
        if self._processor is not None and self._sample.grids[image].box is None:
            rule = read_preprocessing(self._processor)
        return to_picture(attribution, self._sample.grids[image], size, rule, geometry)

    def from_maps(
        self, maps: Float[Tensor, "targets rows cols"], image: int = 0
    ) -> Float[Tensor, "targets channels height width"]:
        """Maps on the model's grid as attributions of :attr:`pixels`; their sum is preserved.

        So ``captum.metrics`` can measure a result's maps (``result.grid_attr[image]``).

        Args:
            maps: one map per token.
            image: which image, default the first.

        Returns:
            (targets, channels, height, width): each cell's value divided among its pixels and
            channels.

        Raises:
            IndexError: no such image.
        """
        self.layer(image)
        return to_canvas(maps, self._sample.grids[image], self._canvases[image])

    def _logits(
        self, sample: Sample, canvases: tuple[Tensor, ...], n: int, **options: Any
    ) -> Tensor:
        """Logits (n, targets, vocabulary) of one forward, from which the tokens are predicted."""
        # Scored tokens follow the last image, whose number of tokens may have changed.
        grown = sample.kwargs["input_ids"].shape[1] - len(self._ids)
        before = self._rows + grown - 1
        layers: Any = self._layers
        return forward_logits(self._adapter, sample, canvases, n, before, layers=layers, **options)
