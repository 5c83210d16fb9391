"""What a benchmark run is asked to do, and what must be the same for it to go on later."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import captum_mllm
from captum_mllm.data.coco import CocoSample
from captum_mllm.data.label_maps import LabelMapDataset
from captum_mllm.methods import METHODS
from captum_mllm.metrics import COCO_NAMES, MASK_METRICS, CategoryTable
from captum_mllm.model.loading import PROMPT

PERTURBATION = (
    "insertion",
    "deletion",
    "difference",
    "difference_sensitive",
    "comprehensiveness",
    "sufficiency",
)
METRICS: tuple[str, ...] = ("obj_iou", "func_iou", "f1_iou", *list(MASK_METRICS)[1:], *PERTURBATION)
"""Names of all metrics of the benchmark, for :class:`Settings`."""

LOWER_IS_BETTER = frozenset({"deletion", "sufficiency"})
# Of what may change between two runs into one folder: no line of samples.jsonl depends on it.
_FREE = frozenset({"methods", "limit", "against", "perturbations_per_eval", "bootstrap_seed"})


@dataclass(frozen=True)
class Settings:
    """What is measured, of what, and how.

    Args:
        methods: names of :data:`captum_mllm.methods.METHODS`.
        metrics: names of :data:`METRICS`. Default: Obj-IoU, Func-IoU and F1-IoU.
        prompt: what the model is asked about every picture, without its chat template.
        answers: "own" (default) explains the model's own greedy answer, as TAM's evaluation does;
            "captions" the picture's first caption, teacher-forced.
        max_new_tokens: longest answer of the model's own, default 128.
        categories: what words may name. "coco": COCO's 80 categories with synonyms; "data": the
            data's names; "picture": each picture's own names, where the data tells them
            (:class:`~captum_mllm.data.label_maps.LabelMapDataset`). "auto" (default): "coco" where
            all of the data's names are COCO's, else "picture" where there are such, else "data".
        parity: reproduce known defects of TAM's evaluation, see
            :func:`captum_mllm.metrics.score_words`. Default: no.
        steps: steps of area of insertion and deletion, default 64.
        baseline: what removed pixels show: "black" (default), "mean" or "blur".
        scored_tokens: of which tokens insertion and its like are taken: "objects" (default: of the
            words that name a category, annotated or not) or "all".
        perturbations_per_eval: changed pictures in one forward, default 1.
        options: per method, options of :func:`captum_mllm.methods.explain`.
        seed: of the methods that draw; the picture's number is added to it. Default: 0.
        limit: number of pictures, from the first; None (default) for all.
        against: the method whose figures are subtracted from the others'; default: the first.
        bootstrap_seed: of the intervals. Default: 0.

    Reference:
        TAM's evaluation explains the model's own answers, of at most 256 tokens, to prompts for
        about one sentence (COCO), two (GranDf) or three (OpenPSG), and takes each GranDf and
        OpenPSG picture's own names; captions rate the answer's text there, which is not done here.

    Raises:
        ValueError: an unknown or repeated name, a number out of range; the message begins with
            the argument's name.

    Example:
        >>> Settings(methods=("lens", "tam")).reference
        'lens'
    """

    methods: tuple[str, ...]
    metrics: tuple[str, ...] = ("obj_iou", "func_iou", "f1_iou")
    prompt: str = PROMPT
    answers: Literal["own", "captions"] = "own"
    max_new_tokens: int = 128
    categories: Literal["auto", "coco", "data", "picture"] = "auto"
    parity: bool = False
    steps: int = 64
    baseline: Literal["black", "mean", "blur"] = "black"
    scored_tokens: Literal["objects", "all"] = "objects"
    perturbations_per_eval: int = 1
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    seed: int = 0
    limit: int | None = None
    against: str | None = None
    bootstrap_seed: int = 0

    def __post_init__(self) -> None:
        _check_names("methods", self.methods, METHODS)
        _check_names("metrics", self.metrics, METRICS)
        _check_choice("answers", self.answers, ("own", "captions"))
        _check_choice("categories", self.categories, ("auto", "coco", "data", "picture"))
        _check_choice("baseline", self.baseline, ("black", "mean", "blur"))
        _check_choice("scored_tokens", self.scored_tokens, ("objects", "all"))
        for name in ("max_new_tokens", "steps", "perturbations_per_eval", "limit"):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < 1):
                raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}.")
        if not self.prompt.strip():
            raise ValueError("prompt is empty.")
        if self.against is not None and self.against not in self.methods:
            raise ValueError(
                f"against={self.against!r} is not among methods ({', '.join(self.methods)})."
            )
        _check_options(self.options, self.methods)

    @property
    def reference(self) -> str:
        """The method that the others are compared with."""
        return self.against or self.methods[0]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {**asdict(self), "methods": list(self.methods), "metrics": list(self.metrics)}


def _check_names(name: str, given: Sequence[str], known: Any) -> None:
    if isinstance(given, str) or not given:
        raise ValueError(f"{name} must be a sequence of at least one name, got {given!r}.")
    unknown = [one for one in given if one not in known]
    if unknown:
        raise ValueError(f"{name}: no {', '.join(unknown)}; there are {', '.join(known)}.")
    if len(set(given)) < len(given):
        raise ValueError(f"{name} names one of them twice: {', '.join(given)}.")


def _check_choice(name: str, given: Any, known: tuple[str, ...]) -> None:
    if given not in known:
        raise ValueError(f"{name} must be one of {', '.join(known)}, got {given!r}.")


def _check_options(options: Mapping[str, Mapping[str, Any]], methods: Sequence[str]) -> None:
    for method, own in options.items():
        if method not in methods:
            raise ValueError(f"options: {method!r} is not among methods ({', '.join(methods)}).")
        takes = METHODS[method].options
        unknown = [] if takes is None else sorted(own.keys() - takes - {"steps"})
        if unknown:
            known = ", ".join(sorted({*(takes or ()), "steps"}))
            raise ValueError(f"options: {method} takes no {', '.join(unknown)}; it takes {known}.")
    try:
        json.dumps(dict(options), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"options must be plain data that JSON can hold: {error}.") from error


def fixed_part(settings: Settings, model: Any, data: Any) -> dict[str, Any]:
    """Everything that a line of ``samples.jsonl`` depends on.

    Args:
        settings: the run's.
        model: its identity is that of the weights it was loaded from.
        data: its identity is that of the annotation files.

    Returns:
        Plain data; two runs may share a folder if it is equal.
    """
    kept = {name: value for name, value in settings.to_dict().items() if name not in _FREE}
    kept["options"] = {name: dict(own) for name, own in sorted(settings.options.items())}
    return {
        **kept,
        "categories": resolved_categories(settings, data),
        "data": {"kind": type(data).__name__, "pictures": len(data), "sha256": _hash(data.files)},
        "model": type(model).__name__,
        "weights": weights_of(model),
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": model.device.type,
        "versions": {
            "captum_mllm": captum_mllm.__version__,
            **{
                name: importlib.metadata.version(name)
                for name in ("captum", "numpy", "torch", "transformers")
            },
        },
    }


def weights_of(model: Any) -> str:
    """What tells a model's weights from others.

    Args:
        model: a transformers model.

    Returns:
        "sha256:..." of the weights' files where it was loaded from a folder, "commit:..." of a
        hub's repository, else "sha256:..." of the weights in memory. What was done to a loaded
        model since is not seen.
    """
    folder = Path(getattr(model.config, "_name_or_path", "") or "/nowhere")
    files = [*folder.glob("*.safetensors"), *folder.glob("*.bin")] if folder.is_dir() else []
    if files:
        return f"sha256:{_hash(sorted(files))}"
    if commit := getattr(model.config, "_commit_hash", None):
        return f"commit:{commit}"
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().float().contiguous().numpy().tobytes())
    return f"sha256:{digest.hexdigest()}"


def _hash(files: Sequence[Path]) -> str:
    """Of one file what ``sha256sum`` prints, of several the hash of their hashes."""
    digests = []
    for path in files:
        with path.open("rb") as file:
            digests.append(hashlib.file_digest(file, "sha256"))
    if len(digests) == 1:
        return digests[0].hexdigest()
    return hashlib.sha256(b"".join(digest.digest() for digest in digests)).hexdigest()


def differences(before: Any, now: Any, name: str = "") -> list[str]:
    """Where two settings differ, a line each.

    Args:
        before: as written by an earlier run.
        now: of this run.
        name: prefix of the names.

    Example:
        >>> differences({"steps": 64, "seed": 0}, {"steps": 8, "seed": 0})
        ['steps was 64, is 8']
    """
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        return [
            line
            for key in {**before, **now}
            for line in differences(before.get(key), now.get(key), f"{name}.{key}".strip("."))
        ]
    return [] if before == now else [f"{name} was {before!r}, is {now!r}"]


def resolved_categories(settings: Settings, data: Any) -> str:
    """What "auto" comes to for this data.

    Args:
        settings: the run's.
        data: the data set.

    Raises:
        ValueError: "coco" although the data has other names, or "picture" where a picture has none
            of its own.
    """
    others = sorted(set(data.categories) - set(COCO_NAMES))
    own = isinstance(data, LabelMapDataset)
    if settings.categories == "coco" and others:
        raise ValueError(
            f"categories is 'coco', but the data has {', '.join(others[:3])} too; use 'data'."
        )
    if settings.categories == "picture" and not own:
        raise ValueError(
            "categories is 'picture', but this data names none per picture; use 'data'."
        )
    if settings.categories != "auto":
        return settings.categories
    return "coco" if not others else "picture" if own else "data"


def table_of(kind: str, data: Any, sample: CocoSample) -> CategoryTable:
    """The categories that words of an answer may name.

    Args:
        kind: what :func:`resolved_categories` gives.
        data: the data set.
        sample: the picture.
    """
    if kind == "coco":
        return CategoryTable.coco()
    names = sample.extra["names"] if kind == "picture" else data.categories
    return CategoryTable.of(dict.fromkeys(names))
