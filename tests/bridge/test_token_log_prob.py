"""TokenLogProb: frames, embeddings, layers and scores against forwards written by hand."""

import copy

import pytest
import torch
from torch.testing import assert_close

from captum_mllm import LogitLens, TokenLogProb
from captum_mllm.functional import top_k_rankings
from captum_mllm.geometry import ImageGeometry, maps_to_picture
from tests.oracle.families import above, video
from tests.oracle.frames import (
    by_hand,
    cells_by_hand,
    embedded_by_hand,
    frames_by_hand,
    log_probs_by_hand,
    view_positions,
)
from tests.oracle.layouts import QWEN, at_scale, kin_of, logits_of, pictures_of, with_answer

CASES = ("usual", "wide", "tall", "two")


@pytest.fixture(params=above())
def kin(request):
    return kin_of(request.param)


def made(kin, case="wide", **options):
    pictures = pictures_of(kin, case)
    inputs = kin.encode(*pictures)
    return TokenLogProb(kin.model, inputs, kin.answer, kin.processor, **options), inputs, pictures


def as_tuple(value):
    return value if isinstance(value, tuple) else (value,)


def noisy(frames, n, seed=0):
    """Copies: the frames themselves, noise around them, nothing but noise, zeros."""
    g = torch.Generator().manual_seed(seed)
    kinds = [
        lambda f: f,
        lambda f: f + torch.randn(f.shape, generator=g),
        lambda f: torch.randn(f.shape, generator=g),
    ]
    return tuple(torch.cat([kinds[k % 3](f) for k in range(n)]) for f in frames)


@pytest.mark.parametrize("case", CASES)
def test_frames_are_the_pictures(kin, case):
    f, inputs, pictures = made(kin, case)
    expected = frames_by_hand(kin, inputs, pictures)
    assert len(as_tuple(f.pixels)) == len(expected)
    for got, own in zip(as_tuple(f.pixels), expected, strict=True):
        assert torch.equal(got, own)


@pytest.mark.parametrize("case", CASES)
def test_its_own_frames_give_the_models_own_scores_bit_for_bit(kin, case):
    f, inputs, _ = made(kin, case)
    with torch.no_grad():
        expected = log_probs_by_hand(kin, inputs, kin.answer)[None]
        assert torch.equal(f(*as_tuple(f.pixels)), expected)
        assert torch.equal(f(f.embeddings), expected)
        assert torch.equal(f(*as_tuple(f.pixels), f.embeddings), expected)
        assert torch.equal(f(), expected)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("seed", [0, 1])
def test_a_batch_of_other_frames_equals_forwards_by_hand(kin, case, seed):
    f, inputs, pictures = made(kin, case)
    frames = noisy(as_tuple(f.pixels), 4, seed)
    with torch.no_grad():
        got, expected = f(*frames), by_hand(kin, inputs, pictures, kin.answer)(*frames)
    assert got.shape == (4, len(kin.answer))
    assert not torch.allclose(got[0], got[1])
    assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_embeddings_equal_forwards_by_hand(kin):
    f, inputs, _ = made(kin)
    given = noisy((f.embeddings,), 3)[0]
    with torch.no_grad():
        expected = embedded_by_hand(kin, inputs, kin.answer)(given)
        assert_close(f(given), expected, rtol=1e-4, atol=1e-5)
    table = kin.model.get_input_embeddings()
    text = inputs["input_ids"][0] != kin.model.config.image_token_id
    own = table(with_answer(kin, inputs, kin.answer)["input_ids"][0, : len(text)][text])
    assert torch.equal(f.embeddings[0, : len(text)][text], own.detach())


