"""MSEA, ARC and TAM on a model: maps against slow twins, forwards counted, consistency."""

import pytest
import torch

import captum_mllm.functional
import captum_mllm.model.forward
import captum_mllm.model.runner
from captum_mllm import LogitLens, TokenActivationMap
from tests.oracle import forwards as forwards
from tests.oracle import tiny
from tests.oracle.comparing import answer_positions, close, same, special_ids, with_two_images
from tests.oracle.published import ARC, MSEA, MultiScaleAttribution, RankCorrelationDenoiser

SCALES = (1.0, 1.25, 1.5)


WRAPPERS = {"lens": lambda a: a, "tam": TokenActivationMap, "arc": ARC}


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("aggregation", ["mean", "median"])
def test_scale_one_alone_is_the_base(subject, wrapper, aggregation):
    base = LogitLens(subject.model, subject.processor)
    wrap = WRAPPERS[wrapper]
    single = MultiScaleAttribution(base, scales=(1.0,), aggregation=aggregation)
    answer = subject.answer
    same(
        wrap(single).attribute(subject.inputs, answer), wrap(base).attribute(subject.inputs, answer)
    )


@pytest.mark.parametrize("scales", [SCALES, (0.5, 1.0), (1.0, 2.0, 0.75), (1.5,)], ids=str)
def test_maps_equal_a_loop_over_full_forwards(subject, scales):
    model, answer = subject.model, subject.answer
    maps = forwards.msea_maps(model, subject.inputs, answer, scales)
    run = forwards.plain(model, subject.inputs, answer, special=special_ids(subject))
    (grid,), scores = forwards.raw(run, answer_positions(run), maps)
    got = MSEA(model, subject.processor, scales=scales).attribute(subject.inputs, answer)
    close(got.grid_attr[0], grid)
    close(got.token_attr, scores)
    rows, cols = run.cells[0].shape
    achieved = [(round(rows * s) * round(cols * s) / (rows * cols)) ** 0.5 for s in scales]
    assert got.scales == pytest.approx(achieved)
    # Pixels stay those of the image as the model saw it at scale 1.
    assert got.image_attr[0].shape[1:] == subject.inputs["pixel_values"].shape[2:]


def test_the_median_of_the_scales(tiny_subject):
    s = tiny_subject
    single = [
        MSEA(s.model, scales=(scale,)).attribute(s.inputs, s.answer).grid_attr[0]
        for scale in SCALES
    ]
    size = single[-1].shape[1:]
    stack = torch.stack([captum_mllm.functional.upsample(m, size) for m in single])
    expected = stack.median(0).values
    got = MSEA(s.model, scales=SCALES, aggregation="median").attribute(s.inputs, s.answer)
    close(got.grid_attr[0], expected)


@pytest.mark.parametrize("name", ["tam", "tam-unfiltered", "arc", "arc-half"])
@pytest.mark.parametrize("scales", [None, (1.0, 1.5)], ids=["lens", "msea"])
def test_cleaned_maps_equal_reference_implementations(subject, name, scales):
    s = subject
    run = forwards.plain(s.model, s.inputs, s.answer, special=special_ids(s))
    targets = answer_positions(run)
    base, maps = LogitLens(s.model, s.processor), None
    if scales:
        base = MSEA(base, scales=scales)
        maps = forwards.msea_maps(s.model, s.inputs, s.answer, scales)
    if name.startswith("tam"):
        method = TokenActivationMap(base, rank_filter=name == "tam")
        expected = forwards.tam(run, targets, maps, rank_filter=name == "tam")
    else:
        options = {"strength": 0.5 if name == "arc-half" else 1.0}
        method = ARC(base, top_k=30, rbo_p=0.8, **options)
        expected = forwards.arc(run, targets, maps, k=30, p=0.8, **options)
    got = method.attribute(s.inputs, s.answer)
    close(got.grid_attr[0], expected[0][0], 5e-5)
    close(got.token_attr, expected[1], 5e-5)
    assert got.units == "[0, 1]"
    if name.startswith("arc"):
        assert float((got.relevance - expected[2].float()).abs().max()) < 1e-6
    else:
        assert got.relevance is None


def test_arc_over_prompt_and_answer(tiny_subject):
    s = tiny_subject
    run = forwards.plain(s.model, s.inputs, s.answer, special=special_ids(s))
    got = ARC(s.model, s.processor).attribute(s.inputs, s.answer, explain="all")
    grids, scores, relevance = forwards.arc(run, run.text)
    close(got.grid_attr[0], grids[0], 5e-5)
    close(got.token_attr, scores, 5e-5)
    assert float((got.relevance - relevance.float()).abs().max()) < 1e-6


def test_columns_at_and_after_the_target_are_zero(subject):
    for method in (LogitLens, MSEA, ARC, TokenActivationMap):
        got = method(subject.model).attribute(subject.inputs, subject.answer, explain="all")
        assert not got.token_attr.triu().any()
        if got.relevance is not None:
            assert not got.relevance.triu().any()
        assert torch.equal(got.seq_attr, got.token_attr.sum(0))


def test_the_same_id_is_no_context(tiny_subject):
    """A target whose only earlier text is its own id keeps its map."""
    s = tiny_subject
    inputs = s.encode(prompt="USER: <image>")
    with torch.no_grad():
        strongest = int(s.model(**inputs).logits[0, 1].argmax())  # at the image's first cell
    answer = torch.tensor([strongest] * 3)
    trace = LogitLens(s.model).trace(inputs, answer, top_k=10)
    assert not trace.is_context.any()
    assert trace.is_earlier.tril(-1).sum() == 3
    raw = LogitLens(s.model).attribute(inputs, answer).grid_attr[0]
    got = ARC(s.model, top_k=10).attribute(inputs, answer)
    # Normalised, together with the text scores of the earlier mentions; but nothing subtracted.
    for row, scores in ((1, 1), (2, 2)):
        values = torch.cat([raw[row].flatten(), trace.text_scores[row, :scores]])
        expected = (raw[row] - values.min()) / (values.max() - values.min())
        close(got.grid_attr[0][row], expected)


def test_strength_zero_keeps_the_map_and_full_relevance_too(tiny_subject):
    s = tiny_subject
    trace = LogitLens(s.model).trace(s.inputs, s.answer, top_k=50)
    off = ARC(s.model, strength=0.0).attribute_trace(trace)
    run = forwards.plain(s.model, s.inputs, s.answer)
    expected, scores, _ = forwards.arc(run, answer_positions(run), strength=0.0)
    close(off.grid_attr[0], expected[0])
    close(off.token_attr, scores)


def test_wrappers_spell_the_same_thing(tiny_subject):
    s = tiny_subject
    args = s.inputs, s.answer
    same(
        ARC(s.model).attribute(*args), RankCorrelationDenoiser(LogitLens(s.model)).attribute(*args)
    )
    same(ARC(s.model).attribute(*args), ARC(LogitLens(s.model)).attribute(*args))
    one = MSEA(s.model, scales=SCALES).attribute(*args)
    same(one, MultiScaleAttribution(LogitLens(s.model), SCALES).attribute(*args))


def test_scales_that_collapse_are_dropped_with_a_warning(tiny_subject):
    s = tiny_subject
    with pytest.warns(UserWarning, match=r"scale 1\.01 .*same size as scale 1\.0"):
        got = MSEA(s.model, scales=(1.0, 1.01, 1.5)).attribute(s.inputs, s.answer)
    same(got, MSEA(s.model, scales=(1.0, 1.5)).attribute(s.inputs, s.answer))


