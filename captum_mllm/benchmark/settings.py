"""The settings of a benchmark run, and what must stay the same for a run to be resumed."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from captum_mllm.data import COCO_NAMES, CategoryTable, CocoSample, LabelMapDataset
from captum_mllm.methods import METHODS
from captum_mllm.methods.registry import check_options
from captum_mllm.metrics import MASK_METRICS
from captum_mllm.model.loading import PROMPT
from captum_mllm.validation import ArgumentError

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
# What may change between two runs into one folder: no line of samples.jsonl depends on it.
_FREE = frozenset({"methods", "limit", "against", "perturbations_per_eval", "bootstrap_seed"})


@dataclass(frozen=True)
class Settings:
    """What is measured, on what, and how.

    Args:
        methods: names of :data:`captum_mllm.methods.METHODS`.
        metrics: names of :data:`METRICS`. Default: Obj-IoU, Func-IoU and F1-IoU.
        prompt: the prompt about every picture, without the model's chat template.
        answers: "own" (default) explains the model's own greedy answer, as TAM's evaluation does;
            "captions" the picture's first caption, teacher-forced.
        max_new_tokens: length of the generated answers at most, default 128.
        categories: what words may name. "coco": COCO's 80 categories with synonyms; "data": the
            data's names; "picture": each picture's own names, where the data has them
            (:class:`~captum_mllm.data.LabelMapDataset`). "auto" (default): "coco" where
            all of the data's names are COCO's, else "picture" where there are such, else "data".
        parity: reproduce known defects of TAM's evaluation, see
            :func:`captum_mllm.metrics.score_words`. Default: no.
        steps: steps of area of insertion and deletion, default 64.
        baseline: what replaces removed pixels: "black" (default), "mean" or "blur".
        scored_tokens: the tokens that insertion, deletion and the like score: "objects" (default:
            those of the words that name a category, annotated or not) or "all".
        perturbations_per_eval: perturbed images in one forward, default 1.
        options: per method, options of :func:`captum_mllm.methods.explain`.
        seed: of the random methods; the picture's number is added to it. Default: 0.
        limit: number of pictures, from the first; None (default) for all.
        against: the method that the others are compared with; default: the first.
        bootstrap_seed: of the intervals. Default: 0.

    Reference:
        TAM's evaluation explains the model's own answers, of at most 256 tokens, to prompts for
        about one sentence (COCO), two (GranDf) or three (OpenPSG), and takes each GranDf and
        OpenPSG picture's own names; it also rates the answer's text by the captions, which is not
        done here.

    Raises:
        ArgumentError: an unknown or repeated name, a number out of range.

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
                raise ArgumentError(name, f"must be a whole number of at least 1, got {value!r}.")
        if not self.prompt.strip():
            raise ArgumentError("prompt", "is empty.")
        if self.against is not None and self.against not in self.methods:
            raise ArgumentError(
                "against", f"must be one of {', '.join(self.methods)}, got {self.against!r}."
            )
        _check_options(self.options, self.methods)

    @property
    def reference(self) -> str:
        """The method that the others are compared with."""
        return self.against or self.methods[0]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {**asdict(self), "methods": list(self.methods), "metrics": list(self.metrics)}


def _check_names(argument: str, names: Sequence[str], known: Any) -> None:
    if isinstance(names, str) or not names:
        raise ArgumentError(argument, f"must be a sequence of at least one name, got {names!r}.")
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ArgumentError(
            argument, f"must be among {', '.join(known)}; unknown: {', '.join(unknown)}."
        )
    if len(set(names)) < len(names):
        raise ArgumentError(argument, f"must be distinct, got {', '.join(names)}.")


def _check_choice(argument: str, value: Any, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ArgumentError(argument, f"must be one of {', '.join(known)}, got {value!r}.")


def _check_options(options: Mapping[str, Mapping[str, Any]], methods: Sequence[str]) -> None:
    for method, of_method in options.items():
        if method not in methods:
            raise ArgumentError(
                "options", f"must be for one of {', '.join(methods)}, got some for {method!r}."
            )
        try:
            check_options(method, of_method, always=("steps",))
        except TypeError as error:
            raise ArgumentError("options", f"must be those of their method: {error}") from error
    try:
        json.dumps(dict(options), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ArgumentError("options", f"must be plain data for JSON: {error}.") from error


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
    kept["options"] = {name: dict(chosen) for name, chosen in sorted(settings.options.items())}
    return {
        **kept,
        "categories": resolved_categories(settings, data),
        "data": {"kind": type(data).__name__, "pictures": len(data), "sha256": _hash(data.files)},
        "model": type(model).__name__,
        "weights": weights_of(model),
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": model.device.type,
        "versions": {
            name: importlib.metadata.version(name)
            for name in ("captum_mllm", "captum", "numpy", "torch", "transformers")
        },
    }


def weights_of(model: Any) -> str:
    """What identifies a model's weights.

    Args:
        model: a transformers model.

    Returns:
        "sha256:..." of the weights' files where it was loaded from a folder, "commit:..." of a
        hub's repository, else "sha256:..." of the weights in memory. Later changes to a loaded
        model go unnoticed.
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
    """For one file what ``sha256sum`` prints, for several the hash of their hashes."""
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
    """What "auto" means for this data.

    Args:
        settings: the run's.
        data: the data set.

    Raises:
        ArgumentError: "coco" although the data has other names, or "picture" where the data has no
            names per picture.
    """
    others = sorted(set(data.categories) - set(COCO_NAMES))
    per_picture = isinstance(data, LabelMapDataset)
    if settings.categories == "coco" and others:
        raise ArgumentError(
            "categories", f"is 'coco', but the data has {', '.join(others[:3])} too; use 'data'."
        )
    if settings.categories == "picture" and not per_picture:
        raise ArgumentError(
            "categories", "is 'picture', but this data has no names per picture; use 'data'."
        )
    if settings.categories != "auto":
        return settings.categories
    return "coco" if not others else "picture" if per_picture else "data"


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
