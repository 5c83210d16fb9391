"""The base: lens maps, text scores, probabilities, rankings against plain model outputs."""

import pytest
import torch
from torch.testing import assert_close

from captum_mllm import LogitLens, TokenActivationMap
from tests.oracle import forwards as forwards
from tests.oracle import tiny
from tests.oracle.comparing import answer_positions, close, special_ids, with_two_images
from tests.oracle.published import ARC, MSEA


def test_maps_and_scores_equal_plain_logits(subject):
    run = forwards.plain(
        subject.model, subject.inputs, subject.answer, special=special_ids(subject)
    )
    targets = answer_positions(run)
    (grid,), scores = forwards.raw(run, targets)
    got = LogitLens(subject.model, subject.processor).attribute(subject.inputs, subject.answer)
    close(got.grid_attr[0], grid)
    close(got.token_attr, scores)
    close(got.output_probs, run.probs(targets))
    assert got.output_ids.tolist() == subject.answer.tolist()
    assert got.units == "logits"
    assert got.scales == (1.0,)
    assert got.relevance is None


def test_text_scores_are_the_models_own_logits(subject):
    """token_attr of the last layer is relu of model(**full).logits at pos(j)."""
    full = forwards.with_answer(subject.inputs, subject.answer)
    with torch.no_grad():
        logits = subject.model(**full).logits[0]
    n = subject.inputs["input_ids"].shape[1]
    got = LogitLens(subject.model).attribute(subject.inputs, subject.answer)
    n_prompt = got.token_attr.shape[1] - len(subject.answer)
    for t, y in enumerate(subject.answer.tolist()):
        for j in range(t):
            expected = max(float(logits[n + j - 1, y]), 0.0)
            assert float(got.token_attr[t, n_prompt + j]) == pytest.approx(expected, abs=1e-5)
        assert float(got.token_attr[t, n_prompt + t :].abs().max()) == 0


def test_maps_equal_those_of_generate(subject):
    """Teacher-forced maps equal those from the hidden states that generate shows."""
    inputs, model = subject.inputs, subject.model
    barred = [[model.config.image_token_id]]
    output = model.generate(
        **inputs, do_sample=False, max_new_tokens=8, bad_words_ids=barred,
        output_hidden_states=True, return_dict_in_generate=True, eos_token_id=None,
    )  # fmt: skip
    n = inputs["input_ids"].shape[1]
    answer = output.sequences[0, n:]
    hidden = torch.cat([step[-1][0] for step in output.hidden_states])
    where = inputs["input_ids"][0] == model.config.image_token_id
    got = LogitLens(model).attribute(inputs, answer)
    weight = model.lm_head.weight.detach()
    expected = (hidden[:n][where] @ weight[answer].T).clamp(min=0).T
    close(got.grid_attr[0].flatten(1), expected)
    steps = torch.stack([hidden[n + k - 1] for k in range(len(answer))])
    probs = (steps @ weight.T).softmax(-1).gather(1, answer[:, None])[:, 0]
    assert_close(got.output_probs, probs, rtol=0, atol=1e-5)
    shown = got.token_attr[:, -len(answer) :]
    mask = torch.ones_like(shown).tril(-1).bool()
    # pos(j) of answer token j is the position before it, which predicted it.
    scores = (steps @ weight[answer].T).clamp(min=0).T
    close(shown[mask], scores[mask])
    assert not shown[~mask].any()


def test_prefix_alone_gives_the_same_maps(subject):
    """Image positions see nothing after them: a forward over the prefix suffices."""
    inputs = subject.inputs
    where = (inputs["input_ids"][0] == subject.model.config.image_token_id).nonzero()[:, 0]
    end = int(where[-1]) + 1
    prefix = {
        "input_ids": inputs["input_ids"][:, :end],
        "attention_mask": inputs["attention_mask"][:, :end],
        "pixel_values": inputs["pixel_values"],
    }
    with torch.no_grad():
        logits = subject.model(**prefix).logits[0, where]
    got = LogitLens(subject.model).attribute(inputs, subject.answer)
    close(got.grid_attr[0].flatten(1), logits[:, subject.answer].T.clamp(min=0))


def test_another_image_gives_another_map(subject):
    lens = LogitLens(subject.model)
    one = lens.attribute(subject.inputs, subject.answer)
    other = lens.attribute(subject.encode(subject.other_picture), subject.answer)
    difference = (one.grid_attr[0] - other.grid_attr[0]).abs().max()
    assert float(difference) > 0.05 * float(one.grid_attr[0].max())


