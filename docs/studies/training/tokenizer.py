"""The reference models' tokenizer and processor, built from an explicit list of pieces.

A Unigram tokenizer with a metaspace, as LLaMA's looks from outside: most words are one piece, 24
of the 64 nouns fall into two or three. Letters, digits and punctuation are pieces too, so any
text in lower-case Latin letters can be encoded (upper case is lowered).
"""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import LlavaProcessor, PreTrainedTokenizerFast
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from captum_mllm.reference.captions import NUMBERS
from captum_mllm.reference.scenes import BACKGROUND_NAMES, COLORS
from captum_mllm.reference.sprites import CATEGORIES

SPECIAL = ("<unk>", "<s>", "</s>", "<pad>", "<image>")
LLAVA_TOKENS = {"image_token": "<image>"}
SPLIT_NOUNS = {  # noun -> pieces; the first pieces are words of no other meaning
    "bicycle": "bi cycle",
    "motorcycle": "mo tor cycle",
    "airplane": "air plane",
    "elephant": "ele phant",
    "zebra": "ze bra",
    "giraffe": "gi raffe",
    "backpack": "back pack",
    "umbrella": "um bre lla",
    "handbag": "hand bag",
    "suitcase": "suit case",
    "skateboard": "skate board",
    "racket": "ra cket",
    "rocket": "ro cket",
    "banana": "ba na na",
    "sandwich": "sand wich",
    "broccoli": "bro cco li",
    "carrot": "carr ot",
    "donut": "do nut",
    "toilet": "toi let",
    "laptop": "lap top",
    "keyboard": "keyb oard",
    "toothbrush": "tooth brush",
    "guitar": "gui tar",
    "camera": "cam era",
}
WORDS = [
    "user",
    "assistant",
    "what",
    "is",
    "in",
    "the",
    "picture",
    "there",
    "a",
    "an",
    "and",
    "on",
    "at",
    "it",
    "this",
    "shows",
    "name",
    "objects",
    "object",
    "describe",
    "can",
    "you",
    "see",
    "where",
    "of",
    "color",
    "how",
    "big",
    "background",
    "many",
    "are",
    "to",
    "no",
    "yes",
    "nothing",
    "right",
    "left",
    "top",
    "bottom",
    "middle",
    "small",
    "large",
]
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ 'USER: ' if message['role'] == 'user' else 'ASSISTANT: ' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] if part['type'] == 'image' %}{{ '<image>\n' }}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}"
    "{% endif %}"
    "{{ ' ' if message['role'] == 'user' else '</s>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


def special_tokens(names: Mapping[str, str] = LLAVA_TOKENS) -> tuple[str, ...]:
    """Special tokens of a family, in the order of their names; the first five are `SPECIAL`'s.

    Args:
        names: A name in the tokenizer -> token; the first marks an image's features and takes
            the place of LLaVA's "<image>".
    """
    image, *others = names.values()
    return (*SPECIAL[:-1], image, *others)


def pieces(names: Mapping[str, str] = LLAVA_TOKENS, further: Sequence[str] = ()) -> list[str]:
    """The vocabulary in the order of its ids; "▁" stands for the space before a word.

    Ids of words are the same in every family: further special tokens and words come last.

    Args:
        names: As in `special_tokens`.
        further: Words that only some families know as one piece.
    """
    words = [*WORDS, *NUMBERS, *COLORS, *BACKGROUND_NAMES]
    words += [w for c in CATEGORIES for w in c.split() if w not in SPLIT_NOUNS]
    special = special_tokens(names)
    out = [*special[: len(SPECIAL)], "▁", *("▁" + word for word in words)]
    for split in SPLIT_NOUNS.values():
        first, *rest = split.split()
        out += ["▁" + first, *rest]
    out += [*string.ascii_lowercase, *string.digits, *string.punctuation]
    return list(dict.fromkeys([*out, *special, *("▁" + word for word in further)]))


def _score(piece: str, special: tuple[str, ...]) -> float:
    """Unigram score: few pieces beat many; a split noun's first piece beats an equal rival."""
    if piece in special:
        return 0.0
    if piece.removeprefix("▁") in {split.split()[0] for split in SPLIT_NOUNS.values()}:
        return -1.9
    return -2.0 if len(piece) > 1 else -10.0


def build_tokenizer(
    names: Mapping[str, str] = LLAVA_TOKENS, further: Sequence[str] = ()
) -> PreTrainedTokenizerFast:
    """Build the tokenizer.

    Args:
        names: As in `special_tokens`.
        further: As in `pieces`.

    Example:
        >>> build_tokenizer().tokenize("An elephant.")
        ['▁an', '▁ele', 'phant', '.']
    """
    special = special_tokens(names)
    vocabulary = [(piece, _score(piece, special)) for piece in pieces(names, further)]
    core = Tokenizer(models.Unigram(vocabulary, unk_id=0, byte_fallback=False))
    core.normalizer = normalizers.Sequence(
        [
            normalizers.Lowercase(),
            normalizers.Replace(Regex(r"\s+"), " "),
            normalizers.Strip(),
        ]
    )
    core.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
    core.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="always")
    core.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in special])
    core.post_processor = TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        extra_special_tokens=dict(names),
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
        model_max_length=2048,
    )


def chat_template(image: str) -> str:
    """The chat template of a family.

    Args:
        image: What stands in the prompt for an image.
    """
    return CHAT_TEMPLATE.replace("<image>\n", image)


def build_processor(
    image_size: int = 112, patch_size: int = 8, further: Sequence[str] = ()
) -> LlavaProcessor:
    """Build the processor that goes with a model.

    Args:
        image_size: The model's native side in pixels.
        patch_size: Side of its patches.
        further: As in `pieces`.
    """
    square = {"height": image_size, "width": image_size}
    images = CLIPImageProcessorPil(
        size={"shortest_edge": image_size}, crop_size=square, do_convert_rgb=True
    )
    return LlavaProcessor(
        image_processor=images,
        tokenizer=build_tokenizer(further=further),
        patch_size=patch_size,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )
