"""Models that a probe must refuse, faults that a checker must find: they are what they claim."""

import re

import pytest
import torch

from captum_mllm.adapters import find_adapter
from captum_mllm.adapters.layout import LayoutError
from captum_mllm.model.discovery import probe_layout
from studies.zoo import subject
from studies.zoo.faults import FAULTS
from studies.zoo.negatives import NEGATIVES
from tests.oracle.zoo import last_logits, needs_new_transformers, noise, placeholders

pytestmark = needs_new_transformers


def refusal(one, picture):
    """What a probe says against a model; the layout where it says nothing."""
    try:
        layout = probe_layout(one.model, one.encode(picture), one.processor, picture)
    except LayoutError as error:
        return str(error)
    return "; ".join(layout.notes) or layout


@pytest.mark.parametrize("name", NEGATIVES)
def test_negatives_are_refused(name):
    one = NEGATIVES[name]()
    said = refusal(one, noise(0, one.picture))
    if isinstance(said, str):
        assert re.search(one.says, said, re.IGNORECASE)
    else:
        assert one.layout is not None, f"{name}: found {said}"
        assert said.views[0].tokens == tuple(map(tuple, one.layout.tolist()))


@pytest.mark.parametrize(
    "name", ["queries_as_many_as_patches", "perceiver", "token_mixing", "permuted", "by_content"]
)
def test_negatives_hear_the_picture(name):
    one = NEGATIVES[name]()
    logits = [last_logits(one, one.encode(noise(seed, (60, 60)))) for seed in (0, 1)]
    assert bool(torch.isfinite(logits[0]).all())
    assert (logits[0] - logits[1]).abs().max() > 1e-3
    expected = 16 if name == "perceiver" else 64
    assert placeholders(one, one.encode(noise(0, (60, 60)))) == expected


def test_placeholders_of_negatives():
    counts = [
        placeholders(one, one.encode(noise(0, (60, 60))))
        for one in (NEGATIVES["placeholders_too_many"](), NEGATIVES["placeholders_too_few"]())
    ]
    assert counts == [65, 63]


@torch.no_grad()
def logits_of(fault):
    return fault.model(**fault.encode(noise(0, fault.picture))).logits[0, -1]


def right_logits(kind):
    one = subject(kind)
    return last_logits(one, one.encode(noise(0, (60, 60))))


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("silent_count_off_by_one", "llava"),
        ("swapped_tiles", "internvl"),
        ("pixels_of_another_model", "llava"),
        ("missing_side_input", "qwen2_5_vl"),
    ],
)
def test_faults_change_the_answer_without_an_error(name, kind):
    difference = (logits_of(FAULTS[name]()) - right_logits(kind)).abs().max()
    assert difference > 1e-2


@pytest.mark.parametrize("name", ["wrong_adapter", "processor_of_another_model"])
def test_faults_beside_the_model_leave_its_answer(name):
    torch.testing.assert_close(logits_of(FAULTS[name]()), right_logits("llava"))


def test_the_wrong_adapter_swaps_rows_and_columns():
    wrong, right = (
        find_adapter(FAULTS["wrong_adapter"]().model),
        find_adapter(subject("llava").model),
    )
    inputs = subject("llava").encode(noise(0, (60, 60)))
    (grid,) = right.grids(inputs)
    assert torch.equal(wrong.views(grid)[0].tokens, right.views(grid)[0].tokens.T)


def test_a_count_off_by_one_is_refused_by_the_model():
    with pytest.raises(ValueError, match="do not match, tokens: 63"):
        logits_of(FAULTS["count_off_by_one"]())
