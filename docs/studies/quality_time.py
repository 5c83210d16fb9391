"""Time of the settings that `studies.quality` compares, beside a plain logit lens."""

import time
from collections.abc import Mapping
from statistics import median

import torch
from tqdm import tqdm

from captum_mllm import MSEA, LogitLens
from captum_mllm.attr.base import TokenAttribution
from captum_mllm.reference.render import render_pil
from studies.evidence import SIDE, Setting, examples, lens_of
from studies.prompts import answer_ids, conversation_inputs

PLAIN = "LogitLens"
RUNS = 9


def whole(setting: Setting, lens: LogitLens) -> TokenAttribution:
    """The attributor a user would build: it runs the model at the setting's scales.

    Args:
        setting: of several scales or one; without smoothing, shifts and consistency.
        lens: of the model.

    Raises:
        ValueError: the setting reads what no attributor makes.
    """
    if setting.smoothing or setting.shifted or setting.scale_norm != "none":
        raise ValueError(f"setting must be an attributor's own options, got {setting}.")
    if setting.aggregation == "geometric_mean" or "consistency" in setting.scale_weights:
        raise ValueError(f"setting must be an attributor's own options, got {setting}.")
    msea = MSEA(
        lens,
        scales=setting.scales,
        aggregation=setting.aggregation,
        scale_weights=setting.scale_weights,
        flip="horizontal" if setting.mirrored else "none",
    )
    return setting.attributor(msea)


def seconds(
    training: str, rows: Mapping[str, Setting], runs: int = RUNS, device: str = "cpu"
) -> dict[str, list[float]]:
    """Seconds that each setting takes for all tokens of one answer, runs interleaved.

    Args:
        training: of `evidence.TRAININGS`.
        rows: name and setting.
        runs: how many times each, after one that is not counted.
        device: where the model runs.

    Returns:
        Per row, and for the plain lens, the seconds of each run; one thread.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        lens, processor = lens_of(training, device)
        example = examples("plain", "validation", [0])[0]
        picture, _ = render_pil(example.scene, SIDE)
        inputs = conversation_inputs(processor, picture, example.talk).to(device)
        answer = answer_ids(processor, example.talk).to(device)
        plan: dict[str, TokenAttribution] = {PLAIN: lens}
        plan |= {name: whole(setting, lens) for name, setting in rows.items()}
        found: dict[str, list[float]] = {name: [] for name in plan}
        for run in tqdm(range(runs + 1), desc=training):
            for name, attributor in plan.items():
                start = time.perf_counter()
                attributor.attribute(inputs, answer)
                if run:
                    found[name].append(round(time.perf_counter() - start, 4))
        return found
    finally:
        torch.set_num_threads(threads)


def ratios(found: Mapping[str, list[float]]) -> dict[str, float]:
    """Medians over the plain lens's.

    Args:
        found: of :func:`seconds`.

    Example:
        >>> ratios({"LogitLens": [1.0, 2.0, 9.0], "3 scales": [8.0, 8.0, 1.0]})
        {'LogitLens': 1.0, '3 scales': 4.0}
    """
    plain = median(found[PLAIN])
    return {name: median(own) / plain for name, own in found.items()}
