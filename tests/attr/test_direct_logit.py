"""Direct logit attribution as a token attribution: results, twins, scales, what goes over it."""

import pytest
import torch

from captum_mllm import (
    ARC,
    MSEA,
    DirectLens,
    DirectLogitAttribution,
    JointNormalization,
    LogitLens,
    TokenActivationMap,
)
from captum_mllm.functional import upsample
from captum_mllm.model.scales import direct_trace, maps_at
from captum_mllm.reference import make_example, render_pil
from studies import prompts
from tests.oracle import formulas
from tests.oracle.families import REPRESENTATIVES, family

DEFAULTS = {"Llava": (1, 4, 2), "Qwen2_5_VL": (1, 4, 2)}


def counted(model):
    """Calls of the language model, counted in a list; and the hook."""
    calls = []
    return calls, model.get_decoder().register_forward_hook(lambda *_: calls.append(1))


@pytest.mark.parametrize("name", REPRESENTATIVES)
def test_the_result(name):
    subject = family(name)
    method = DirectLogitAttribution(subject.model, subject.processor)
    got = method.attribute(subject.inputs, subject.answer)
    lens = LogitLens(subject.model, subject.processor).attribute(subject.inputs, subject.answer)
    parts = method.contributions(subject.inputs, subject.answer)
    assert got.grid_attr[0].shape == lens.grid_attr[0].shape
    assert got.token_attr.shape == lens.token_attr.shape
    assert got.output_tokens == lens.output_tokens
    assert float(got.grid_attr[0].min()) >= 0
    rows, columns = got.token_attr.shape
    assert not got.token_attr.triu(columns - rows).any()
    assert float(got.token_attr.max()) <= float(parts.positive.max()) * (1 + 1e-5)
    assert float(got.token_attr.max()) > 0


@pytest.mark.parametrize("name", ["Llava", "Qwen2_5_VL"])
def test_forwards_of_the_language_model(name):
    subject = family(name)
    model = subject.model
    methods = (
        DirectLogitAttribution(model),
        DirectLens(model),
        MSEA(DirectLogitAttribution(model)),
    )
    methods[0].attribute(subject.inputs, subject.answer)  # finds the write paths, once a model
    for method, expected in zip(methods, DEFAULTS[name], strict=True):
        calls, handle = counted(model)
        method.attribute(subject.inputs, subject.answer)
        handle.remove()
        assert len(calls) == expected, method.name


@pytest.mark.parametrize("flip", ["none", "horizontal"])
@pytest.mark.parametrize("name", ["Llava", "Qwen2_5_VL"])
def test_scales_by_hand(name, flip):
    subject = family(name)
    base = DirectLogitAttribution(subject.model)
    runner = base.runner
    run = runner.run(subject.inputs, subject.answer, direct=True)
    (one,) = direct_trace(runner, run).maps
    grids = [runner.adapter.scaled_grid(grid, 2.0) for grid in run.sample.grids]
    (two,) = maps_at(runner, run, grids, direct=True).direct
    two = two * (one.mean((1, 2)) / two.mean((1, 2)).clamp(min=1e-20))[:, None, None]
    expected = (upsample(one, two.shape[1:]) + two) / 2
    method = MSEA(base, scale_weights="equal", flip=flip)
    got = method.attribute(subject.inputs, subject.answer)
    torch.testing.assert_close(got.grid_attr[0], expected[run.trace.targets].float())


