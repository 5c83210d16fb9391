"""Prompts about scenes for the reference model, and which tokens are about which object."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from captum_mllm.model.trace import TokenTrace
from captum_mllm.reference.captions import DEFAULT_QUESTION, Conversation, text_of
from captum_mllm.reference.captions import Word as ScriptWord
from captum_mllm.reference.scenes import Scene
from captum_mllm.words import group_words


def default_inputs(processor: Any, picture: Any, question: str = DEFAULT_QUESTION) -> Any:
    """The model's inputs for one question about a picture.

    Args:
        processor: the reference model's processor.
        picture: PIL picture.
        question: default the one whose answer lists all objects.
    """
    content = [{"type": "image"}, {"type": "text", "text": question}]
    return inputs_of([{"role": "user", "content": content}], processor, picture)


def conversation_inputs(processor: Any, picture: Any, talk: Conversation) -> Any:
    """The model's inputs for a conversation up to its last question.

    Args:
        processor: the reference model's processor.
        picture: PIL picture.
        talk: the conversation; its last answer is left out.
    """
    return inputs_of(talk.messages(answer_last=False), processor, picture)


def answer_ids(processor: Any, talk: Conversation) -> Tensor:
    """Token ids of a conversation's last answer.

    Args:
        processor: the reference model's processor.
        talk: the conversation.

    Returns:
        int64 (tokens,), without the token that ends the answer.
    """
    text = text_of(talk.turns[-1].answer)
    return processor.tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"][0]


def inputs_of(messages: Sequence[Mapping[str, Any]], processor: Any, picture: Any) -> Any:
    """Chat messages with one image as the processor's mapping."""
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    return processor(images=picture, text=text, return_tensors="pt")


def answer_words(trace: TokenTrace, scene: Scene) -> dict[int, tuple[int, ...]]:
    """Tokens of the answer that name each object, at its first mention.

    Args:
        trace: a trace whose targets are the whole answer.
        scene: the scene; categories may be of two words.

    Returns:
        Object -> its tokens, counted from the answer's first; objects that the answer doesn't
        name are missing.
    """
    words = group_words(trace.labels[trace.n_prompt :])
    texts = [word.text.lower() for word in words]
    found: dict[int, tuple[int, ...]] = {}
    taken: set[int] = set()
    # Longest name first: the "dog" of "hot dog" is no dog.
    for obj in sorted(range(len(scene.objects)), key=lambda o: -len(scene.categories[o])):
        parts = scene.categories[obj].split()
        for at in range(len(texts) - len(parts) + 1):
            span = range(at, at + len(parts))
            if texts[at : at + len(parts)] == parts and taken.isdisjoint(span):
                taken.update(span)
                found.setdefault(obj, tuple(t for n in span for t in words[n].tokens))
    return found


def script_columns(
    trace: TokenTrace, talk: Conversation
) -> list[tuple[ScriptWord, tuple[int, ...]]]:
    """Where each annotated word of a conversation stands among the text tokens.

    Args:
        trace: a trace of that conversation, its last answer as the target.
        talk: the conversation.

    Returns:
        Pairs of annotated word and its columns, in order.

    Raises:
        ValueError: a word of the script is not in the text.
    """
    words = group_words(trace.labels)
    script = [w for turn in talk.turns for part in (turn.question, turn.answer) for w in part]
    pairs, at = [], 0
    for wanted in script:
        while at < len(words) and words[at].text.lower() != wanted.text.lower():
            at += 1
        if at == len(words):
            raise ValueError(f"talk has the word {wanted.text!r}, which the trace's text lacks.")
        pairs.append((wanted, words[at].tokens))
        at += 1
    return pairs


Placed = tuple[ScriptWord, list[int]]  # an annotated word and its tokens


def whole_nouns(words: Sequence[Placed]) -> list[Placed]:
    """Nouns of a script, those of two words ("hot dog") as one.

    Args:
        words: annotated words and their tokens, in order.

    Returns:
        Pairs of the noun's first word and all its tokens.
    """
    out: list[Placed] = []
    last = None
    for word, tokens in words:
        if word.role == "noun":
            if last is not None and last.role == "noun" and last.obj == word.obj:
                out[-1] = (out[-1][0], out[-1][1] + tokens)
            else:
                out.append((word, list(tokens)))
        last = word
    return out