@pytest.mark.parametrize("layer", [0, 1, 2, -1, -2, -3])
def test_layer_is_read_through_the_final_norm(tiny_subject, layer):
    s = tiny_subject
    depth = len(s.model.get_decoder().layers)
    index = layer % depth
    run = forwards.plain(s.model, s.inputs, s.answer)
    if index < depth - 1:
        run = forwards.plain(s.model, s.inputs, s.answer, layer=index)
    (grid,), scores = forwards.raw(run, answer_positions(run))
    got = LogitLens(s.model, layer=layer).attribute(s.inputs, s.answer)
    close(got.grid_attr[0], grid)
    close(got.token_attr, scores)
    # Probabilities and rankings stay the model's own.
    own = forwards.plain(s.model, s.inputs, s.answer)
    close(got.output_probs, own.probs(answer_positions(own)))
    trace = LogitLens(s.model, layer=layer).trace(s.inputs, s.answer, top_k=20)
    assert torch.equal(trace.rankings, own.rankings(20))


def test_mentions_of_one_id_share_their_raw_map(tiny_subject):
    got = LogitLens(tiny_subject.model).attribute(tiny_subject.inputs, tiny_subject.answer)
    assert tiny_subject.answer[0] == tiny_subject.answer[2]
    assert torch.equal(got.grid_attr[0][0], got.grid_attr[0][2])


@pytest.mark.parametrize("method", [LogitLens, TokenActivationMap, ARC, MSEA])
def test_explain_choices_agree(tiny_subject, method):
    s = tiny_subject
    attr = method(s.model, s.processor)
    everything = attr.attribute(s.inputs, s.answer, explain="all")
    prompt = attr.attribute(s.inputs, s.answer, explain="prompt")
    answer = attr.attribute(s.inputs, s.answer)
    n, n_prompt = len(everything.output_ids), len(prompt.output_ids)
    assert n == n_prompt + len(s.answer) == len(everything.input_tokens)
    assert prompt.output_tokens + answer.output_tokens == everything.output_tokens
    for name in ("token_attr", "output_ids", "output_probs"):
        joined = torch.cat([getattr(prompt, name), getattr(answer, name)])
        close(joined, getattr(everything, name))
    close(torch.cat([prompt.grid_attr[0], answer.grid_attr[0]]), everything.grid_attr[0])
    positions = attr.trace(s.inputs, s.answer, top_k=None).text_positions
    chosen = [int(positions[n_prompt + 1]), int(positions[0]), int(positions[-1])]
    some = attr.attribute(s.inputs, s.answer, explain=chosen)
    rows = [n_prompt + 1, 0, n - 1]
    close(some.grid_attr[0], everything.grid_attr[0][rows])
    close(some.token_attr, everything.token_attr[rows])
    again = attr.attribute(s.inputs, s.answer, explain=torch.tensor(chosen))
    assert torch.equal(some.grid_attr[0], again.grid_attr[0])


def test_prompt_rows_equal_plain_logits(subject):
    """Prompt tokens are predicted, and scored, like the answer's."""
    s = subject
    run = forwards.plain(s.model, s.inputs, s.answer, special=special_ids(s))
    got = LogitLens(s.model, s.processor).attribute(s.inputs, s.answer, explain="all")
    (grid,), scores = forwards.raw(run, run.text)
    assert got.output_ids.tolist() == [run.ids[p] for p in run.text]
    close(got.grid_attr[0], grid)
    close(got.token_attr, scores)
    close(got.output_probs, run.probs(run.text))


def test_context_all_counts_the_text_before_the_image(tiny_subject):
    s = tiny_subject
    inputs = s.encode(prompt="<s> USER: w60 <image> what is here ASSISTANT:")
    run = forwards.plain(s.model, inputs, s.answer, context_all=True)
    assert any(p < int(run.cells[0].min()) for p in run.text)
    got = LogitLens(s.model, context="all").attribute(inputs, s.answer, explain="all")
    assert got.output_ids.tolist() == [run.ids[p] for p in run.text]
    close(got.token_attr, forwards.raw(run, run.text)[1])
    after = LogitLens(s.model).attribute(inputs, s.answer, explain="all")
    assert len(after.output_ids) == len(got.output_ids) - 2


def test_first_token_of_the_sequence_is_never_text(tiny_subject):
    s = tiny_subject
    inputs = s.encode(prompt="w60 w61 <image> what")
    trace = LogitLens(s.model, context="all").trace(inputs, s.answer)
    assert trace.text_positions[0] == 1