def test_scales_start_from_the_original_picture_if_given(subject):
    """images= equals the processor called with the scaled sizes."""
    s = subject
    scale, patch = 1.5, s.model.config.vision_config.patch_size
    base = s.inputs
    side = base["pixel_values"].shape[2]
    grid = round(side // patch * scale)
    settings = s.processor.image_processor
    crop = getattr(settings, "do_center_crop", False)
    size = (
        {"shortest_edge": grid * patch} if crop else {"height": grid * patch, "width": grid * patch}
    )
    crop_size = {"height": grid * patch, "width": grid * patch}
    scaled = dict(
        s.processor(
            images=s.picture, text=s.prompt, return_tensors="pt",
            size=size, **({"crop_size": crop_size} if crop else {}),
        )
    )  # fmt: skip
    msea = MSEA(s.model, s.processor, scales=(scale,))
    got = msea.attribute(base, s.answer, images=s.picture)
    run = forwards.plain_at(s.model, scaled, s.answer, 1.0)
    close(got.grid_attr[0], forwards.raw(run, answer_positions(run))[0][0])
    resized = msea.attribute(base, s.answer)
    assert not torch.allclose(got.grid_attr[0], resized.grid_attr[0], rtol=1e-2)


@pytest.mark.parametrize(
    "size",
    [{"height": 20, "width": 20}, {"shortest_edge": 20}, {"height": 32, "width": 16}],
    ids=str,
)
def test_original_pictures_keep_their_crop(tiny_subject, size):
    """A processor that crops away a margin does so at every scale."""
    s = tiny_subject
    processor = tiny.tiny_processor()
    processor.image_processor.size = size
    inputs = dict(processor(images=s.picture, text=s.prompt, return_tensors="pt"))
    msea = MSEA(s.model, processor, scales=(2.0,))
    got = msea.attribute(inputs, s.answer, images=[s.picture])
    doubled = {name: 2 * length for name, length in size.items()}
    again = processor(
        images=s.picture, text=s.prompt, return_tensors="pt",
        size=doubled, crop_size={"height": 32, "width": 32},
    )  # fmt: skip
    run = forwards.plain_at(s.model, dict(again), s.answer, 1.0)
    close(got.grid_attr[0], forwards.raw(run, answer_positions(run))[0][0])


class Count:
    """Counts forwards and the tokens fed to them; records what the head was given."""

    def __init__(self, model):
        self.model = model
        self.fed, self.tower, self.head = [], 0, []

    def __enter__(self):
        def on_model(_m, _a, kwargs):
            self.fed.append(int(kwargs["input_ids"].shape[1]))

        def on_tower(*_):
            self.tower += 1

        def on_head(_m, _a, output):
            self.head.append(output.shape[1])

        model = self.model
        self.handles = [
            model.register_forward_pre_hook(on_model, with_kwargs=True),
            model.get_encoder(modality="image").register_forward_pre_hook(on_tower),
            model.lm_head.register_forward_hook(on_head),
        ]
        return self

    def __exit__(self, *_):
        for handle in self.handles:
            handle.remove()


def fed_tokens(subject, inputs, scales, n_answer):
    """Tokens of the base forward, and per further scale of the prefix and of the text after it."""
    ids, image_id = inputs["input_ids"][0].tolist(), subject.model.config.image_token_id
    last = max(p for p, i in enumerate(ids) if i == image_id) + 1
    side = inputs["pixel_values"].shape[-1] // subject.model.config.vision_config.patch_size
    images = len(inputs["pixel_values"])
    further = [
        last + images * (round(side * s) ** 2 - side**2) for s in scales if round(side * s) != side
    ]
    return len(ids) + n_answer, further, len(ids) - last + n_answer


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("images", [1, 2])
def test_one_base_forward_and_one_prefix_per_further_scale(tiny_subject, wrapper, images):
    s = tiny_subject
    inputs = s.inputs if images == 1 else with_two_images(s)[0]
    scales = (0.5, 1.0, 1.25, 1.5)
    method = WRAPPERS[wrapper](MSEA(s.model, scales=scales))
    for answer in (s.answer[:1], s.answer):
        with Count(s.model) as count:
            method.attribute(inputs, answer)
        base, prefixes, _ = fed_tokens(s, inputs, scales, len(answer))
        assert count.fed == [base, *prefixes]
        assert count.tower == 1 + len(prefixes)
        # The head scores the text of the base forward, nothing of a prefix.
        n_text = base - prefixes[0] + images * (2 * 2 - 4 * 4)
        assert count.head == [n_text] + [0] * len(prefixes)


def test_forwards_of_the_shipped_model(subject):
    scales = (1.0, 1.25, 1.5)
    with Count(subject.model) as count:
        MSEA(subject.model, subject.processor, scales=scales).attribute(
            subject.inputs, subject.answer
        )
    base, prefixes, _ = fed_tokens(subject, subject.inputs, scales, len(subject.answer))
    assert count.fed == [base, *prefixes]
    assert max(count.head) < int(subject.inputs["pixel_values"].shape[-1] // 4) ** 2


@pytest.mark.parametrize("method", [LogitLens, ARC, TokenActivationMap])
def test_one_forward_without_scales(tiny_subject, method):
    s = tiny_subject
    for explain in ("answer", "all"):
        with Count(s.model) as count:
            method(s.model).attribute(s.inputs, s.answer, explain=explain)
        assert count.fed == [s.inputs["input_ids"].shape[1] + len(s.answer)]


def test_consistency_runs_the_text_too(tiny_subject):
    s = tiny_subject
    with Count(s.model) as count:
        MSEA(s.model, scales=SCALES, consistency=True).attribute(s.inputs, s.answer)
    base, prefixes, text = fed_tokens(s, s.inputs, SCALES, len(s.answer))
    assert count.fed == [base, prefixes[0] + text, prefixes[1] + text]
    assert count.tower == 3
    assert count.head[1:] == [len(s.answer)] * 2


@pytest.mark.parametrize("layer", [-1, 1])
def test_consistency_equals_full_forwards(subject, layer):
    s = subject
    scales = (1.0, 0.75, 1.5)
    got = MSEA(s.model, s.processor, scales=scales, consistency=True, layer=layer).attribute(
        s.inputs, s.answer
    )
    expected = [forwards.consistency(s.model, s.inputs, s.answer, x) for x in scales]
    assert got.consistency == pytest.approx(expected, rel=1e-4)
    assert got.consistency[0] == 1.0
    assert all(0 < c <= 1 for c in got.consistency)
    assert min(got.consistency) < 1
    plain = MSEA(s.model, s.processor, scales=scales, layer=layer).attribute(s.inputs, s.answer)
    assert plain.consistency is None
    close(plain.grid_attr[0], got.grid_attr[0])


def test_consistency_with_two_images_and_an_answer_of_one_token(tiny_subject):
    s = tiny_subject
    inputs, answer = with_two_images(s)[0], s.answer[:1]
    got = MSEA(s.model, scales=(1.0, 1.5), consistency=True).attribute(inputs, answer)
    expected = forwards.consistency(s.model, inputs, answer, 1.5)
    assert got.consistency[1] == pytest.approx(expected, rel=1e-4)


def test_prompt_that_ends_with_its_image(tiny_subject):
    """The prefix then predicts the first answer token."""
    s = tiny_subject
    inputs = s.encode(prompt="USER: what is here <image>")
    got = MSEA(s.model, scales=(1.0, 1.5), consistency=True).attribute(inputs, s.answer)
    expected = forwards.consistency(s.model, inputs, s.answer, 1.5)
    assert got.consistency[1] == pytest.approx(expected, rel=1e-4)
    run = forwards.plain(s.model, inputs, s.answer)
    close(got.token_attr, forwards.raw(run, answer_positions(run))[1])
    close(got.output_probs, run.probs(answer_positions(run)))


def test_never_image_positions_times_vocabulary(subject, monkeypatch):
    """Neither the head nor the lens ever makes logits of all ids at the image's positions."""
    made = []
    original = captum_mllm.functional.lens_logits

    def spy(hidden, weight, bias=None):
        made.append((len(hidden), len(weight)))
        return original(hidden, weight, bias)

    monkeypatch.setattr(captum_mllm.model.forward, "lens_logits", spy)
    monkeypatch.setattr(captum_mllm.model.runner, "lens_logits", spy)
    n_image = int((subject.inputs["input_ids"] == subject.model.config.image_token_id).sum())
    answer = subject.answer[:4]
    with Count(subject.model) as count:
        arc = ARC(MSEA(subject.model, subject.processor, consistency=True), top_k=20)
        result = arc.attribute(subject.inputs, answer)
    assert max(count.head) < n_image
    assert any(positions >= n_image for positions, _ in made)
    n_text = len(result.input_tokens) + 2
    for positions, classes in made:
        assert positions < n_image or classes <= n_text, (positions, classes)


@pytest.mark.parametrize("aggregation", ["mean", "median"])
@pytest.mark.parametrize("scale_weights", ["equal", "adaptive"])
def test_scale_1_alone_is_the_base_where_no_view_is_flipped(
    tiny_subject, aggregation, scale_weights
):
    s = tiny_subject
    base = LogitLens(s.model).attribute(s.inputs, s.answer).grid_attr[0]
    options = {"scales": (1.0,), "aggregation": aggregation, "scale_weights": scale_weights}
    plain = MSEA(s.model, flip="none", **options).attribute(s.inputs, s.answer).grid_attr[0]
    assert torch.equal(plain, base)
    flipped = MSEA(s.model, flip="horizontal", **options).attribute(s.inputs, s.answer).grid_attr[0]
    assert not torch.equal(flipped, base)