@pytest.mark.parametrize("name", ["Llava", "Qwen2_5_VL"])
def test_adaptive_weights_by_hand(name):
    """Per token, a scale counts by its squared rank correlation with scale 1, at least .0001."""
    subject = family(name)
    base = DirectLogitAttribution(subject.model)
    runner = base.runner
    run = runner.run(subject.inputs, subject.answer, direct=True)
    (one,) = direct_trace(runner, run).maps
    each = [one]
    for scale in (2.0, 1.5):
        grids = [runner.adapter.scaled_grid(grid, scale) for grid in run.sample.grids]
        (more,) = maps_at(runner, run, grids, direct=True).direct
        each.append(more * (one.mean((1, 2)) / more.mean((1, 2)).clamp(min=1e-20))[:, None, None])
    finest = each[1].shape[1:]
    expected, rho = torch.zeros(len(one), *finest), torch.zeros(3, len(one))
    for token in range(len(one)):
        total = 0.0
        for n, maps in enumerate(each):
            seen = upsample(maps[token][None], one.shape[1:])[0]
            rho[n, token] = formulas.rank_correlation(
                seen.flatten()[None], one[token].flatten()[None]
            )
            weight = max(0.01, float(rho[n, token])) ** 2
            expected[token] += weight * upsample(maps[token][None], finest)[0]
            total += weight
        expected[token] /= total
    assert float(rho[1:].std()) > 0.01  # the weights differ
    method = MSEA(base, scales=(1.0, 2.0, 1.5), scale_weights="adaptive", flip="none")
    got = method.attribute(subject.inputs, subject.answer).grid_attr[0]
    torch.testing.assert_close(got, expected[run.trace.targets], rtol=1e-4, atol=1e-6)
    equal = MSEA(base, scales=(1.0, 2.0, 1.5), scale_weights="equal", flip="none")
    assert not torch.allclose(got, equal.attribute(subject.inputs, subject.answer).grid_attr[0])


@pytest.mark.parametrize("base", [DirectLogitAttribution, DirectLens])
@pytest.mark.parametrize("name", REPRESENTATIVES)
@pytest.mark.filterwarnings("ignore:scale")
def test_what_goes_over_it(name, base):
    subject = family(name)
    for over in (ARC, JointNormalization, TokenActivationMap):
        got = over(base(subject.model)).attribute(subject.inputs, subject.answer)
        assert torch.isfinite(got.grid_attr[0]).all()
        assert float(got.grid_attr[0].min()) >= 0
        assert 0 < float(got.grid_attr[0].max()) <= 1


def test_what_is_refused():
    subject = family("Llava")
    model = subject.model
    with pytest.raises(ValueError, match="multi-scale already"):
        MSEA(DirectLens(model))
    with pytest.raises(ValueError, match="maps in"):
        MSEA(ARC(DirectLogitAttribution(model)))
    for base in (DirectLogitAttribution, DirectLens):
        with pytest.raises(ValueError, match="parity"):
            TokenActivationMap(base(model, subject.processor), parity=True).attribute(
                subject.inputs, subject.answer
            )


@pytest.mark.slow
def test_mentions_of_twins(shipped):
    """Of two objects of one kind, each mention points at its own; the lens can't tell them."""
    model, processor = shipped
    lens, direct = LogitLens(model, processor), DirectLogitAttribution(model, processor)
    hits = []
    for number in range(24):
        example = make_example("twins", number, "validation")
        picture, masks = render_pil(example.scene)
        talk = example.talk
        inputs = prompts.conversation_inputs(processor, picture, talk)
        answer = prompts.answer_ids(processor, talk)
        trace = direct.trace(inputs, answer)
        placed = [
            (word, list(tokens))
            for word, tokens in prompts.script_columns(trace, talk)
            if tokens[0] >= trace.n_prompt
        ]
        nouns = [(w, t) for w, t in prompts.whole_nouns(placed) if w.obj >= 0]
        kinds = [example.scene.categories[word.obj] for word, _ in nouns]
        twins = [
            (a, b)
            for n, a in enumerate(nouns)
            for m, b in enumerate(nouns[:n])
            if kinds[n] == kinds[m] and a[0].obj != b[0].obj
        ]
        if not twins:
            continue
        plain = lens.attribute(inputs, answer).grid_attr[0]
        ours = direct.attribute(inputs, answer).grid_attr[0]
        shown = torch.as_tensor(masks).float()
        for pair in twins:
            (one, ids), (other, more) = ((w, [t - trace.n_prompt for t in c]) for w, c in pair)
            if len(ids) != len(more):
                continue
            assert torch.equal(plain[ids].sum(0), plain[more].sum(0))
            for word, tokens in ((one, ids), (other, more)):
                fine = upsample(ours[tokens].sum(0)[None], shown.shape[-2:])[0]
                light = [
                    float((fine * shown[obj]).sum() / shown[obj].sum())
                    for obj in (word.obj, one.obj + other.obj - word.obj)
                ]
                hits.append(light[0] > light[1])
        if len(hits) >= 24:
            break
    assert len(hits) >= 20
    assert sum(hits) >= 0.9 * len(hits), f"{sum(hits)} of {len(hits)}"