@pytest.mark.parametrize("case", ["wide", "two"])
def test_gradients_are_those_of_the_forward_by_hand(kin, case):
    f, inputs, pictures = made(kin, case)
    rows = []
    for scores in (f, by_hand(kin, inputs, pictures, kin.answer)):
        frames = [frame.requires_grad_() for frame in noisy(as_tuple(f.pixels), 2)]
        total = (scores(*frames) * torch.tensor([1.0, -0.5, 2.0, 0.3, 0.7])).sum()
        rows.append(torch.autograd.grad(total, frames))
    for got, expected in zip(*rows, strict=True):
        assert float(got.abs().max()) > 0
        assert_close(got, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


def test_gradients_of_embeddings(kin):
    f, inputs, _ = made(kin)
    rows = []
    for scores in (f, embedded_by_hand(kin, inputs, kin.answer)):
        given = f.embeddings.requires_grad_()
        rows.append(torch.autograd.grad(scores(given)[0, 2], given)[0])
    assert_close(*rows, rtol=1e-3, atol=1e-4 * float(rows[1].abs().max()))
    n = inputs["input_ids"].shape[1]
    is_image = inputs["input_ids"][0] == kin.model.config.image_token_id
    assert float(rows[0][0, :n][is_image].abs().max()) == 0  # features take their place
    assert float(rows[0][0, n + 2 :].abs().max()) == 0  # nothing after the token has a say
    assert float(rows[0][0, n : n + 2].abs().max()) > 0


def test_the_layers_features_and_what_depends_on_them(kin):
    f, inputs, pictures = made(kin)
    cells, scores = cells_by_hand(kin, inputs, pictures[0], kin.answer)
    views = view_positions(kin, inputs, pictures[0])
    seen = []
    handle = f.layer().register_forward_hook(lambda _m, _a, out: seen.append(out))
    f(f.pixels)
    handle.remove()
    assert torch.equal(seen[0].detach(), cells)
    other = torch.randn_like(cells)
    handle = f.layer().register_forward_hook(lambda *_: other)
    with torch.no_grad():
        assert_close(f(f.pixels), scores(other), rtol=1e-4, atol=1e-5)
    handle.remove()
    if len(views) == 2:
        seen.clear()
        handle = f.layer(0, 1).register_forward_hook(lambda _m, _a, out: seen.append(out))
        f()
        handle.remove()
        assert seen[0].shape[2:] == views[1].shape
    with pytest.raises(IndexError, match=f"view {len(views)} is out of range"):
        f.layer(0, len(views))
    with pytest.raises(IndexError, match="image 1 is out of range"):
        f.layer(1)


def state_of(model):
    kinds = bool | int | float | str
    return [
        (
            name,
            {key: value for key, value in vars(module).items() if isinstance(value, kinds)},
            len(module._forward_hooks),
            len(module._forward_pre_hooks),
        )
        for name, module in model.named_modules()
    ]


def test_the_model_is_left_as_it_was_and_gets_no_gradient(kin):
    model = copy.deepcopy(kin.model).train()
    frozen = next(model.parameters()).requires_grad_(False)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    asked = [p.requires_grad for p in model.parameters()]
    state = state_of(model)
    inputs = kin.encode()
    f = TokenLogProb(model, inputs, kin.answer)
    x = f.pixels.requires_grad_()
    f(x).sum().backward()
    assert float(x.grad.abs().max()) > 0
    with pytest.raises(ValueError, match="inputs hold embeddings of shape"):
        f(f.embeddings[..., :5])  # an error in the middle of a forward
    assert all(p.grad is None for p in model.parameters())
    assert [p.requires_grad for p in model.parameters()] == asked
    assert not frozen.requires_grad
    assert state_of(model) == state
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert torch.equal(f.pixels, as_tuple(TokenLogProb(model, inputs, kin.answer).pixels)[0])


# ---- which scores ------------------------------------------------------------------------------


def test_logits_sums_and_chosen_tokens(kin):
    f, inputs, _ = made(kin)
    with torch.no_grad():
        length = inputs["input_ids"].shape[1]
        rows = logits_of(kin, with_answer(kin, inputs, kin.answer))[length - 1 : -1]
        logits = rows.gather(1, kin.answer[:, None])[:, 0]
        assert torch.equal(made(kin, score="logit")[0]()[0], logits)
        assert_close(made(kin, sequence=True)[0](f.pixels), f().sum(1))
        some = made(kin, explain=[length + 3, length + 1])[0]
        assert_close(some(), f()[:, [3, 1]], rtol=1e-5, atol=1e-6)
    assert some.output_tokens == (f.output_tokens[3], f.output_tokens[1])
    assert torch.equal(some.output_ids, kin.answer[[3, 1]])
    assert some.positions.tolist() == [length + 3, length + 1]
    assert torch.equal(some.answer_ids, kin.answer)
    assert len(f.input_tokens) == length + len(kin.answer) == f.embeddings.shape[1]
    assert f.input_tokens[length:] == f.output_tokens


def test_words_of_the_prompt(kin):
    if kin.name == "PaliGemma":
        with pytest.raises(ValueError, match="prefix LM"):
            made(kin, explain="all")
        return
    f, inputs, _ = made(kin, explain="all")
    result = LogitLens(kin.model, kin.processor).attribute(inputs, kin.answer, explain="all")
    assert f.output_tokens == result.output_tokens
    assert_close(f().detach()[0].exp(), result.output_probs, rtol=1e-4, atol=1e-7)


def test_an_answer_is_generated_or_read(kin):
    inputs = kin.encode()
    f = TokenLogProb(kin.model, inputs, gen_args={"max_new_tokens": 3})
    result = LogitLens(kin.model).attribute(inputs, gen_args={"max_new_tokens": 3})
    assert torch.equal(f.answer_ids, result.output_ids)
    named = TokenLogProb(kin.model, inputs, "dog left", kin.processor)
    assert [token.strip() for token in named.output_tokens] == ["dog", "left"]


def test_left_padding_changes_nothing():
    kin = kin_of("Qwen2VL")
    inputs = kin.encode()
    sides = ("input_ids", "attention_mask", "mm_token_type_ids")
    padded = {
        name: torch.cat([value.new_zeros(1, 3), value], 1) if name in sides else value
        for name, value in inputs.items()
    }
    a, b = (TokenLogProb(kin.model, given, kin.answer) for given in (inputs, padded))
    assert torch.equal(a(a.pixels), b(b.pixels))
    assert torch.equal(a.positions, b.positions)


def test_rankings_are_those_of_the_predictions(kin):
    f, inputs, _ = made(kin)
    if kin.name == "PaliGemma":
        with pytest.raises(ValueError, match="prefix LM"):
            f.rankings(5)
        return
    rankings = f.rankings(7)
    logits = logits_of(kin, with_answer(kin, inputs, kin.answer))
    assert torch.equal(rankings[1:], top_k_rankings(logits[:-1], 7))
    assert rankings[0].tolist() == [-1, -2, -3, -4, -5, -6, -7]
    trace = LogitLens(kin.model).trace(inputs, kin.answer, top_k=7)
    assert torch.equal(rankings[f.positions], trace.rankings[trace.targets])


# ---- other sizes, videos -----------------------------------------------------------------------


@pytest.mark.parametrize("case", ["wide", "two"])
@pytest.mark.parametrize("scale", [0.5, 1.5])
def test_frames_of_another_size_run_on_the_grids_of_that_size(kin, case, scale):
    f, inputs, pictures = made(kin, case)
    frames = tuple(
        torch.nn.functional.interpolate(
            frame, size=[round(side * scale) for side in frame.shape[-2:]], mode="bilinear"
        )
        for frame in as_tuple(f.pixels)
    )
    if kin.name in ("Gemma3", "LlavaNext"):
        with pytest.raises(ValueError, match=r"images of .* only.*MSEA"):
            f(*frames)
        return
    scaled, _ = at_scale(kin, inputs, pictures, scale)
    other = TokenLogProb(kin.model, scaled, kin.answer)  # what is there at that size
    wanted = as_tuple(other.pixels)
    at = [
        torch.nn.functional.interpolate(frame, size=own.shape[-2:], mode="bicubic", antialias=True)
        if frame.shape != own.shape else frame
        for frame, own in zip(frames, wanted, strict=True)
    ]  # fmt: skip
    with torch.no_grad():
        assert_close(f(*frames), other(*at), rtol=1e-4, atol=1e-5)
        if case == "wide":  # two pictures' sides may be rounded to no common factor
            assert_close(f(*wanted), other(), rtol=1e-4, atol=1e-5)
    grown = [frame.clone().requires_grad_() for frame in frames]
    f(*grown).sum().backward()
    assert all(float(frame.grad.abs().max()) > 0 for frame in grown)
    with pytest.raises(ValueError, match="pass one of the two"):
        f(*frames, f.embeddings)


def test_frames_of_another_aspect_are_refused(kin):
    f, *_ = made(kin)
    with pytest.raises(ValueError, match="by one factor"):
        f(torch.zeros(1, 3, f.pixels.shape[2] * 2, f.pixels.shape[3]))


@pytest.mark.parametrize("name", above(QWEN))
def test_videos(name):
    kin = kin_of(name)
    inputs = video(kin)
    f = TokenLogProb(kin.model, inputs, kin.answer)
    assert f.pixels.shape == (1, 4, 3, 24, 32)
    with torch.no_grad():
        expected = log_probs_by_hand(kin, inputs, kin.answer)[None]
        assert torch.equal(f(f.pixels), expected)
        both = f(torch.cat([f.pixels * 0, f.pixels]))
        black = {**inputs, "pixel_values_videos": inputs["pixel_values_videos"] * 0}
        assert_close(both[:1], log_probs_by_hand(kin, black, kin.answer)[None], atol=1e-5, rtol=0)
        assert_close(both[1:], expected, atol=1e-5, rtol=0)
    x = f.pixels.requires_grad_()
    f(x).sum().backward()
    assert (x.grad.flatten(2).abs().amax(2) > 0).all()


def test_a_pair_of_different_frames_is_no_picture():
    kin = kin_of("Qwen2VL")
    inputs = kin.encode()
    inputs["pixel_values"] = torch.rand_like(inputs["pixel_values"])
    with pytest.raises(ValueError, match="step in time has different frames"):
        TokenLogProb(kin.model, inputs, kin.answer)


# ---- back to the picture -----------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_attributions_lie_where_the_picture_has_them(kin, case):
    """A block that is drawn into the frame comes back at its own place in the picture."""
    f, _, pictures = made(kin, case)
    for image, (frame, picture) in enumerate(zip(as_tuple(f.pixels), pictures, strict=True)):
        marks = torch.zeros(2, *frame.shape[1:])
        h, w = frame.shape[-2:]
        marks[0, :, : h // 2, : w // 2] = 1
        marks[1, 0, h // 2 :, w // 2 :] = 1
        back = f.to_image(marks, picture, image)
        size = (picture.height, picture.width)
        assert back.shape == (2, *size)
        if kin.name in ("Llava",) and picture.width != picture.height:
            side = min(size)  # centre crop
            top, left = (size[0] - side) // 2, (size[1] - side) // 2
            assert float(back[:, :top].abs().sum() + back[:, :, :left].abs().sum()) == 0
            continue
        upper, lower = (slice(n // 2 - 1) for n in size), (slice(n // 2 + 2, None) for n in size)
        upper, lower = tuple(upper), tuple(lower)
        assert float((back[0][upper] - 3).abs().max()) < 1e-5  # channels are summed
        assert float((back[1][lower] - 1).abs().max()) < 1e-5
        assert float(back[0][lower].abs().max()) < 1e-5


def test_cells_go_to_the_picture_as_the_results_maps_do(kin):
    f, inputs, pictures = made(kin)
    result = LogitLens(kin.model, kin.processor).attribute(inputs, kin.answer)
    expected = result.to_image(0, pictures[0])
    assert_close(f.to_image(result.grid_attr[0][:, None], pictures[0]), expected)
    box = ImageGeometry((0.0, 0.0, 3.0, 2.0))
    got = f.to_image(result.grid_attr[0][:, None], (4, 5), geometry=box)
    assert_close(got, maps_to_picture(result.grid_attr[0], box, (4, 5)))


def test_without_processor_the_geometry_must_be_told():
    kin = kin_of("Llava")
    f = TokenLogProb(kin.model, kin.encode(), kin.answer)
    with pytest.raises(ValueError, match="geometry=ImageGeometry"):
        f.to_image(f.pixels, (16, 16))
    assert f.output_tokens[0].startswith("<id")


def test_maps_become_attributions_of_the_frame_with_their_sum(kin):
    f, inputs, _ = made(kin)
    maps = LogitLens(kin.model).attribute(inputs, kin.answer).grid_attr[0]
    wide = f.from_maps(maps)
    assert wide.shape == (len(maps), *f.pixels.shape[1:])
    assert_close(wide.sum((1, 2, 3)), maps.sum((1, 2)), rtol=1e-4, atol=1e-5)
    assert torch.equal(wide[:, 0], wide[:, 2])
    peak = torch.zeros_like(maps[:1])
    peak[0, -1, -1] = 1
    spot = f.from_maps(peak)[0, 0]
    h, w = (round(n * 0.5) for n in spot.shape)
    assert float(spot[h:, w:].sum()) > 0.3
    assert float(spot[:h, :w].sum()) == 0


# ---- errors ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (lambda _: ("pixels",), TypeError, "inputs must be tensors"),
        (lambda f: (f.pixels, f.pixels), ValueError, "one canvas per image"),
        (lambda f: (f.pixels[:, :1],), ValueError, "one canvas per image"),
        (lambda f: (f.embeddings, f.embeddings), ValueError, "embeddings \\(N, "),
        (lambda f: (f.embeddings[:, :-1],), ValueError, "embeddings \\(N, "),
        (lambda f: (f.embeddings[0],), ValueError, "embeddings \\(N, "),
        (lambda f: (f.embeddings[..., :3],), ValueError, "embeddings of shape"),
        (lambda f: (f.pixels.repeat(2, 1, 1, 1), f.embeddings), ValueError, "one batch length"),
        (lambda f: (f.pixels[:0],), ValueError, "one batch length"),
    ],
)
def test_what_is_no_input_is_refused(given, error, message):
    f, *_ = made(kin_of("Llava"))
    with pytest.raises(error, match=message):
        f(*given(f))


def test_arguments_are_checked():
    kin = kin_of("Llava")
    inputs = kin.encode()
    with pytest.raises(ValueError, match="score must be one of log_prob, logit, got 'prob'"):
        TokenLogProb(kin.model, inputs, kin.answer, score="prob")
    with pytest.raises(ValueError, match="target is a string"):
        TokenLogProb(kin.model, inputs, "dog")
    with pytest.raises(TypeError, match="processor must be"):
        TokenLogProb(kin.model, inputs, kin.answer, object())
    with pytest.raises(ValueError, match="attribution must be"):
        made(kin)[0].to_image(torch.zeros(1, 4, 4), (4, 4))
    with pytest.raises(ValueError, match="maps must be"):
        made(kin)[0].from_maps(torch.zeros(1, 1, 4, 4))


def test_a_model_compiled_meanwhile_is_refused():
    kin = kin_of("Llava")
    model = copy.deepcopy(kin.model)
    f = TokenLogProb(model, kin.encode(), kin.answer)
    model.model._compiled_call_impl = model.model.forward  # as nn.Module.compile leaves it
    with pytest.raises(ValueError, match="'model' is compiled"):
        f(f.pixels)


def test_perturbations_of_an_offloaded_model(tmp_path):
    import accelerate

    kin = kin_of("Llava")
    inputs = kin.encode()
    model = accelerate.disk_offload(copy.deepcopy(kin.model), str(tmp_path), execution_device="cpu")
    scores = []
    with torch.no_grad():
        for own in (model, kin.model):
            f = TokenLogProb(own, inputs, kin.answer)
            scores.append(f(noisy((f.pixels,), 3)[0]))
    assert_close(*scores, rtol=1e-5, atol=1e-6)
    assert all(parameter.is_meta for parameter in model.parameters())


def test_half_precision(kin):
    model = copy.deepcopy(kin.model).to(torch.bfloat16)
    inputs = kin.encode()
    if kin.name != "Llava":
        inputs["pixel_values"] = inputs["pixel_values"].to(torch.bfloat16)
    f = TokenLogProb(model, inputs, kin.answer)
    x, e = f.pixels.requires_grad_(), f.embeddings.requires_grad_()
    scores = f(x, e)
    assert scores.dtype == torch.float32
    scores.sum().backward()
    assert torch.isfinite(x.grad).all()
    assert float(e.grad.abs().max()) > 0
    with torch.no_grad():
        zeros = f(x * 0)
    assert torch.isfinite(zeros).all()
