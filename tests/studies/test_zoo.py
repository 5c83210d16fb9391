"""The zoo: tiny models of every class; a handful here, all of them in the slow tests."""

import pytest
import torch

from studies.zoo import KINDS, Unavailable, has_package, subject
from tests.oracle.tiny import random_picture
from tests.oracle.zoo import check_kind, last_logits, needs_new_transformers, placeholders

pytestmark = needs_new_transformers

USUAL, WIDE = random_picture(0, (60, 60)), random_picture(1, (90, 50))
FEW = (
    "llava",
    "qwen2_vl",
    "qwen3_5",
    "internvl",
    "mistral3",
    "gemma3",
    "ovis2",
    "fuyu",
    "minicpmv4_7",
)
PLACEHOLDERS = {  # of the usual picture and of the wide one
    "llava": (64, 64),  # one canvas of 8 x 8 patches
    "qwen2_vl": (8 * 8, 6 * 11),  # 64 x 64 and 48 x 88 pixels in cells of 8
    "qwen3_5": (8 * 8, 6 * 11),
    "internvl": (5 * 16, 3 * 16),  # four tiles or two, and a small picture
    "mistral3": (8 * 8, 5 * 8),  # 64 x 64 and 36 x 64 pixels
    "gemma3": (16, 16),
    "ovis2": (5 * 16, 5 * 16),
    "fuyu": (16 * 16, 16 * 16),
    "minicpmv4_7": (5 * 4, None),  # the whole picture and four slices
}
SIDE_INPUTS = {
    "qwen2_vl": {"mm_token_type_ids", "image_grid_thw"},
    "gemma3": {"token_type_ids"},
    "mistral3": {"image_sizes"},
    "minicpmv4_7": {"mm_token_type_ids", "target_sizes"},
}


@pytest.fixture(scope="module", autouse=True)
def _quiet():
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    yield
    logging.set_verbosity(level)


@pytest.mark.parametrize("kind", FEW)
def test_a_subject_takes_pictures(kind):
    one = subject(kind)
    usual, wide = one.encode(USUAL), one.encode(WIDE)
    expected = PLACEHOLDERS[kind]
    assert placeholders(one, usual) == expected[0]
    assert expected[1] is None or placeholders(one, wide) == expected[1]
    assert SIDE_INPUTS.get(kind, set()) <= usual.keys()
    assert one.processor.tokenizer is None
    assert not one.model.training
    assert {p.dtype for p in one.model.parameters()} == {torch.float32}
    logits = last_logits(one, usual)
    assert bool(torch.isfinite(logits).all())
    other = last_logits(one, one.encode(random_picture(2, (60, 60))))
    assert (logits - other).abs().max() > 1e-3, "the model must hear the picture"


def test_text_after_the_picture():
    one = subject("llava")
    assert [one.encode(USUAL, text_after=n)["input_ids"].shape[1] for n in (1, 3)] == [70, 72]
    assert "pixel_values" not in one.encode()


@pytest.mark.parametrize("kind", ["llava", "qwen2_vl", "internvl"])
def test_several_pictures(kind):
    one = subject(kind)
    both = one.encode(USUAL, WIDE)
    assert placeholders(one, both) == sum(placeholders(one, one.encode(p)) for p in (USUAL, WIDE))
    assert bool(torch.isfinite(last_logits(one, both)).all())


def test_weights_depend_on_the_seed_alone():
    states = [subject("llava", seed).model.state_dict() for seed in (0, 0, 1)]
    same = [all(torch.equal(states[0][n], other[n]) for n in states[0]) for other in states[1:]]
    assert same == [True, False]


def test_a_wrong_number_of_placeholders_is_refused():
    """The models' own check: what `encode` gives is the number that passes it."""
    one = subject("llava")
    inputs = one.encode(USUAL)
    inputs["input_ids"][0, 5] = 7
    with pytest.raises(ValueError, match="do not match"):
        last_logits(one, inputs)


def test_what_can_not_be_built_says_why():
    with pytest.raises(Unavailable, match="proteins"):
        subject("evolla")
    with pytest.raises(KeyError, match=r"KINDS.*'lava'"):
        subject("lava")


@pytest.mark.skipif(has_package("torchvision"), reason="torchvision is there")
def test_what_needs_torchvision_says_so():
    with pytest.raises(Unavailable, match="Molmo2ImageProcessor needs torchvision"):
        subject("molmo2")


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_built_or_says_why(kind):
    check_kind(kind)
