"""Batches for training: fresh scenes, conversations about them, and pictures drawn on the fly."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from captum_mllm.reference.captions import Conversation, Words, draw_conversation, text_of
from captum_mllm.reference.questions import QUESTION_WORDS
from captum_mllm.reference.scenes import Scene, SceneBatch, draw_scenes, seeds_of
from captum_mllm.reference.sprites import CATEGORIES
from studies.training.tokenizer import SPECIAL, build_tokenizer

TEXT_LENGTH = 96  # text tokens per sample; a second turn that does not fit is left out
IGNORE = -100
Draw = Callable[[Tensor], SceneBatch]
Talk = Callable[[Scene, random.Random], Conversation]


@functools.cache
def _tokenizer():
    # a family that lacks the further words never meets them: their ids come last
    return build_tokenizer(further=QUESTION_WORDS)


@functools.cache
def piece_ids(text: str) -> tuple[int, ...]:
    """Ids of a text without the beginning-of-sequence token."""
    return tuple(_tokenizer()(text, add_special_tokens=False)["input_ids"])


def prefix_ids() -> tuple[int, ...]:
    """Ids before the image: "<s>USER:"."""
    return (SPECIAL.index("<s>"), *piece_ids("USER:"))


def first_piece_ids() -> Tensor:
    """The id of each category's first piece, int64 (categories,)."""
    return torch.tensor([piece_ids(category)[0] for category in CATEGORIES])


def _word_ids(words: Words) -> list[int]:
    punctuation = {"punctuation"}
    out: list[int] = []
    for word in words:
        # a mark alone would be given a space of its own, so encode it behind a letter
        ids = piece_ids("a" + word.text)[-1:] if word.role in punctuation else piece_ids(word.text)
        out.extend(ids)
    return out


def encode(talk: Conversation) -> tuple[list[int], list[int]]:
    """Encode a conversation as the processor would, without prefix and image tokens.

    Args:
        talk: The conversation; turns that make the text longer than `TEXT_LENGTH` are left out.

    Returns:
        Ids and labels of equal length; labels are `IGNORE` but on answers and their end token.
    """
    ids: list[int] = []
    labels: list[int] = []
    for i, turn in enumerate(talk.turns):
        question = [*_word_ids(turn.question), *piece_ids("ASSISTANT:")]
        if i:
            question = [*piece_ids("USER:"), *question]
        answer = [*_word_ids(turn.answer), SPECIAL.index("</s>")]
        if len(ids) + len(question) + len(answer) > TEXT_LENGTH:
            if i == 0:
                raise ValueError(f"an answer is too long: {text_of(turn.answer)!r}")
            break
        ids += [*question, *answer]
        labels += [IGNORE] * len(question) + answer
    return ids, labels


@dataclass(frozen=True)
class Batch:
    """One step's data.

    Args:
        scenes: The scenes.
        ids: int64 (batch, TEXT_LENGTH), what follows the image, padded on the right.
        labels: int64, likewise; `IGNORE` where there is no loss.
    """

    scenes: SceneBatch
    ids: Tensor
    labels: Tensor

    def to(self, device: torch.device | str, count: int) -> Batch:
        """The first `count` samples, on another device."""
        scenes = SceneBatch(**{name: value[:count] for name, value in vars(self.scenes).items()})
        ids, labels = self.ids[:count], self.labels[:count]
        return Batch(scenes.to(device), ids.to(device), labels.to(device))


def make_batch(
    step: int,
    batch_size: int,
    seed: int,
    draw: Draw = draw_scenes,
    talk: Talk = draw_conversation,
) -> Batch:
    """The data of one training step.

    Args:
        step: Number of the step; no scene is used in two steps.
        batch_size: Scenes.
        seed: Seed of the run; seeds the choice of questions and moves on the scenes.
        draw: Makes scenes of seeds.
        talk: Makes conversations of scenes.
    """
    start = seed * 10**8 + step * batch_size
    scenes = draw(seeds_of("train", torch.arange(start, start + batch_size)))
    pick = random.Random(f"{seed}/{step}")
    ids = torch.full((batch_size, TEXT_LENGTH), SPECIAL.index("<pad>"))
    labels = torch.full((batch_size, TEXT_LENGTH), IGNORE)
    for i, scene in enumerate(scenes.scenes()):
        row, row_labels = encode(talk(scene, pick))
        ids[i, : len(row)] = torch.tensor(row)
        labels[i, : len(row)] = torch.tensor(row_labels)
    return Batch(scenes, ids, labels)


class _Steps(IterableDataset):
    def __init__(self, batch_size: int, seed: int, draw: Draw, talk: Talk) -> None:
        self.batch_size, self.seed, self.draw, self.talk = batch_size, seed, draw, talk

    def __iter__(self) -> Iterator[Batch]:
        torch.set_num_threads(1)
        info = torch.utils.data.get_worker_info()
        step, stride = (info.id, info.num_workers) if info else (0, 1)
        while True:
            yield make_batch(step, self.batch_size, self.seed, self.draw, self.talk)
            step += stride


def batches(
    batch_size: int,
    seed: int,
    workers: int,
    draw: Draw = draw_scenes,
    talk: Talk = draw_conversation,
) -> Iterator[Batch]:
    """Batches of steps 0, 1, 2, ... for ever.

    Args:
        batch_size: Scenes per batch.
        seed: Seed of the run.
        workers: Processes that make them; their number does not change what comes.
        draw: Makes scenes of seeds.
        talk: Makes conversations of scenes.
    """
    steps = _Steps(batch_size, seed, draw, talk)
    return iter(DataLoader(steps, batch_size=None, num_workers=workers))