def test_special_prompt_tokens_are_no_text(tiny_subject):
    s = tiny_subject
    inputs = s.encode(prompt="USER: <image> what </s> is <s> here")
    got = LogitLens(s.model).attribute(inputs, s.answer, explain="prompt")
    assert got.output_ids.tolist() == [6, 7, 8]


@pytest.mark.parametrize("method", [LogitLens, ARC, TokenActivationMap, MSEA])
def test_left_padding_changes_nothing(subject, method):
    inputs, attr = subject.inputs, method(subject.model)
    n = 3
    ids = torch.cat([torch.zeros(1, n, dtype=torch.int64), inputs["input_ids"]], 1)
    mask = torch.cat([torch.zeros(1, n, dtype=torch.int64), inputs["attention_mask"]], 1)
    padded = {**inputs, "input_ids": ids, "attention_mask": mask}
    one, two = attr.attribute(inputs, subject.answer), attr.attribute(padded, subject.answer)
    for name in ("token_attr", "output_probs", "output_ids", "seq_attr"):
        assert torch.equal(getattr(one, name), getattr(two, name)), name
    assert torch.equal(one.grid_attr[0], two.grid_attr[0])
    plain, moved = (attr.trace(i, subject.answer).text_positions for i in (inputs, padded))
    assert torch.equal(plain + n, moved)
    row = attr.attribute(padded, subject.answer, explain=[int(moved[-1])])
    close(row.grid_attr[0][0], one.grid_attr[0][-1])


def test_generation_is_the_same_with_left_padding(subject):
    inputs = subject.inputs
    ids = torch.cat([torch.zeros(1, 2, dtype=torch.int64), inputs["input_ids"]], 1)
    mask = torch.cat([torch.zeros(1, 2, dtype=torch.int64), inputs["attention_mask"]], 1)
    padded = {**inputs, "input_ids": ids, "attention_mask": mask}
    options = {"gen_args": {"max_new_tokens": 6, "min_new_tokens": 6}}
    lens = LogitLens(subject.model)
    one, two = lens.attribute(inputs, **options), lens.attribute(padded, **options)
    assert one.output_ids.tolist() == two.output_ids.tolist()


@pytest.mark.parametrize("method", [LogitLens, MSEA, TokenActivationMap, ARC])
def test_two_images_are_not_confused(tiny_subject, method):
    s = tiny_subject
    inputs, _ = with_two_images(s)
    maps = None
    run = forwards.plain(s.model, inputs, s.answer, special=special_ids(s))
    targets = answer_positions(run)
    if method is MSEA:
        maps = forwards.msea_maps(s.model, inputs, s.answer, (1.0, 1.25, 1.5))
    twin = {TokenActivationMap: forwards.tam, ARC: forwards.arc}.get(method, forwards.raw)
    expected = twin(run, targets, maps)
    got = method(s.model, s.processor).attribute(inputs, s.answer)
    assert len(got.grid_attr) == len(got.image_attr) == 2
    for actual, grid in zip(got.grid_attr, expected[0], strict=True):
        close(actual, grid)
    close(got.token_attr, expected[1])
    assert not torch.allclose(*got.grid_attr)


def test_swapped_images_swap_their_maps(subject):
    """Maps follow their picture: with cross-attention cut off they would swap exactly."""
    inputs, swapped = with_two_images(subject)
    lens = LogitLens(subject.model)
    for mapping, pictures in ((inputs, (0, 1)), (swapped, (1, 0))):
        run = forwards.plain(subject.model, mapping, subject.answer)
        grids, _ = forwards.raw(run, answer_positions(run))
        got = lens.attribute(mapping, subject.answer)
        for actual, grid in zip(got.grid_attr, grids, strict=True):
            close(actual, grid)
        # The first image sees no other: it equals the picture alone after the same text.
        alone = subject.encode([subject.picture, subject.other_picture][pictures[0]])
        close(got.grid_attr[0], lens.attribute(alone, subject.answer).grid_attr[0])


def test_image_maps_depend_on_their_own_image_only_where_they_must(tiny_subject):
    s = tiny_subject
    inputs, _ = with_two_images(s)
    changed = {**inputs, "pixel_values": inputs["pixel_values"].clone()}
    changed["pixel_values"][1] = 0
    lens = LogitLens(s.model)
    one, two = lens.attribute(inputs, s.answer), lens.attribute(changed, s.answer)
    assert torch.allclose(one.grid_attr[0], two.grid_attr[0], atol=1e-6)
    assert not torch.allclose(one.grid_attr[1], two.grid_attr[1], atol=1e-3)


