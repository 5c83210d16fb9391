"""TokenActivationMap(parity=True): deviations of the released code, against forwards by hand."""

import pytest
import torch

from captum_mllm import LogitLens, TokenActivationMap
from tests.oracle import forwards as forwards
from tests.oracle.comparing import answer_positions, close, special_ids
from tests.oracle.published import MSEA


def twin_run(s, answer=None):
    answer = s.answer if answer is None else answer
    return forwards.plain(s.model, s.inputs, answer, special=special_ids(s))


def check_levels(got, expected):
    """256 levels, each the floor of the twin's; one level off only at the edge of a level."""
    levels = got.double() * 255
    assert torch.allclose(levels, levels.round(), atol=1e-4)
    exact = expected * 255
    low, high = (exact - 0.02).floor(), (exact + 0.02).floor()
    assert bool(((levels.round() >= low) & (levels.round() <= high)).all())
    assert len(levels.round().unique()) > 5


@pytest.mark.parametrize("rank_filter", [True, False])
@pytest.mark.parametrize("template_tail", [0, 1, 2])
def test_equals_the_twin(subject, rank_filter, template_tail):
    s = subject
    method = TokenActivationMap(
        s.model, s.processor, parity=True, rank_filter=rank_filter, template_tail=template_tail
    )
    # Turned round, the first answer token is not the prompt's last, whose class stands for it.
    for answer in (s.answer, s.answer.flip(0)):
        run = twin_run(s, answer)
        expected = forwards.parity_tam(run, answer_positions(run), template_tail, rank_filter)
        check_levels(method.attribute(s.inputs, answer).grid_attr[0], expected[0])


def test_parity_differs_from_the_formulas(tiny_subject):
    s = tiny_subject
    one = TokenActivationMap(s.model, s.processor).attribute(s.inputs, s.answer)
    two = TokenActivationMap(s.model, s.processor, parity=True).attribute(s.inputs, s.answer)
    difference = (one.grid_attr[0] - two.grid_attr[0]).abs().amax((1, 2))
    assert float(difference[0]) > 0.1
    assert bool((difference[1:] > 0.02).any())  # by more than the loss of levels
    assert torch.equal(one.output_probs, two.output_probs)


def test_first_answer_token_shows_the_first_prompt_tokens_class(tiny_subject):
    """Whatever the first answer token is, its map is the same."""
    s = tiny_subject
    method = TokenActivationMap(s.model, s.processor, parity=True)
    maps = [method.attribute(s.inputs, [first, 31]).grid_attr[0] for first in (20, 45, 7)]
    assert torch.equal(maps[0][0], maps[1][0])
    assert torch.equal(maps[0][0], maps[2][0])
    assert maps[0][0].any()
    own = LogitLens(s.model, s.processor).attribute(s.inputs, [45]).grid_attr[0][0]
    unit = own / own.max().clamp(min=1e-9)
    assert float((unit - maps[0][0] / maps[0][0].max()).abs().max()) > 0.1


def test_a_row_of_its_own_is_the_same(tiny_subject):
    s = tiny_subject
    method = TokenActivationMap(s.model, s.processor, parity=True)
    everything = method.attribute(s.inputs, s.answer).grid_attr[0]
    n = s.inputs["input_ids"].shape[1]
    some = method.attribute(s.inputs, s.answer, explain=[n + 3, n]).grid_attr[0]
    assert float((some - everything[[3, 0]]).abs().max()) < 1.1 / 255


def test_prompt_tokens_cannot_be_explained(tiny_subject):
    s = tiny_subject
    method = TokenActivationMap(s.model, s.processor, parity=True)
    for explain in ("prompt", "all"):
        with pytest.raises(ValueError, match=r"parity explains answer tokens only.*'answer'"):
            method.attribute(s.inputs, s.answer, explain=explain)


@pytest.mark.parametrize("tail", [5, 6, 100])
def test_nothing_left_of_the_prompt(tiny_subject, tail):
    s = tiny_subject
    method = TokenActivationMap(s.model, s.processor, parity=True, template_tail=tail)
    with pytest.raises(ValueError, match=rf"parity needs prompt text.*template_tail is {tail}"):
        method.attribute(s.inputs, s.answer)


def test_parity_at_several_scales(tiny_subject):
    """Parity's two further classes are traced at every scale."""
    s = tiny_subject
    single = TokenActivationMap(MSEA(s.model, s.processor, scales=(1.0,)), parity=True)
    plain = TokenActivationMap(s.model, s.processor, parity=True)
    one, two = (m.attribute(s.inputs, s.answer) for m in (single, plain))
    assert torch.equal(one.grid_attr[0], two.grid_attr[0])
    more = TokenActivationMap(MSEA(s.model, s.processor), parity=True)
    assert more.attribute(s.inputs, s.answer).grid_attr[0].shape == (5, 6, 6)


@pytest.mark.parametrize("rank_filter", [True, False])
def test_the_formulas_with_and_without_the_filter(tiny_subject, rank_filter):
    s = tiny_subject
    run = twin_run(s)
    grids, scores = forwards.tam(run, answer_positions(run), rank_filter=rank_filter)
    got = TokenActivationMap(s.model, s.processor, rank_filter=rank_filter).attribute(
        s.inputs, s.answer
    )
    close(got.grid_attr[0], grids[0], 5e-5)
    close(got.token_attr, scores, 5e-5)


def test_alpha_can_be_bounded(tiny_subject):
    s = tiny_subject
    free, bound, none = (
        TokenActivationMap(s.model, alpha_max=a, rank_filter=False)
        .attribute(s.inputs, s.answer).grid_attr[0]
        for a in (None, 0.1, 1e9)
    )  # fmt: skip
    assert torch.equal(free, none)
    assert not torch.allclose(free, bound)