def test_non_square_pixels(tiny_subject):
    s = tiny_subject
    inputs = wide_inputs(s, rows=2, cols=6)
    for scales in ((1.0,), (1.0, 1.5)):
        run = forwards.plain_at(s.model, inputs, s.answer, 1.0)
        maps = forwards.msea_maps(s.model, inputs, s.answer, scales)
        (grid,), scores = forwards.raw(run, answer_positions(run), maps)
        got = MSEA(s.model, scales=scales).attribute(inputs, s.answer)
        close(got.grid_attr[0], grid)
        close(got.token_attr, scores)
        assert got.image_attr[0].shape[1:] == (8, 24)


def wide_inputs(subject, rows, cols):
    """Inputs whose one image has rows x cols tokens."""
    patch, image_id = subject.model.config.vision_config.patch_size, tiny.IMAGE_TOKEN
    base = subject.inputs
    native = int((base["input_ids"] == image_id).sum())
    ids = forwards.rebuilt_ids(base["input_ids"][0].tolist(), image_id, native, rows * cols)
    return {
        "input_ids": torch.tensor([ids]),
        "attention_mask": torch.ones(1, len(ids), dtype=torch.int64),
        "pixel_values": torch.randn(1, 3, rows * patch, cols * patch),
    }


@pytest.mark.parametrize("method", [LogitLens, MSEA, ARC])
def test_tower_that_keeps_its_class_token(tiny_subject, method):
    model = tiny.tiny_llava(vision_feature_select_strategy="full")
    s = tiny_subject
    inputs = wide_inputs(s, rows=4, cols=4)
    ids = forwards.rebuilt_ids(inputs["input_ids"][0].tolist(), tiny.IMAGE_TOKEN, 16, 17)
    inputs |= {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids)).long()}
    run = forwards.plain(model, inputs, s.answer)
    maps = None
    if method is MSEA:
        maps = forwards.msea_maps(model, inputs, s.answer, (1.0, 1.25, 1.5))
    twin = forwards.arc if method is ARC else forwards.raw
    expected = twin(run, answer_positions(run), maps)
    got = method(model).attribute(inputs, s.answer)
    close(got.grid_attr[0], expected[0][0])
    close(got.token_attr, expected[1])


def test_head_with_a_bias(tiny_subject):
    s = tiny_subject
    model = tiny.tiny_llava()
    head = torch.nn.Linear(24, tiny.VOCABULARY, bias=True)
    head.weight.data.copy_(model.lm_head.weight.data)
    model.lm_head = head
    run = forwards.plain(model, s.inputs, s.answer)
    got = ARC(model).attribute(s.inputs, s.answer)
    grids, scores, relevance = forwards.arc(run, answer_positions(run))
    close(got.grid_attr[0], grids[0])
    close(got.token_attr, scores)
    close(got.relevance, relevance)


@pytest.mark.parametrize(("dtype", "share"), [(torch.bfloat16, 0.06), (torch.float16, 0.01)])
def test_half_precision_models(tiny_subject, dtype, share):
    s = tiny_subject
    full = tiny.tiny_llava()
    half = tiny.tiny_llava(dtype=dtype)
    for attr in (LogitLens, MSEA):
        one = attr(full).attribute(s.inputs, s.answer)
        two = attr(half).attribute(s.inputs, s.answer)
        assert two.grid_attr[0].dtype == two.token_attr.dtype == torch.float32
        close(two.grid_attr[0], one.grid_attr[0], share)
        close(two.token_attr, one.token_attr, share)
    result = ARC(MSEA(half)).attribute(s.inputs, s.answer)
    assert torch.isfinite(result.grid_attr[0]).all()


def test_rankings_do_not_depend_on_dtype_noise(subject):
    """The bf16 model's rankings are those of a float64 product of its own hidden states."""
    model = type(subject.model)(subject.model.config).eval()
    model.load_state_dict(subject.model.state_dict())
    model = model.to(torch.bfloat16)
    k = 50
    trace = LogitLens(model).trace(subject.inputs, subject.answer, top_k=k)
    full = forwards.with_answer(subject.inputs, subject.answer)
    with torch.no_grad():
        hidden = model(**full, output_hidden_states=True).hidden_states[-1][0]
        own = model.lm_head(hidden)[trace.text_positions - 1]
    logits = hidden.double()[trace.text_positions - 1] @ model.lm_head.weight.double().T
    expected = logits.argsort(dim=1, descending=True, stable=True)[:, :k]
    assert torch.equal(trace.rankings, expected)
    # The test could fail: the model's own bf16 logits rank otherwise.
    assert not torch.equal(own.argsort(dim=1, descending=True, stable=True)[:, :k], expected)
